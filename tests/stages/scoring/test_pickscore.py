"""PickScore's formula and loading, on a tiny random CLIP; transformers' own CLIP is the oracle."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from datasets.files import storage
from pipeline.settings.sections import PickScore as PickScoreSettings
from pipeline.steps import evaluate
from pipeline.store.artifacts import Artifact
from stages.sampling.grid import png
from stages.scoring.clip import to_open_clip
from stages.scoring.pickscore import PickScoreError, compare_folders, load_pickscore

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
PROMPTS = ["red heart", "what's this: Würstchen?", "a cat " * 30]


def _peer() -> CLIPModel:
    """transformers' model of the same shape, with weights large enough to tell wrong tensors apart."""
    config = CLIPConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "hidden_act": "gelu",
            "eos_token_id": 49407,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "hidden_act": "gelu",
        },
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        model.logit_scale.fill_(np.log(100))
    return model


@pytest.fixture(scope="module")
def peer() -> CLIPModel:
    return _peer()


@pytest.fixture(scope="module", autouse=True)
def tiny_architecture(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("architectures")
    (folder / "tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def weights(peer: CLIPModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in peer.state_dict().items()}, path)
    return path


def _pictures(n: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (40 + 8 * i, 64, 3), dtype=np.uint8) for i in range(n)]


def _expected(peer: CLIPModel, pictures: list[np.ndarray], prompts: list[str]) -> np.ndarray:
    transform = open_clip.image_transform(32, is_train=False)
    pixels = torch.stack([transform(Image.fromarray(picture)) for picture in pictures])
    tokens = open_clip.SimpleTokenizer(context_length=16)(prompts)
    with torch.inference_mode():
        logits = peer(input_ids=tokens, pixel_values=pixels).logits_per_text
    return logits.diagonal().numpy()


def test_scores_equal_those_of_transformers(peer: CLIPModel, weights: Path) -> None:
    pictures = _pictures(len(PROMPTS))
    scores = load_pickscore(weights, architecture="tiny-clip").score(pictures, PROMPTS)
    expected = _expected(peer, pictures, PROMPTS)
    assert scores.values.dtype == np.float32
    np.testing.assert_allclose(scores.values, expected, rtol=1e-5, atol=1e-5)
    assert np.ptp(expected) > 1  # a scorer that ignores its input would not get here


def test_prompts_longer_than_the_context_are_counted(weights: Path) -> None:
    scorer = load_pickscore(weights, architecture="tiny-clip")
    assert scorer.score(_pictures(3), PROMPTS).truncated_prompts == 1
    just_fits = "cat " * 14  # with the start and end tokens, 16
    assert scorer.score(_pictures(2), [just_fits, just_fits + "cat"]).truncated_prompts == 1


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_weights_in_the_own_layout_of_open_clip(
    peer: CLIPModel, weights: Path, tmp_path: Path, save: Callable[[dict, Path], None]
) -> None:
    path = tmp_path / ("model.safetensors" if save is save_file else "model.bin")
    save(to_open_clip(peer.state_dict()), path)
    ours = load_pickscore(path, architecture="tiny-clip").score(_pictures(3), PROMPTS)
    converted = load_pickscore(weights, architecture="tiny-clip").score(_pictures(3), PROMPTS)
    np.testing.assert_array_equal(ours.values, converted.values)


def test_conversion_covers_the_full_size_model() -> None:
    """The conversion gives every tensor of ViT-H-14 its shape, and none besides (on the meta device)."""
    with torch.device("meta"):
        published = CLIPModel(
            CLIPConfig(
                text_config={
                    "hidden_size": 1024,
                    "intermediate_size": 4096,
                    "num_hidden_layers": 24,
                    "num_attention_heads": 16,
                },
                vision_config={
                    "hidden_size": 1280,
                    "intermediate_size": 5120,
                    "num_hidden_layers": 32,
                    "num_attention_heads": 16,
                    "patch_size": 14,
                },
                projection_dim=1024,
            )
        )
        ours = CLIP(**open_clip.get_model_config("ViT-H-14"))
    converted = to_open_clip(published.state_dict())
    assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in ours.state_dict().items()}
    assert sum(tensor.numel() for tensor in converted.values()) == 986_109_441


def test_missing_weights_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PickScoreError, match=r"eval\.pickscore\.weights.*absent\.safetensors.*fetch"):
        load_pickscore(tmp_path / "absent.safetensors")


def test_wrong_weights_are_refused_by_name(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.safetensors"
    save_file({"logit_scale": torch.zeros(())}, wrong)
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    (tmp_path / "noise.bin").write_bytes(b"noise")
    for name in ("wrong.safetensors", "noise.safetensors", "noise.bin"):
        with pytest.raises(PickScoreError, match=rf"eval\.pickscore\.weights.*{name}"):
            load_pickscore(tmp_path / name, architecture="tiny-clip")


def test_weights_with_a_nan_are_refused(weights: Path, tmp_path: Path) -> None:
    state = load_file(weights)
    state["visual_projection.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(PickScoreError, match=r"^eval\.pickscore\.weights: \S*nan\.safetensors is damaged: its visual"):
        load_pickscore(tmp_path / "nan.safetensors", architecture="tiny-clip")


def _write(folder: Path, pictures: list[np.ndarray]) -> Path:
    folder.mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index:02}.png")
    return folder


def test_two_folders_give_a_win_rate(peer: CLIPModel, weights: Path, tmp_path: Path) -> None:
    ours, theirs = _pictures(9, seed=1), _pictures(9, seed=2)
    theirs[4] = ours[4]
    prompts = {f"{index:02}": f"{index} sausages" for index in range(9)}
    scorer = load_pickscore(weights, architecture="tiny-clip")
    result = compare_folders(scorer, _write(tmp_path / "a", ours), _write(tmp_path / "b", theirs), prompts, batch=4)
    texts = list(prompts.values())
    difference = _expected(peer, ours, texts) - _expected(peer, theirs, texts)
    assert result.win_rate.rate == ((difference > 0).sum() + 0.5) / 9
    assert (result.win_rate.ties, result.win_rate.n, result.truncated_prompts) == (1, 9, 0)
    assert result.keys == list(prompts)


def test_a_missing_picture_is_named(weights: Path, tmp_path: Path) -> None:
    scorer = load_pickscore(weights, architecture="tiny-clip")
    a, b = _write(tmp_path / "a", _pictures(2)), _write(tmp_path / "b", _pictures(1))
    with pytest.raises(PickScoreError, match=r"b/01\.png"):
        compare_folders(scorer, a, b, {"00": "one", "01": "two"})


def test_the_baseline_can_be_the_rival(
    peer: CLIPModel, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`evaluate` on two artifacts, one of them the baseline's, as `eval.pickscore.rival=baseline` has it."""
    ours, theirs = ([picture[:32, :32] for picture in _pictures(3, seed)] for seed in (1, 2))
    rows = [{"key": f"{index:02}", "caption": text, "seed": index} for index, text in enumerate(PROMPTS)]

    def artifact(name: str, folders: dict[str, list[np.ndarray]]) -> Artifact:
        files = {"captions.json": storage.publish(json.dumps(rows).encode(), str(tmp_path / name / "captions.json"))}
        for folder, pictures in folders.items():
            for row, picture in zip(rows, pictures, strict=True):
                file = f"{folder}/{row['key']}.png"
                files[file] = storage.publish(png(picture), str(tmp_path / name / file))
        return Artifact(name, str(tmp_path / name), {"files": {file: vars(entry) for file, entry in files.items()}})

    samples = artifact("samples", {"original": theirs, "stage_a": ours, "stage_b": ours, "generated": ours})
    baseline = artifact("baseline_samples", {"original": theirs, "generated": theirs})
    monkeypatch.setattr("stages.scoring.pickscore.load_pickscore", partial(load_pickscore, architecture="tiny-clip"))
    settings = PickScoreSettings(weights=str(weights), rival="baseline")
    _, metrics, _, _ = evaluate._evaluate(samples, baseline, settings, str(tmp_path / "scores"), "cpu")
    difference = _expected(peer, ours, PROMPTS) - _expected(peer, theirs, PROMPTS)
    assert metrics["pickscore_win_rate"] == (difference > 0).mean()
    assert metrics["retrieval_top1_baseline"] == 1.0
    assert metrics["psnr_baseline"] == np.inf
    table = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert [row["psnr_generated"] < row["psnr_baseline"] for row in table] == [True] * 3
