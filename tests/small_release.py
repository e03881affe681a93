"""All models of a release, small and random: themselves, their release as files, and pictures to begin with.

A test file has the fixtures by their names: `models, written = small_release.models, small_release.written`.
"""

from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

from stages.models.compressor import Compressor
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.models.text import seeded_tower
from stages.sampling import sample
from stages.settings.models import (
    CompressorConfig,
    EfficientNetStages,
    SeededTextConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)
from stages.settings.sampling import SamplingConfig
from stages.weights import release

M = TypeVar("M", bound=nn.Module)
STAGE_A = StageAConfig(bottleneck_blocks=1, hidden=16, codebook_size=16, scale=0.7)
STAGE_B = StageBConfig(
    widths=(8, 16),
    blocks=(1, 1),
    patterns=("CT", "CTA"),
    heads=(0, 2),
    inject_code=(False, True),
    cond_width=24,
    text_width=20,
    timestep_channels=16,
)
STAGE_C = StageCConfig(width=32, depth=2, heads=4, text_width=24, timestep_channels=32)
BLOCKS = [{"block": "fused", "expand": 2, "stride": 2, "channels": 8, "layers": 1}] * 4
BACKBONE = EfficientNetStages.model_validate({"stem": 8, "stages": BLOCKS, "last": 16})
COMPRESSOR = CompressorConfig(backbone=BACKBONE, batch_norm="fixed")
TEXT_B = SeededTextConfig(width=20, layers=2, heads=2, context_length=12, seed=1)
TEXT_C = SeededTextConfig(width=24, layers=1, heads=3, context_length=16, seed=2)
SETTINGS = SamplingConfig(width=256, height=256, steps_c=3, steps_b=2, guidance_c=2.0, guidance_b=1.5)


def randomised(module: M, generator: torch.Generator, std: float) -> M:
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(std=std, generator=generator)
    return module.eval()


@pytest.fixture(scope="module")
def models() -> sample.Models:
    generator = torch.Generator().manual_seed(0)
    stage_a = randomised(StageA(STAGE_A), generator, 0.1)
    stage_c = randomised(StageC(STAGE_C), generator, 0.2)
    with torch.no_grad():
        stage_a.out_block[0].weight.mul_(0.02)  # pixels within [0, 1]
        stage_a.out_block[0].bias.add_(0.5)
        stage_c.out[1].weight.mul_(0.15)  # a divisor |1 - b| near 0 would magnify rounding
    return sample.Models(
        stage_a=stage_a,
        stage_b=randomised(StageB(STAGE_B), generator, 0.2),
        stage_c=stage_c,
        text_b=randomised(seeded_tower(TEXT_B), generator, 0.5),
        text_c=randomised(seeded_tower(TEXT_C), generator, 0.5),
        compressor=randomised(Compressor(COMPRESSOR), generator, 0.1),
        settings=SETTINGS,
    )


@pytest.fixture(scope="module")
def written(models: sample.Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models' release."""
    assert models.compressor is not None
    root = tmp_path_factory.mktemp("there") / "release"
    files = release.release_files(
        models,
        models.compressor,
        stage_a_config=STAGE_A,
        stage_b_config=STAGE_B,
        stage_c_config=STAGE_C,
        compressor_config=COMPRESSOR,
        card="",
    )
    for name, content in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def pictures(count: int, side: int = 128) -> torch.Tensor:
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return (nn.functional.interpolate(noise, (side, side), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def small(**changes: Any) -> SamplingConfig:
    """The settings at 128 x 128 px, and with other changes."""
    return SamplingConfig.model_validate(SETTINGS.model_dump() | {"width": 128, "height": 128} | changes)


def draw_one(
    models: sample.Models,
    seed: int = 0,
    *,
    image: torch.Tensor | None = None,
    strength: float | None = None,
    preview: bool = False,
    device: torch.device | None = None,
    **changes: Any,
) -> torch.Tensor:
    """One picture of a red heart, int32 (1, 3, H, W)."""
    drawn = sample.generate(
        models, ["red heart"], [seed], small(negative="blurry", **changes),
        image=image, strength=strength, preview=preview, device=device,
    )  # fmt: skip
    return drawn.int()
