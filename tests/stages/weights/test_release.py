"""The release folder in diffusers' stock pipelines, offline: same tokens, same pictures, same bytes."""

import hashlib
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DiffusionPipeline,
    WuerstchenCombinedPipeline,
    WuerstchenDecoderPipeline,
    WuerstchenPriorPipeline,
)
from safetensors.torch import load_file
from torch import nn

from stages.models.compressor import Compressor
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.models.text import Tokenizer, seeded_tower
from stages.sampling.sample import Models, generate, reconstruct_b
from stages.settings.models import (
    CompressorConfig,
    EfficientNetStages,
    SeededTextConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)
from stages.settings.sampling import SamplingConfig
from stages.weights.card import CardFacts, model_card
from stages.weights.release import NotReleasable, release_files

M = TypeVar("M", bound=nn.Module)

STAGE_A = StageAConfig(bottleneck_blocks=2, hidden=16, codebook_size=32, scale=0.7)
STAGE_B = StageBConfig(
    widths=(8, 16, 32),
    blocks=(1, 2, 1),
    patterns=("CT", "CTA", "CTA"),
    heads=(0, 2, 4),
    inject_code=(False, True, True),
    cond_width=24,
    text_width=20,
    timestep_channels=16,
)
STAGE_C = StageCConfig(width=32, depth=2, heads=4, text_width=24, timestep_channels=32)
COMPRESSOR = CompressorConfig(
    backbone=EfficientNetStages.model_validate(
        {
            "stem": 8,
            "stages": [{"block": "fused", "expand": 2, "stride": 2, "channels": 8, "layers": 1} for _ in range(4)],
            "last": 16,
        }
    ),
    batch_norm="fixed",
)
# Towers of different widths and lengths: one in the other's place cannot go unseen.
TEXT_B = SeededTextConfig(width=20, layers=2, heads=2, context_length=12, seed=1)
TEXT_C = SeededTextConfig(width=24, layers=1, heads=3, context_length=16, seed=2)

PROMPT = "a blue house, with three (3) windows: isn't it?"
EXAMPLE = SamplingConfig(width=256, height=128, steps_c=3, steps_b=2, guidance_c=2.5, guidance_b=1.5)
FACTS = CardFacts(
    name="Tiny Würstchen",
    license="cc-by-sa-4.0",
    prompt=PROMPT,
    settings=EXAMPLE,
    sources=[],
    scores=[],
    cost=[],
    limitations=[],
)


def randomised(module: M, generator: torch.Generator, std: float = 0.1) -> M:
    """Every parameter and buffer random, so that a tensor in the wrong place cannot go unseen."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(std=std, generator=generator)
    return module.eval()


@pytest.fixture(scope="module")
def models() -> Models:
    generator = torch.Generator().manual_seed(0)
    stage_a = randomised(StageA(STAGE_A), generator)
    stage_c = randomised(StageC(STAGE_C), generator, std=0.2)
    with torch.no_grad():
        stage_a.out_block[0].weight.mul_(0.02)  # pixels within [0, 1]
        stage_a.out_block[0].bias.add_(0.5)
        stage_c.out[1].weight.mul_(0.15)  # a divisor |1 - b| near 0 would magnify rounding
    return Models(
        stage_a=stage_a,
        stage_b=randomised(StageB(STAGE_B), generator, std=0.2),
        stage_c=stage_c,
        text_b=randomised(seeded_tower(TEXT_B), generator, std=0.5),
        text_c=randomised(seeded_tower(TEXT_C), generator, std=0.5),
    )


@pytest.fixture(scope="module")
def compressor() -> Compressor:
    return randomised(Compressor(COMPRESSOR), torch.Generator().manual_seed(1))


def released(models: Models, compressor: Compressor, stage_b: StageBConfig = STAGE_B) -> Iterator[tuple[str, bytes]]:
    return release_files(
        models,
        compressor,
        stage_a_config=STAGE_A,
        stage_b_config=stage_b,
        stage_c_config=STAGE_C,
        compressor_config=COMPRESSOR,
        card=model_card(FACTS),
    )


@pytest.fixture(scope="module")
def folder(models: Models, compressor: Compressor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("release")
    for name, content in released(models, compressor):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not path.exists()
        path.write_bytes(content)
    return root


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hugging Face's offline mode; and whoever opens a connection all the same fails the test."""
    calls: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        calls.append(address)
        raise ConnectionRefusedError(address)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert calls == []


def ours(models: Models, prompt: str, negative: str, seed: int, **changes: Any) -> np.ndarray:
    settings = EXAMPLE.model_copy(update={"negative": negative, **changes})
    return generate(models, [prompt], [seed], settings)[0].numpy()


def difference(a: Any, b: Any) -> int:
    """Largest difference of two 8-bit pictures."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("load", [WuerstchenCombinedPipeline, AutoPipelineForText2Image, DiffusionPipeline])
def test_the_folder_loads_as_the_combined_pipeline(folder: Path, load: Any) -> None:
    assert type(load.from_pretrained(folder)) is WuerstchenCombinedPipeline


def test_seed_prompt_and_negative_all_show(models: Models) -> None:
    """Else equal pictures would say little."""
    picture = ours(models, "red heart", "blurry", 7)
    assert picture.std() > 10
    for prompt, negative, seed in [
        ("red heart", "blurry", 8),
        ("a cat", "blurry", 7),
        ("red heart", "", 7),
    ]:
        assert difference(ours(models, prompt, negative, seed), picture) > 10


def test_prior_and_decoder_draw_the_same_picture_one_after_the_other(models: Models, folder: Path) -> None:
    prior = WuerstchenPriorPipeline.from_pretrained(folder / "prior")
    decoder = WuerstchenDecoderPipeline.from_pretrained(folder / "decoder")
    generator = torch.Generator().manual_seed(3)
    code = prior(
        "a cat", width=256, height=128, num_inference_steps=3, guidance_scale=3.0, generator=generator
    ).image_embeddings
    assert code.shape == (1, 16, 3, 6)
    theirs = decoder(code, "a cat", num_inference_steps=2, generator=generator).images[0]
    picture = ours(models, "a cat", "", 3, guidance_c=3.0, guidance_b=1.0)
    assert difference(theirs, picture) <= 1


def test_a_reconstruction_is_the_stock_decoders_picture_of_the_code(
    models: Models, compressor: Compressor, folder: Path
) -> None:
    image = torch.randint(0, 256, (1, 3, 128, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    assert models.text_b is not None
    text, _ = models.text_b.encode(["a cat"])
    again = reconstruct_b(models.stage_a, models.stage_b, compressor, image, text, [5], steps=3)[0]
    decoder = WuerstchenDecoderPipeline.from_pretrained(folder / "decoder")
    with torch.no_grad():
        code = compressor(image / 255)
    generator = torch.Generator().manual_seed(5)
    theirs = decoder(code, "a cat", num_inference_steps=3, guidance_scale=0.0, generator=generator).images[0]
    assert difference(theirs, again.numpy()) <= 1


def test_the_example_of_the_card_runs(models: Models, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert example
    names: dict[str, Any] = {}
    monkeypatch.chdir(folder)
    exec(example[1], names)
    assert difference(names["image"], ours(models, PROMPT, "", 0)) <= 1


@pytest.mark.parametrize(
    ("load", "place"),
    [
        (WuerstchenCombinedPipeline, ""),
        (WuerstchenPriorPipeline, "prior"),
        (WuerstchenDecoderPipeline, "decoder"),
    ],
)
def test_every_tensor_is_taken_and_none_is_missing(folder: Path, load: Any, place: str) -> None:
    parts = load.from_pretrained(folder / place).components
    for name, model in parts.items():
        if isinstance(model, nn.Module):
            (weights,) = (folder / place / name).glob("*.safetensors")
            stored = {key.removeprefix("text_model."): value for key, value in load_file(weights).items()}
            loaded = {key.removeprefix("text_model."): value for key, value in model.state_dict().items()}
            assert stored.keys() == loaded.keys(), name
            assert all(torch.equal(stored[key], loaded[key]) for key in stored), name


@pytest.mark.parametrize(("name", "config"), [("tokenizer", TEXT_B), ("prior_tokenizer", TEXT_C)])
def test_tokens_are_ours(folder: Path, name: str, config: SeededTextConfig) -> None:
    captions = ["", PROMPT, "Würstchen & Käse — 満月 😀", "word " * 40]
    tokenizer = getattr(WuerstchenCombinedPipeline.from_pretrained(folder), name)
    theirs = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(theirs, Tokenizer(config.context_length)(captions).ids)


def test_the_compressor_loads_back(compressor: Compressor, folder: Path) -> None:
    config = CompressorConfig.model_validate_json((folder / "compressor/config.json").read_text())
    again = Compressor(config)
    again.load_state_dict(load_file(folder / "compressor/model.safetensors"))
    image = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(again.eval()(image), compressor(image))


def test_two_calls_give_the_same_bytes(models: Models, compressor: Compressor, folder: Path) -> None:
    again = {name: hashlib.sha256(content).digest() for name, content in released(models, compressor)}
    first = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).digest()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert again == first


def test_a_shared_tower_goes_into_both_folders(models: Models, compressor: Compressor) -> None:
    shared = Models(models.stage_a, models.stage_b, models.stage_c, models.text_c, models.text_c)
    files = dict(released(shared, compressor))
    for name in ("text_encoder/model.safetensors", "tokenizer/vocab.json"):
        places = [files[f"{place}{name}"] for place in ("", "decoder/", "prior_", "prior/")]
        assert len(set(places)) == 1


def test_what_no_stock_pipeline_runs_is_refused(models: Models, compressor: Compressor) -> None:
    without_text = Models(models.stage_a, models.stage_b, models.stage_c, None, models.text_c)
    with pytest.raises(NotReleasable, match="without text"):
        next(released(without_text, compressor))
    with pytest.raises(NotReleasable, match="latent_channels is 8"):
        next(released(models, compressor, STAGE_B.model_copy(update={"latent_channels": 8})))
