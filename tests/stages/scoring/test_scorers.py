"""Scorers on a tiny random CLIP; transformers' own CLIP, with the published processor, is the oracle."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from stages.models.text import tokenizer_files
from stages.scoring.clip import Clip, load, to_open_clip
from stages.scoring.metrics import psnr, ssim
from stages.scoring.scorers import PromptScorer, likenesses
from stages.weight_files import BadWeights

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
PROMPTS = [
    "red heart",
    "what's this: Würstchen?",
    "A&amp;B &lt;3",  # as it stands: not unescaped
    "cafÃ© noir",  # nor repaired
    "Cafe\u0301 ΟΔΟΣ",  # but composed, and in lower case
    "a  b\tc",
    "a cat " * 30,
]


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


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    """The tokenizer with which CLIP's models are published."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, text in tokenizer_files(16).items():
        (folder / name).write_text(text, "utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def _expected(peer: CLIPModel, processor: CLIPTokenizer, pictures: list[np.ndarray], prompts: list[str]) -> np.ndarray:
    transform = open_clip.image_transform(32, is_train=False)
    pixels = torch.stack([transform(Image.fromarray(picture)) for picture in pictures])
    tokens = processor(prompts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        logits = peer(**tokens, pixel_values=pixels).logits_per_text
    return logits.diagonal().numpy()


def _clip(weights: Path, **how: Any) -> Clip:
    return Clip(load(weights, "tiny-clip"), **how)


def test_scores_equal_those_of_transformers_with_the_published_processor(
    peer: CLIPModel, processor: CLIPTokenizer, weights: Path
) -> None:
    pictures = _pictures(len(PROMPTS))
    scores = PromptScorer(_clip(weights))(pictures, PROMPTS)
    expected = _expected(peer, processor, pictures, PROMPTS)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert np.ptp(expected) > 1  # a scorer that ignores its input would not get here
    np.testing.assert_allclose(PromptScorer(_clip(weights), 100.0)(pictures, PROMPTS), expected, atol=1e-3)
    hundred = PromptScorer(_clip(weights), 50.0)(pictures, PROMPTS)
    np.testing.assert_allclose(hundred, expected / 2, atol=1e-3)


def test_the_towers_may_be_in_bf16_but_never_the_head(weights: Path) -> None:
    pictures = _pictures(12)
    prompts = [f"{number} sausages" for number in range(12)]
    whole, half = (
        PromptScorer(_clip(weights, precision=precision))(pictures, prompts) for precision in ("fp32", "bf16")
    )
    assert half.dtype == np.float32
    assert 0 < np.abs(half - whole).max() < 3
    rounded = torch.from_numpy(half).bfloat16().float().numpy()
    assert not np.isin(half, rounded).any()  # a head in bf16 gives values that bf16 has
    for precision in ("fp32", "bf16"):
        lengths = _clip(weights, precision=precision).pictures(pictures).norm(dim=-1)
        np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_prompts_longer_than_the_context_are_told(weights: Path) -> None:
    clip = _clip(weights)
    just_fits = "cat " * 14  # with the start and end tokens, 16
    assert [clip.is_truncated(text) for text in (*PROMPTS, just_fits, just_fits + "cat")] == [
        *(False for _ in PROMPTS[:-1]), True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_weights_in_the_own_layout_of_open_clip(
    peer: CLIPModel, weights: Path, tmp_path: Path, save: Callable[[dict, Path], None]
) -> None:
    path = tmp_path / ("model.safetensors" if save is save_file else "model.bin")
    save(to_open_clip(peer.state_dict()), path)
    ours, converted = (PromptScorer(_clip(file))(_pictures(len(PROMPTS)), PROMPTS) for file in (path, weights))
    np.testing.assert_array_equal(ours, converted)


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


def test_wrong_weights_are_refused_by_name(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.safetensors"
    save_file({"logit_scale": torch.zeros(())}, wrong)
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    (tmp_path / "noise.bin").write_bytes(b"noise")
    for name in ("wrong.safetensors", "noise.safetensors", "noise.bin"):
        with pytest.raises(BadWeights, match=name):
            load(tmp_path / name, "tiny-clip")


def test_weights_with_a_nan_are_refused(weights: Path, tmp_path: Path) -> None:
    state = load_file(weights)
    state["visual_projection.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(BadWeights, match=r"^\S*nan\.safetensors is damaged: its visual"):
        load(tmp_path / "nan.safetensors", "tiny-clip")


def test_likeness_is_to_the_original_of_the_same_place() -> None:
    pictures = [np.full((32, 32, 3), value, np.uint8) for value in (100, 120)]
    originals = [picture + np.uint8(51) for picture in pictures]
    scorers = likenesses(lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)))
    found = {name: scorer(pictures, ["", ""], originals) for name, scorer in scorers.items()}
    np.testing.assert_allclose(found["psnr"], psnr(np.stack(pictures), np.stack(originals)), rtol=1e-6)
    np.testing.assert_allclose(found["ssim"], ssim(np.stack(pictures), np.stack(originals)), rtol=1e-6)
    np.testing.assert_allclose(found["lpips"], 0.2, rtol=1e-6)
    assert likenesses(None)["psnr"](pictures, ["", ""], pictures).tolist() == [100, 100]
