"""How many parameters each model has, in closed form, and the blocks that it is made of. Imports no torch: `plan` stays
quick. The tests compare the counts with the models'.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from stages.settings.models import (
    CODE_STRIDE,
    BaselineConfig,
    CompressorConfig,
    EfficientNetStage,
    EfficientNetStages,
    PreviewerConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
    TextConfig,
)

TEXT_VOCABULARY = 49408  # tokens of CLIP


def _stages(*rows: tuple[str, int, int, int, int]) -> tuple[EfficientNetStage, ...]:
    names = ("block", "expand", "stride", "channels", "layers")
    return tuple(EfficientNetStage.model_validate(dict(zip(names, row, strict=True))) for row in rows)


EFFICIENTNETS = {  # arXiv 2104.00298, Table 4 and its larger forms, as in torchvision
    "efficientnet_v2_s": EfficientNetStages(
        stem=24,
        stages=_stages(
            ("fused", 1, 1, 24, 2),
            ("fused", 4, 2, 48, 4),
            ("fused", 4, 2, 64, 4),
            ("mb", 4, 2, 128, 6),
            ("mb", 6, 1, 160, 9),
            ("mb", 6, 2, 256, 15),
        ),
        last=1280,
    ),
    "efficientnet_v2_l": EfficientNetStages(
        stem=32,
        stages=_stages(
            ("fused", 1, 1, 32, 4),
            ("fused", 4, 2, 64, 7),
            ("fused", 4, 2, 96, 7),
            ("mb", 4, 2, 192, 10),
            ("mb", 6, 1, 224, 19),
            ("mb", 6, 2, 384, 25),
            ("mb", 6, 1, 640, 7),
        ),
        last=1280,
    ),
}


def stage_a(config: StageAConfig) -> int:
    """Parameters of `StageA`."""
    widths, latents = widths_a(config), config.latent_channels
    mixing = [8 * width**2 + 15 * width + 6 for width in widths]  # 3x3 depthwise, two linears, six scalars
    resampling = sum(2 * 16 * outer * inner + outer + inner for outer, inner in pairwise(widths))
    borders = 2 * 12 * widths[0] + widths[0] + 12 + 2 * latents * widths[-1] + 2 * latents + widths[-1]
    codebook = config.codebook_size * latents
    return 2 * sum(mixing[:-1]) + (1 + config.bottleneck_blocks) * mixing[-1] + resampling + borders + codebook


def stage_b(config: StageBConfig) -> int:
    """Parameters of `StageB`."""
    first, pixels = config.widths[0], config.latent_channels * config.patch**2
    text = _linear(config.text_width, config.cond_width)
    maps = 2 * sum(config.inject_code) * _linear(config.code_channels, config.cond_width)
    resampling = sum(8 * outer * inner + outer + inner for outer, inner in pairwise(config.widths))
    blocks = sum(
        _block_parameters(block.kind, block.width, extra, config.cond_width, config.timestep_channels)
        for block in blocks_b(config)
        for extra in [block.skip + config.cond_width * block.code]
    )
    return text + maps + _linear(pixels, first) + resampling + blocks + _linear(first, 2 * pixels)


def stage_c(config: StageCConfig) -> int:
    """Parameters of `StageC`."""
    width, latents = config.width, config.latent_channels
    block = sum(_block_parameters(kind, width, 0, width, config.timestep_channels) for kind in "CTA")
    text = _linear(config.text_width, width) + _linear(width, width)
    return _linear(latents, width) + text + config.depth * block + _linear(width, 2 * latents)


def compressor(config: CompressorConfig) -> int:
    """Parameters of `Compressor`; gamma and beta of a `fixed` BatchNorm are among them."""
    layers = convolutions(stages_of(config), 1)
    backbone = sum(layer.weights + 2 * layer.outputs * layer.norm for layer in layers)
    norm = 0 if config.batch_norm == "plain" else 2 * config.latent_channels
    return backbone + stages_of(config).last * config.latent_channels + norm


def compressor_products(config: CompressorConfig, side: int) -> int:
    """Multiplications of `Compressor` for what its backbone sees, of `side` px."""
    table = stages_of(config)
    last = table.last * config.latent_channels * (side // CODE_STRIDE) ** 2
    return sum(layer.products for layer in convolutions(table, side)) + last


def text(config: TextConfig) -> int:
    """Parameters of `TextTower`."""
    width = config.width
    layer = 4 * _linear(width, width) + _linear(width, 4 * width) + _linear(4 * width, width) + 4 * width
    return (TEXT_VOCABULARY + config.context_length) * width + config.layers * layer + 2 * width


def previewer(config: PreviewerConfig) -> int:
    """Parameters of `Previewer`, BatchNorm's included."""
    layers = list(layers_of_previewer(config))
    norms = sum(2 * layer.outputs for layer in layers[:-1])
    return sum(layer.kernel**2 * layer.inputs * layer.outputs + layer.outputs for layer in layers) + norms


def baseline(config: BaselineConfig) -> int:
    """Parameters of `Baseline`."""
    first, channels = config.widths[0], config.latent_channels * config.patch**2
    embedded = 4 * first
    resampling = sum(2 * _convolution(width, width) for width in config.widths) - _convolution(first, first)
    resampling -= _convolution(
        config.widths[-1], config.widths[-1]
    )  # none after the last on the way down, nor first up
    blocks = sum(
        _transformer(block.width, config.text_width, block.depth)
        if block.depth
        else _residual(block.inputs, block.width, embedded)
        for block in blocks_of_baseline(config)
    )
    ends = _convolution(channels, first) + 2 * first + _convolution(first, channels)
    return ends + _linear(first, embedded) + _linear(embedded, embedded) + blocks + resampling


def discriminator() -> int:
    """Parameters of `Discriminator` with the released sizes."""
    return sum(_convolution(*pair) for pair in pairwise((3, *DISCRIMINATOR))) + _linear(DISCRIMINATOR[-1], 1)


def vgg16() -> int:
    """Parameters of VGG16's convolutions."""
    channels = [3] + [width for width, layers in VGG16 for _ in range(layers)]
    return sum(_convolution(*pair) for pair in pairwise(channels))


def _residual(inputs: int, width: int, embedded: int) -> int:
    """Of the baseline's: two norms, two convolutions, the timestep's map, and, where channels change, the shortcut."""
    shortcut = _linear(inputs, width) if inputs != width else 0
    convolutions = _convolution(inputs, width) + _convolution(width, width)
    return 2 * inputs + 2 * width + convolutions + _linear(embedded, width) + shortcut


def _transformer(width: int, text_width: int, depth: int) -> int:
    """Of the baseline's: a norm and two linears around `depth` blocks of two attentions, an MLP, and three norms."""
    attention = 3 * width**2 + _linear(width, width)
    to_text = width**2 + 2 * text_width * width + _linear(width, width)
    mlp = _linear(width, 8 * width) + _linear(4 * width, width)
    return 2 * width + 2 * _linear(width, width) + depth * (attention + to_text + mlp + 6 * width)


def _convolution(inputs: int, outputs: int) -> int:
    """Of a 3x3 one."""
    return 9 * inputs * outputs + outputs


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _block_parameters(kind: str, width: int, extra: int, cond: int, timestep: int) -> int:
    """Of a convolution block that also sees `extra` channels, a timestep block, an attention block."""
    match kind:
        case "C":  # 3x3 depthwise, linear, global response norm, linear
            return 10 * width + _linear(width + extra, 4 * width) + 8 * width + _linear(4 * width, width)
        case "T":
            return _linear(timestep, 2 * width)
        case _:  # query, key, value; output; map of the text
            return 3 * _linear(width, width) + _linear(width, width) + _linear(cond, width)


# --------------------------------------------------------------------------------------------------- shapes

DISCRIMINATOR = (64, 128, 256, 512, 512, 512)  # channels of its convolutions, each of which halves the side
VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions; half the side after each stack


@dataclass(frozen=True)
class Block:
    """A block of Stage B: kind (C, T, A), level, channels, further ones from the way down, whether it sees code."""

    kind: str
    level: int
    width: int
    skip: int
    code: bool


def blocks_b(config: StageBConfig) -> Iterator[Block]:
    """Every block of `StageB`, down and up."""
    deepest = len(config.widths) - 1
    for level, width in enumerate(config.widths):
        pattern = config.patterns[level] * config.blocks[level]
        for way in ("down", "up"):
            for place, kind in enumerate(pattern):
                skip = width if way == "up" and place == 0 and level < deepest else 0
                yield Block(kind, level, width, skip, kind == "C" and config.inject_code[level])


@dataclass(frozen=True)
class Convolution:
    """A convolution of an EfficientNet: weights, output channels, whether BatchNorm follows, numbers kept, products."""

    weights: int
    outputs: int
    norm: bool
    kept: int
    products: int


def convolutions(table: EfficientNetStages, side: int) -> Iterator[Convolution]:
    """Every convolution of torchvision's EfficientNetV2, for a picture of `side` px.

    Kept are its input, what BatchNorm sees, and, where one follows, what SiLU sees.
    """

    def layer(
        kernel: int, inputs: int, outputs: int, before: int, after: int, active: bool, groups: int = 1
    ) -> Convolution:
        kept = inputs * before**2 + outputs * after**2 * (1 + active)
        weights = kernel**2 * inputs * outputs // groups
        return Convolution(weights, outputs, True, kept, weights * after**2)

    channels, half = table.stem, -(-side // 2)
    yield layer(3, 3, channels, side, half, True)
    side = half
    for stage in table.stages:
        for number in range(stage.layers):
            after = -(-side // stage.stride) if number == 0 else side
            wide = channels * stage.expand
            if stage.block == "fused":
                yield layer(3, channels, wide if stage.expand > 1 else stage.channels, side, after, True)
            else:
                if stage.expand > 1:
                    yield layer(1, channels, wide, side, side, True)
                yield layer(3, wide, wide, side, after, True, groups=wide)
                squeezed = max(1, channels // 4)
                products = 2 * wide * squeezed
                yield Convolution(products + wide + squeezed, 0, False, wide * after**2, products)
            if stage.block == "mb" or stage.expand > 1:
                yield layer(1, wide, stage.channels, after, after, False)
            channels, side = stage.channels, after
    yield layer(1, channels, table.last, side, side, True)


def stages_of(config: CompressorConfig) -> EfficientNetStages:
    return EFFICIENTNETS[config.backbone] if isinstance(config.backbone, str) else config.backbone


def widths_a(config: StageAConfig) -> list[int]:
    """Channels of Stage A's levels, from the pixels down."""
    return [config.hidden >> level for level in reversed(range(config.levels))]


@dataclass(frozen=True)
class BaselineBlock:
    """A block of the baseline: level and channels; channels that enter a residual block, or a transformer's depth."""

    level: int
    width: int
    inputs: int = 0
    depth: int = 0


def blocks_of_baseline(config: BaselineConfig) -> Iterator[BaselineBlock]:
    """Every residual block and every transformer of `Baseline`, in the order in which they are passed."""
    last, skips = len(config.widths) - 1, [config.widths[0]]  # channels of the maps that the way up takes over

    def level_of(level: int, inputs: list[int]) -> Iterator[BaselineBlock]:
        for each in inputs:
            yield BaselineBlock(level, config.widths[level], inputs=each)
            if config.heads[level]:
                yield BaselineBlock(level, config.widths[level], depth=1)

    for level, width in enumerate(config.widths):
        yield from level_of(level, [skips[-1]] + [width] * (config.blocks - 1))
        skips += [width] * (config.blocks + (level < last))
    width = config.widths[last]
    yield BaselineBlock(last, width, inputs=width)
    yield BaselineBlock(last, width, depth=config.middle_depth)
    yield BaselineBlock(last, width, inputs=width)
    for level in reversed(range(last + 1)):
        yield from level_of(level, [each + skips.pop() for each in (width, *[config.widths[level]] * config.blocks)])
        width = config.widths[level]


@dataclass(frozen=True)
class PreviewerLayer:
    """A convolution of the previewer: its kernel's side, channels, and the picture's side over the code's."""

    kernel: int
    inputs: int
    outputs: int
    scale: int


def layers_of_previewer(config: PreviewerConfig) -> Iterator[PreviewerLayer]:
    """Every convolution of `Previewer`; GELU and BatchNorm follow all but the last."""
    inner, middle, outer = config.width, config.width // 2, config.width // 4
    yield PreviewerLayer(1, config.latent_channels, inner, 1)
    yield PreviewerLayer(3, inner, inner, 1)
    for scale, inputs, outputs in ((2, inner, middle), (4, middle, outer), (8, outer, outer)):
        yield PreviewerLayer(2, inputs, outputs, scale)
        yield PreviewerLayer(3, outputs, outputs, scale)
    yield PreviewerLayer(1, outer, 3, 8)
