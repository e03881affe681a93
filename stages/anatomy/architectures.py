"""Every network as the blocks that a sample passes, in that order.

Sizes are those of what goes in: px of a picture, positions of latents and codes, tokens of a text. Without them a
network still has its parameters. What goes in is given, not kept: pictures, latents, codes, timesteps.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from stages.anatomy.blocks import (
    Block,
    Features,
    activation,
    attention,
    batch_norm,
    block_a,
    block_c,
    block_t,
    convolution,
    in_fp32,
    joined,
    linear,
    mixing,
    norm,
    norm_before_product,
    residual,
    transformer,
)
from stages.anatomy.efficientnet import EFFICIENTNETS, efficientnet
from stages.settings.models import (
    CODE_STRIDE,
    BaselineConfig,
    CompressorConfig,
    PreviewerConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)

TEXT_VOCABULARY = 49408  # tokens of CLIP
DISCRIMINATOR = (64, 128, 256, 512, 512, 512)  # channels of its convolutions, each of which halves the side
VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions; half the side after each stack


def encoder_a(config: StageAConfig, height: int = 0, width: int = 0) -> Iterator[Block]:
    """Stage A's way from a picture to its latents."""
    levels = levels_a(config, height, width)
    yield linear(levels[0].of(3 * 2**2), levels[0].channels).keeping(0)
    yield mixing(levels[0])
    for x, y in pairwise(levels):
        yield convolution(x, y, 4)
        yield mixing(y)
    yield linear(levels[-1], config.latent_channels, bias=False)
    yield batch_norm(Features(0, config.latent_channels))


def decoder_a(config: StageAConfig, height: int = 0, width: int = 0) -> Iterator[Block]:
    """Stage A's way back to a picture of height x width px."""
    levels = levels_a(config, height, width)[::-1]
    yield linear(levels[0].of(config.latent_channels), levels[0].channels).keeping(0)
    yield from config.bottleneck_blocks * [mixing(levels[0])]
    for x, y in pairwise(levels):
        yield convolution(x, y, 4)
        yield mixing(y)
    yield linear(levels[-1], 3 * 2**2)


def stage_a(config: StageAConfig, height: int = 0, width: int = 0) -> Iterator[Block]:
    """Both ways, and between them the codebook."""
    yield from encoder_a(config, height, width)
    yield Block(config.codebook_size * config.latent_channels)
    yield from decoder_a(config, height, width)


def levels_a(config: StageAConfig, height: int, width: int) -> list[Features]:
    """Stage A's levels, from the pixels down."""
    channels = [config.hidden >> level for level in reversed(range(config.levels))]
    return _levels(height // 2, width // 2, channels)


def discriminator(side: int = 0, pictures: int = 1) -> Iterator[Block]:
    """Stage A's first judge with the released sizes, on so many square pictures; always in fp32."""
    x = Features(pictures * side**2, 3)
    for number, channels in enumerate(DISCRIMINATOR):
        side = -(-side // 2)
        y = Features(pictures * side**2, channels)
        yield in_fp32(convolution(x, y), *[activation(y)] * (2 if number else 1))  # InstanceNorm, not first; LeakyReLU
        x = y
    yield in_fp32(linear(x, 1))


def vgg16(side: int = 0) -> Iterator[Block]:
    """Stage A's second judge, VGG16's convolutions, on a square picture; not trained."""
    x = Features(side**2, 3)
    for stack, (channels, layers) in enumerate(VGG16):
        if stack:
            side //= 2
            x = Features(side**2, x.channels)
            yield Block(kept=x.numbers, kept_bytes=8 * x.numbers)  # pooling: what is left, and the maxima's places
        for _ in range(layers):
            y = x.of(channels)
            yield convolution(x, y).keeping(y.numbers)  # what comes out: ReLU works in place
            x = y
        # In fp32, the features' difference, and under autocast they themselves: a number as large as two of half.
        yield Block(kept_fp32=x.numbers, kept_copies=2 * x.numbers)


def stage_b(config: StageBConfig, height: int = 0, width: int = 0, tokens: int = 0) -> Iterator[Block]:
    """Stage B on latents of height x width with `tokens` text positions, 0 for none; the mapped text is given too."""
    pixels, text = config.latent_channels * config.patch**2, Features(tokens, config.text_width)
    levels = _levels(height // config.patch, width // config.patch, config.widths)
    yield linear(text, config.cond_width).keeping(0)
    yield linear(levels[0].of(pixels), levels[0].channels).keeping(0)
    yield norm(levels[0])
    for level, x in enumerate(levels):
        if level:
            yield from (norm_before_product(levels[level - 1]), convolution(levels[level - 1], x, 2))
        yield from _level_b(config, level, x, tokens)
    for level, x in reversed([*enumerate(levels)]):
        yield from _level_b(config, level, x, tokens, skip=x.channels if level < len(levels) - 1 else 0)
        if level:
            yield from (norm_before_product(x), convolution(x, levels[level - 1], 2))
    yield in_fp32(norm(levels[0]), linear(levels[0], 2 * pixels))


def _level_b(config: StageBConfig, level: int, x: Features, tokens: int, skip: int = 0) -> Iterator[Block]:
    """A level on the way down, or on the way up, where its first block sees `skip` further channels."""
    code, mapped = (config.code_channels, config.cond_width) if config.inject_code[level] else (0, 0)
    kinds = {
        "C": block_c(x, 0, code, mapped),
        "T": block_t(x, config.timestep_channels),
        "A": block_a(x, Features(tokens, config.cond_width)),
    }
    yield linear(x.of(code), mapped).keeping(0)
    yield block_c(x, skip, code, mapped)  # every pattern begins with one
    for kind in (config.patterns[level] * config.blocks[level])[1:]:
        yield kinds[kind]


def compressor(config: CompressorConfig, side: int = 0) -> Iterator[Block]:
    """The compressor on a picture whose resized form, which its backbone sees, has `side` px; always in fp32."""
    table = EFFICIENTNETS[config.backbone] if isinstance(config.backbone, str) else config.backbone
    yield from efficientnet(table, side)
    yield linear(Features((side // CODE_STRIDE) ** 2, table.last), config.latent_channels, bias=False).keeping(0)
    if config.batch_norm != "plain":
        yield batch_norm(Features(0, config.latent_channels))


def warm_up_decoder(width: int, code_channels: int, latent_channels: int, side: int = 0) -> Iterator[Block]:
    """The throwaway decoder of the compressor's warm-up, on codes spread over `side` x `side` positions."""
    levels = [Features((side << level) ** 2, each) for level, each in enumerate((width, width * 2 // 3, width // 3))]
    yield joined(convolution(levels[0].of(code_channels), levels[0]), activation(levels[0]))
    for x, y in pairwise(levels):
        yield joined(convolution(x, y, 4), activation(y))
    yield convolution(levels[-1], levels[-1].of(4 * latent_channels))


def text(layers: int, width: int, tokens: int) -> Iterator[Block]:
    """A CLIP text tower, never trained."""
    x = Features(tokens, width)
    layer = joined(
        norm(x, affine=True),
        linear(x, 3 * width),
        attention(x, tokens),
        linear(x, width),
        norm(x, affine=True),
        linear(x, 4 * width),
        activation(x.of(4 * width)),
        linear(x.of(4 * width), width),
    )
    yield Block((TEXT_VOCABULARY + tokens) * width)  # embeddings of words and places
    yield from layers * [layer]
    yield norm(x, affine=True)


def stage_c(config: StageCConfig, height: int = 0, width: int = 0, tokens: int = 0) -> Iterator[Block]:
    """Stage C on codes of height x width with `tokens` text positions."""
    x, text = Features(height * width, config.width), Features(tokens, config.width)
    yield joined(linear(text.of(config.text_width), text.channels), activation(text), linear(text, text.channels))
    yield linear(x.of(config.latent_channels), x.channels).keeping(0)
    yield from config.depth * [block_c(x), block_t(x, config.timestep_channels), block_a(x, text)]
    yield in_fp32(norm(x), linear(x, 2 * config.latent_channels))


def previewer(config: PreviewerConfig, height: int = 0, width: int = 0) -> Iterator[Block]:
    """The previewer on codes of height x width, and what the loss keeps of its picture."""
    channels = (config.width, config.width // 2, config.width // 4, config.width // 4)
    levels = [Features(height * width * 4**level, each) for level, each in enumerate(channels)]
    yield linear(levels[0].of(config.latent_channels), config.width).keeping(0)
    for level, y in enumerate(levels):
        if level:
            yield convolution(levels[level - 1], y, 2)
        yield from (activation(y), batch_norm(y))
        yield convolution(y, y)
        yield from (activation(y), batch_norm(y))
    yield linear(levels[-1], 3)
    yield Block(kept_fp32=levels[-1].of(3).numbers)


def baseline(config: BaselineConfig, height: int = 0, width: int = 0, tokens: int = 0) -> Iterator[Block]:
    """The baseline on latents of height x width with `tokens` text positions."""
    pixels, text = config.latent_channels * config.patch**2, Features(tokens, config.text_width)
    levels = _levels(height // config.patch, width // config.patch, config.widths)
    first, last, timestep = levels[0], len(levels) - 1, 4 * config.widths[0]
    depths = [int(heads > 0) for heads in config.heads]

    def blocks(level: int, inputs: list[int], depth: int) -> Iterator[Block]:
        x = levels[level]
        for channels in inputs:
            yield residual(x.of(channels), x.channels, timestep)
            if depth:
                yield transformer(x, text, depth)

    yield joined(linear(Features(1, first.channels), timestep), linear(Features(1, timestep), timestep)).keeping(0)
    yield convolution(first.of(pixels), first).keeping(0)
    skips = [first.channels]  # channels of the maps that the way up takes over
    for level, x in enumerate(levels):
        yield from blocks(level, [skips[-1]] + [x.channels] * (config.blocks - 1), depths[level])
        skips += [x.channels] * (config.blocks + (level < last))
        if level < last:
            yield convolution(x, levels[level + 1].of(x.channels))
    below = levels[last].channels
    yield from blocks(last, [below], config.middle_depth)
    yield from blocks(last, [below], 0)
    for level, x in reversed([*enumerate(levels)]):
        yield from blocks(level, [each + skips.pop() for each in (below, *[x.channels] * config.blocks)], depths[level])
        below = x.channels
        if level:
            grown = levels[level - 1].of(below)
            yield convolution(grown, grown)
    yield in_fp32(norm(first, affine=True), activation(first), convolution(first, first.of(pixels)))


def _levels(height: int, width: int, channels: Sequence[int]) -> list[Features]:
    """The first level, and those after it, each with half the sides."""
    return [Features((height >> level) * (width >> level), each) for level, each in enumerate(channels)]
