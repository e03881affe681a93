"""Counts of parameters against the golden ones, and against the models themselves on the meta device."""

import pytest
import torch
from torch import nn

from stages.anatomy import parameters
from stages.models.baseline import Baseline
from stages.models.compressor import Compressor
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.models.text import seeded_tower
from stages.settings.models import (
    BaselineConfig,
    CompressorConfig,
    PreviewerConfig,
    SeededTextConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)

SHORT = {  # an EfficientNetV2 with every kind of block
    "stem": 8,
    "stages": [
        {"block": "fused", "expand": 1, "stride": 2, "channels": 16, "layers": 2},
        {"block": "fused", "expand": 4, "stride": 2, "channels": 24, "layers": 2},
        {"block": "mb", "expand": 4, "stride": 2, "channels": 32, "layers": 3},
        {"block": "mb", "expand": 1, "stride": 2, "channels": 40, "layers": 2},
    ],
    "last": 64,
}
B = StageBConfig(
    patch=1,
    widths=(32, 64, 64),
    blocks=(1, 2, 3),
    patterns=("CT", "CTA", "CTA"),
    heads=(0, 4, 4),
    inject_code=(False, True, True),
    cond_width=48,
    text_width=40,
    timestep_channels=8,
    code_channels=5,
)
FLAT_B = {"widths": (16,), "blocks": (2,), "patterns": ("CCTA",), "heads": (2,), "inject_code": (True,)}
BASELINE = BaselineConfig(widths=(32, 64, 96), heads=(2, 4, 0), middle_heads=4, middle_depth=3, groups=8, text_width=40)
FLAT_BASELINE = BaselineConfig(widths=(8,), heads=(2,), patch=1, blocks=1, middle_heads=2, groups=4)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("estimated", "golden"),
    [
        (parameters.stage_a(StageAConfig()), 18_406_894),
        (parameters.stage_b(StageBConfig()), 1_055_365_280),
        (parameters.stage_c(StageCConfig()), 993_243_680),
        (parameters.stage_c(StageCConfig(text_width=1280)), 993_636_896),
        (parameters.compressor(CompressorConfig()), 20_198_000),
        (parameters.previewer(PreviewerConfig()), 3_979_651),
        (parameters.baseline(BaselineConfig()), 994_517_456),
        (parameters.discriminator(), 6_271_105),
    ],
)
def test_full_sizes_have_the_golden_counts(estimated, golden):
    assert estimated == golden


def test_parameters_of_the_text_tower():
    config = SeededTextConfig(width=24, layers=3, heads=2, context_length=9)
    assert parameters.text(config) == count(seeded_tower(config))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_parameters_of_stage_a(levels):
    config = StageAConfig(levels=levels, hidden=32, bottleneck_blocks=2, latent_channels=3, codebook_size=11)
    with torch.device("meta"):
        assert parameters.stage_a(config) == count(StageA(config))


@pytest.mark.parametrize("config", [B, B.model_copy(update=FLAT_B)], ids=["levels", "flat"])
def test_parameters_of_stage_b(config):
    with torch.device("meta"):
        assert parameters.stage_b(config) == count(StageB(config))


def test_parameters_of_stage_c():
    config = StageCConfig(width=24, depth=3, heads=3, text_width=7, latent_channels=5, timestep_channels=6)
    with torch.device("meta"):
        assert parameters.stage_c(config) == count(StageC(config))


@pytest.mark.parametrize("config", [BASELINE, FLAT_BASELINE], ids=["levels", "flat"])
def test_parameters_of_the_baseline(config):
    with torch.device("meta"):
        assert parameters.baseline(config) == count(Baseline(config))


@pytest.mark.parametrize("norm", ["affine", "plain", "fixed"])
@pytest.mark.parametrize("backbone", ["efficientnet_v2_s", "efficientnet_v2_l", SHORT])
def test_parameters_of_the_compressor(backbone, norm):
    config = CompressorConfig.model_validate({"backbone": backbone, "batch_norm": norm})
    with torch.device("meta"):
        assert parameters.compressor(config) == count(Compressor(config))
