"""Closed-form FLOPs against torch's counter and against the figures measured at full size."""

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import WuerstchenDiffNeXt, WuerstchenPrior
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from stages.anatomy import flops
from stages.models.baseline import Baseline
from stages.models.compressor import Compressor
from stages.models.previewer import Previewer
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.models.text import TextTower
from stages.settings.models import (
    BaselineConfig,
    CompressorConfig,
    PreviewerConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)
from stages.weights import convert

SMALL_B = StageBConfig(
    widths=(8, 16, 32, 32),
    blocks=(1, 2, 1, 3),
    patterns=("CT", "CTA", "CCTA", "CTA"),
    heads=(0, 2, 4, 4),
    inject_code=(False, True, False, True),
    cond_width=24,
    text_width=20,
)


def counted(module: nn.Module, *inputs: Tensor) -> int:
    """Forward FLOPs by torch's counter, nothing computed."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(*inputs)
    return counter.get_total_flops()


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(("side", "teraflop"), [(12, 0.303), (24, 1.154)])
def test_stage_c_at_full_size(side: int, teraflop: float) -> None:
    config = StageCConfig()
    with torch.device("meta"):
        theirs = WuerstchenPrior(**convert.arguments(config))
    closed = flops.stage_c(config, side, side, 77)
    assert closed == counted(theirs, meta(1, 16, side, side), meta(1), meta(1, 77, 1024))
    assert closed / 1e12 == pytest.approx(teraflop, abs=1e-3)


def test_stage_c_as_we_compute_it() -> None:
    config = StageCConfig(width=32, depth=3, heads=4, text_width=20)
    inputs = torch.randn(1, 16, 6, 4), torch.rand(1), torch.randn(1, 7, 20)
    assert flops.stage_c(config, 6, 4, 7) == counted(StageC(config), *inputs)


@pytest.mark.parametrize(
    ("config", "sides", "tokens"), [(SMALL_B, (32, 48), 7), (StageBConfig(), (64, 64), 77)], ids=["small", "full"]
)
def test_stage_b_of_the_plain_architecture(config: StageBConfig, sides: tuple[int, int], tokens: int) -> None:
    with torch.device("meta"):
        theirs = WuerstchenDiffNeXt(**convert.arguments(config))
    inputs = meta(1, 4, *sides), meta(1), meta(1, 16, 3, 3), meta(1, tokens, config.text_width)
    assert flops.stage_b(config, *sides, tokens) == counted(theirs, *inputs)


def test_stage_b_merges_maps_into_weights_and_does_less() -> None:
    config = SMALL_B.model_copy(update={"cond_width": 64})
    inputs = torch.randn(2, 4, 64, 64), torch.rand(2), torch.randn(2, 16, 3, 3), torch.randn(2, 7, 20)
    assert counted(StageB(config), *inputs) < 0.9 * 2 * flops.stage_b(config, 64, 64, 7)


@pytest.mark.parametrize(("side", "teraflop"), [(128, 0.642), (256, 2.858)])
def test_stage_b_at_full_size(side: int, teraflop: float) -> None:
    assert flops.stage_b(StageBConfig(), side, side, 77) / 1e12 == pytest.approx(teraflop, abs=1e-3)


@pytest.mark.parametrize("config", [StageAConfig(), StageAConfig(levels=3, hidden=64, bottleneck_blocks=2)])
def test_stage_a(config: StageAConfig) -> None:
    with torch.device("meta"):
        model = StageA(config)

    class Encoder(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return model.encode(image)

    class Decoder(nn.Module):
        def forward(self, latents: Tensor) -> Tensor:
            return model.decode(latents)

    model.eval()
    ratio = 2**config.levels
    assert flops.encode_a(config, 128, 64) == counted(Encoder(), meta(1, 3, 128, 64))
    assert flops.decode_a(config, 128, 64) == counted(Decoder(), meta(1, 4, 128 // ratio, 64 // ratio))


def test_stage_a_at_full_size() -> None:
    config = StageAConfig()
    assert flops.encode_a(config, 1024, 1024) / 1e12 == pytest.approx(0.467, abs=1e-3)
    assert flops.decode_a(config, 1024, 1024) / 1e12 == pytest.approx(2.172, abs=1e-3)


@pytest.mark.parametrize(
    ("config", "gigaflop"),
    [(CompressorConfig(), 67), (CompressorConfig(backbone="efficientnet_v2_l"), 287)],
    ids=["S", "L"],
)
def test_the_compressor_at_768_px(config: CompressorConfig, gigaflop: float) -> None:
    with torch.device("meta"):
        model = Compressor(config)
    network = nn.Sequential(model.backbone, model.mapper)
    assert flops.encode_c(config, 768) == counted(network, meta(1, 3, 768, 768))
    assert flops.encode_c(config, 768) / 1e9 == pytest.approx(gigaflop, rel=0.01)


def test_a_text_tower() -> None:
    tower = TextTower(width=32, layers=2, heads=2, context_length=9)
    with FlopCounterMode(display=False) as counter:
        tower.encode(["one caption"])
    assert flops.encode_text(2, 32, 9) == counter.get_total_flops()
    assert flops.encode_text(24, 1024, 77) / 1e9 == pytest.approx(47, rel=0.01)  # CLIP-H


@pytest.mark.parametrize("config", [PreviewerConfig(), PreviewerConfig(width=16, latent_channels=4)])
def test_the_previewer(config: PreviewerConfig) -> None:
    with torch.device("meta"):
        model = Previewer(config)
    assert flops.previewer(config, 6, 4) == counted(model, meta(1, config.latent_channels, 6, 4))


@pytest.mark.parametrize(
    "config",
    [BaselineConfig(), BaselineConfig(widths=(32, 64, 64), heads=(2, 0, 4), blocks=1, middle_heads=2, middle_depth=2)],
    ids=["full", "small"],
)
def test_the_baseline(config: BaselineConfig) -> None:
    with FakeTensorMode():  # its heads are computed under a device's autocast, which meta has none of
        inputs = torch.empty(1, 4, 64, 32), torch.empty(1), torch.empty(1, 77, 1024)
        assert flops.baseline(config, 64, 32, 77) == counted(Baseline(config), *inputs)


def test_utilisation() -> None:
    # 16 images/s of Stage C at 24x24 on an A100 (312 TFLOP/s), as the paper's 24,602 hours work out: about 18 %
    assert flops.utilisation(flops.stage_c(StageCConfig(), 24, 24, 77), 16.0, 312e12) == pytest.approx(0.1776, abs=1e-3)
