"""Our modules against diffusers' with the same weights, for randomly drawn configurations and random weights.

The error of a tensor is max |ours - theirs| / max |theirs| over all its entries: how many digits of the whole
are right. Rounding in a sum is relative to its largest terms, so an entry that happens to lie near zero has no
digits of its own to compare. 1e-5 is about a hundred units of the last place of fp32.

Levels have 8 channels or more: LayerNorm over fewer ones, often nearly equal, magnifies rounding on both sides.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeVar

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from torch import Tensor, nn

from stages.models.compressor import Compressor
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.models.text import seeded_tower
from stages.sampling.sample import Models, generate
from stages.settings.models import (
    CompressorConfig,
    EfficientNetStages,
    SeededTextConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)
from stages.settings.sampling import SamplingConfig
from stages.weights import convert
from stages.weights.release import release_files

M = TypeVar("M", bound=nn.Module)

CONFIGURATIONS = range(24)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ----------------------------------------------------------------------------------- configurations and weights


def stage_a_config(rng: Random) -> StageAConfig:
    return StageAConfig(
        levels=rng.randint(1, 3),
        bottleneck_blocks=rng.randint(1, 4),
        hidden=rng.choice([32, 40, 48]),
        latent_channels=rng.randint(2, 6),
        codebook_size=rng.randint(5, 60),
        scale=rng.uniform(0.2, 1.5),
    )


def stage_b_config(rng: Random, text_width: int, code_channels: int) -> StageBConfig:
    levels = rng.randint(1, 4)
    patterns = [rng.choice(["C", "CT", "CA", "CTA", "CAT", "CCT", "CTAC"]) for _ in range(levels)]
    heads = [rng.randint(1, 4) if "A" in pattern else 0 for pattern in patterns]
    return StageBConfig(
        latent_channels=rng.randint(2, 5),
        patch=rng.choice([1, 2, 2, 4]),
        widths=tuple(max(number, 1) * rng.choice([8, 12, 16]) for number in heads),
        blocks=tuple(rng.randint(1, 3) for _ in range(levels)),
        patterns=tuple(patterns),
        heads=tuple(heads),
        inject_code=tuple(rng.random() < 0.6 for _ in range(levels)),
        cond_width=rng.choice([12, 20, 32]),
        text_width=text_width,
        code_channels=code_channels,
        timestep_channels=rng.choice([4, 16, 30, 64]),
    )


def stage_c_config(rng: Random, text_width: int, latent_channels: int) -> StageCConfig:
    heads = rng.randint(1, 6)
    return StageCConfig(
        latent_channels=latent_channels,
        width=heads * rng.choice([8, 10, 16]),
        depth=rng.randint(1, 5),
        heads=heads,
        text_width=text_width,
        timestep_channels=rng.choice([4, 16, 30, 64]),
    )


def randomised(module: M, seed: int) -> M:
    """Draw every parameter and buffer, so that a tensor that is swapped, lost or unused cannot go unseen.

    Weights have the variance 1 / inputs, which keeps activations near one.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            tensor.random_(2, 1000, generator=generator)
        elif name.endswith("running_var"):
            tensor.uniform_(0.3, 3.0, generator=generator)
        else:
            inputs = tensor[0].numel() if len(tensor) > 1 and tensor.ndim > 1 else 10
            tensor.normal_(std=inputs**-0.5, generator=generator)
        at_start = (tensor == 0) | (tensor == 1)  # a normal number is exactly zero once in some million draws
        assert at_start.float().mean() < 0.01, f"{name} is not drawn"
    return module.eval()


def away_from_zero(stage_c: StageC, seed: int) -> StageC:
    """Draw the last layer so that Stage C's divisor 1 - b has either sign and is never near zero.

    Near zero the division turns the last bit of b into any error, on both sides alike.
    """
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (tensor[stage_c.latent_channels :] for tensor in (stage_c.out[1].weight, stage_c.out[1].bias))
    weight.mul_(0.1)
    bias.uniform_(0.6, 1.5, generator=generator)
    bias.mul_(torch.randn(bias.shape, generator=generator).sign()).add_(1)
    return stage_c


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.isfinite().all()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def outputs_of(module: nn.Module) -> list[Tensor]:
    """What the module gives in later calls."""
    seen: list[Tensor] = []
    module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    return seen


def times(rng: Random, rows: int) -> Tensor:
    return torch.tensor([rng.choice([0.0, 1.0, rng.random(), rng.random()]) for _ in range(rows)])


# -------------------------------------------------------------------------------------------------------- modules


@pytest.mark.parametrize("seed", CONFIGURATIONS)
def test_stage_a(seed: int) -> None:
    rng = Random(seed)
    config = stage_a_config(rng)
    ours = randomised(StageA(config), seed)
    theirs = PaellaVQModel(**convert.arguments(config)).eval()
    theirs.load_state_dict(convert.to_diffusers(ours.state_dict()))

    ratio = 2**config.levels
    height, width = rng.sample(range(2, 9), 2)
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(rng.randint(1, 3), 3, height * ratio, width * ratio, generator=generator)
    features = theirs.encode(image).latents
    latents = ours.encode(image)
    assert latents.shape[-2:] == (height, width)
    assert error(latents, features / config.scale) <= 1e-5
    assert error(ours.decode(features / config.scale), theirs.decode(features).sample) <= 1e-5
    quantised = theirs.decode(features, force_not_quantize=False).sample
    assert error(ours.decode_quantised(features / config.scale), quantised) <= 1e-5


@pytest.mark.parametrize("zeroed", [False, True], ids=["code", "zero_code"])
@pytest.mark.parametrize("seed", CONFIGURATIONS)
def test_stage_b(seed: int, zeroed: bool) -> None:
    rng = Random(seed)
    config = stage_b_config(rng, text_width=rng.choice([1024, 1280]), code_channels=rng.choice([4, 16]))
    ours = randomised(StageB(config), seed)
    theirs = WuerstchenDiffNeXt(**convert.arguments(config)).eval()
    theirs.load_state_dict(convert.to_diffusers(ours.state_dict()))

    generator = torch.Generator().manual_seed(seed)
    rows, least = rng.randint(1, 3), config.patch * 2 ** (len(config.widths) - 1)
    height, width = rng.sample(range(2, 6), 2)
    code_height, code_width = rng.sample(range(2, 9), 2)
    x = torch.randn(rows, config.latent_channels, height * least, width * least, generator=generator)
    code = torch.randn(rows, config.code_channels, code_height, code_width, generator=generator)
    text = torch.randn(rows, rng.randint(1, 77), config.text_width, generator=generator)
    t = times(rng, rows)
    code = torch.zeros_like(code) if zeroed else code
    assert error(ours(x, t, code, text), theirs(x, t, code, text)) <= 1e-5


@pytest.mark.parametrize("seed", CONFIGURATIONS)
def test_stage_c(seed: int) -> None:
    rng = Random(seed)
    config = stage_c_config(rng, text_width=rng.choice([1024, 1280]), latent_channels=rng.choice([4, 16]))
    ours = away_from_zero(randomised(StageC(config), seed), seed)
    theirs = WuerstchenPrior(**convert.arguments(config)).eval()
    theirs.load_state_dict(convert.to_diffusers(ours.state_dict()))

    generator = torch.Generator().manual_seed(seed)
    rows = rng.randint(1, 3)
    height, width = rng.sample(range(1, 9), 2)
    x = torch.randn(rows, config.latent_channels, height, width, generator=generator)
    text = torch.randn(rows, rng.randint(1, 77), config.text_width, generator=generator)
    t = times(rng, rows)
    a_and_b, stock_a_and_b = outputs_of(ours.out), outputs_of(theirs.out)
    assert error(ours(x, t, text), theirs(x, t, text)) <= 1e-3
    pairs = zip(a_and_b[0].permute(0, 3, 1, 2).chunk(2, dim=1), stock_a_and_b[0].chunk(2, dim=1), strict=True)
    assert all(error(mine, stock) <= 1e-5 for mine, stock in pairs)


def test_the_configurations_differ_in_everything_that_can_differ() -> None:
    a = [stage_a_config(Random(seed)) for seed in CONFIGURATIONS]
    b = [stage_b_config(Random(seed), 1024, 16) for seed in CONFIGURATIONS]
    c = [stage_c_config(Random(seed), 1024, 16) for seed in CONFIGURATIONS]
    assert {config.levels for config in a} == {1, 2, 3}
    assert {len(config.widths) for config in b} == {1, 2, 3, 4}
    assert {config.patch for config in b} == {1, 2, 4}
    assert len({pattern for config in b for pattern in config.patterns}) == 7
    assert {inject for config in b for inject in config.inject_code} == {False, True}
    assert {config.heads for config in c} == set(range(1, 7))
    assert {config.depth for config in c} == set(range(1, 6))


# ------------------------------------------------------------------------------------------------------- pictures

COMPRESSOR = CompressorConfig(
    backbone=EfficientNetStages.model_validate(
        {
            "stem": 8,
            "stages": [{"block": "fused", "expand": 2, "stride": 2, "channels": 8, "layers": 1} for _ in range(4)],
            "last": 16,
        }
    )
)


def text_config(rng: Random) -> SeededTextConfig:
    heads = rng.randint(1, 3)
    return SeededTextConfig(
        width=heads * rng.choice([8, 16]),
        layers=rng.randint(1, 3),
        heads=heads,
        context_length=rng.randint(5, 77),
        seed=rng.randrange(1000),
    )


def to_visible_range(models: Models, draw: Callable[[], object]) -> None:
    """Rescale Stage A's last layer to the pictures that are drawn: else most of their pixels would be clamped."""
    seen = outputs_of(models.stage_a.out_block)
    draw()
    layer, factor = models.stage_a.out_block[0], 0.25 / seen[0].std().item()
    layer.weight.mul_(factor)
    layer.bias.sub_(seen[0].mean().item()).mul_(factor).add_(0.5)


@pytest.mark.parametrize(
    ("width", "height", "guidance_c", "guidance_b"),
    [
        (256, 128, 1.0, 0.0),
        (128, 256, 3.0, 0.0),
        (384, 128, 1.0, 2.0),
        (128, 384, 4.0, 4.0),
        (256, 384, 2.5, 1.0),
        (128, 128, 8.0, 4.0),
    ],
)
def test_the_stock_pipeline_draws_the_same_pictures(
    width: int, height: int, guidance_c: float, guidance_b: float, tmp_path: Path
) -> None:
    """Through the files of a release, with two towers that have nothing in common."""
    seed = width * height + int(guidance_c)
    rng = Random(seed)
    text_b, text_c = text_config(rng), text_config(rng)
    config_a = stage_a_config(rng).model_copy(update={"levels": 2, "latent_channels": 4})
    config_b = stage_b_config(rng, text_b.width, code_channels=16).model_copy(update={"latent_channels": 4})
    config_c = stage_c_config(rng, text_c.width, latent_channels=16)
    models = Models(
        stage_a=randomised(StageA(config_a), seed),
        stage_b=randomised(StageB(config_b), seed + 1),
        stage_c=away_from_zero(randomised(StageC(config_c), seed + 2), seed),
        text_b=randomised(seeded_tower(text_b), seed + 3),
        text_c=randomised(seeded_tower(text_c), seed + 4),
    )
    texts, seeds = ["red heart", "a blue house, with three windows: isn't it?"], [3, 4]
    settings = SamplingConfig(
        width=width,
        height=height,
        steps_c=4,
        steps_b=3,
        guidance_c=guidance_c,
        guidance_b=guidance_b,
        negative="blurry",
    )
    draw = partial(generate, models, texts, seeds, settings)
    to_visible_range(models, draw)

    for name, content in release_files(
        models,
        Compressor(COMPRESSOR),
        stage_a_config=config_a,
        stage_b_config=config_b,
        stage_c_config=config_c,
        compressor_config=COMPRESSOR,
        card="",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    pipeline = AutoPipelineForText2Image.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)

    ours = draw()
    theirs = [  # one at a time: the stock decoder repeats a list of prompts once too often
        pipeline(
            text,
            negative_prompt="blurry",
            width=width,
            height=height,
            prior_num_inference_steps=4,
            num_inference_steps=3,
            prior_guidance_scale=guidance_c,
            decoder_guidance_scale=guidance_b,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]
        for text, seed in zip(texts, seeds, strict=True)
    ]
    assert ours.shape == (2, height, width, 3)
    assert ((ours > 0) & (ours < 255)).float().mean() > 0.5
    assert (ours[0].int() - ours[1].int()).abs().max() > 50
    assert (ours.float() / 255 - torch.from_numpy(np.stack(theirs))).abs().max() <= 1.01 / 255
