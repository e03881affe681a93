"""EfficientNetV2, the compressor's backbone, convolution by convolution, as in torchvision."""

from collections.abc import Iterator

from stages.anatomy.blocks import Block, Features, activation, batch_norm, convolution, in_fp32, linear
from stages.settings.models import EfficientNetStage, EfficientNetStages


def _table(stem: int, *rows: tuple[str, int, int, int, int]) -> EfficientNetStages:
    names = ("block", "expand", "stride", "channels", "layers")
    stages = [dict(zip(names, row, strict=True)) for row in rows]
    return EfficientNetStages.model_validate({"stem": stem, "stages": stages, "last": 1280})


EFFICIENTNETS = {  # arXiv 2104.00298, Table 4 and its larger forms
    "efficientnet_v2_s": _table(
        24,
        ("fused", 1, 1, 24, 2),
        ("fused", 4, 2, 48, 4),
        ("fused", 4, 2, 64, 4),
        ("mb", 4, 2, 128, 6),
        ("mb", 6, 1, 160, 9),
        ("mb", 6, 2, 256, 15),
    ),
    "efficientnet_v2_l": _table(
        32,
        ("fused", 1, 1, 32, 4),
        ("fused", 4, 2, 64, 7),
        ("fused", 4, 2, 96, 7),
        ("mb", 4, 2, 192, 10),
        ("mb", 6, 1, 224, 19),
        ("mb", 6, 2, 384, 25),
        ("mb", 6, 1, 640, 7),
    ),
}


def efficientnet(table: EfficientNetStages, side: int = 0) -> Iterator[Block]:
    """Its convolutions for a picture of side x side px, always in fp32."""
    picture, side = Features(side**2, 3), -(-side // 2)
    x = Features(side**2, table.stem)
    yield _normed(picture, x, 3)
    for stage in table.stages:
        for number in range(stage.layers):
            side = -(-side // stage.stride) if number == 0 else side
            y = Features(side**2, stage.channels)
            yield from _mbconv(stage, x, y)
            x = y
    yield _normed(x, x.of(table.last), 1)


def _mbconv(stage: EfficientNetStage, x: Features, y: Features) -> Iterator[Block]:
    """A Fused-MBConv, or an MBConv with its squeeze and excitation."""
    wide, squeezed = x.channels * stage.expand, max(1, x.channels // 4)
    if stage.block == "fused" and stage.expand == 1:
        yield _normed(x, y, 3)
        return
    if stage.block == "fused":
        yield _normed(x, y.of(wide), 3)
    else:
        if stage.expand > 1:
            yield _normed(x, x.of(wide), 1)
        yield _normed(x.of(wide), y.of(wide), 3, groups=wide)
        squeeze, excite = linear(Features(1, wide), squeezed), linear(Features(1, squeezed), wide)
        yield in_fp32(squeeze.keeping(0), excite.keeping(y.positions * wide))
    yield _normed(y.of(wide), y, 1, active=False)


def _normed(x: Features, y: Features, kernel: int, groups: int = 1, active: bool = True) -> Block:
    """A convolution, BatchNorm and, where `active`, SiLU."""
    return in_fp32(convolution(x, y, kernel, groups, bias=False), batch_norm(y), *[activation(y)] * active)
