"""How much device memory a training needs, in closed form. Imports no torch: `plan` stays quick.

Weights, gradients and moments follow exactly from the parameter counts. Activations are what autograd keeps for the
backward pass, counted tensor by tensor: of each block, the inputs of its products, norms and non-linearities.
The tests hold them to within 20 % of what torch keeps on a CPU. Kernels of a GPU differ by a few per cent (attention
there stays in half precision, dropout keeps one byte an element); `RUNTIME` stands for what is not counted.

Legend: s bytes of an activation in the precision of the products (4, or 2 under autocast), B samples of one worker.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import pairwise

from stages.config import (
    CompressorConfig,
    EfficientNetStage,
    EfficientNetStages,
    Phase,
    StageAConfig,
    StageBConfig,
    StageCConfig,
    TrainingConfig,
)

GIB = 1 << 30
FP32 = 4  # bytes
RUNTIME = GIB  # CUDA's context and kernels, workspaces of its libraries, the slack of torch's allocator
LOOKUP_ROWS = 1 << 14  # positions that Stage A compares with its codebook at a time
CODE_STRIDE = 32  # px that the compressor's backbone turns into one position


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


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one worker, by what they hold."""

    weights: int
    gradients: int
    moments: int
    average: int
    activations: int
    runtime: int = RUNTIME

    @property
    def total(self) -> int:
        """All of it together."""
        return sum(getattr(self, part.name) for part in fields(self))


def train_a(config: StageAConfig, crop: int | None, train: TrainingConfig, workers: int) -> Memory:
    """Stage A, on crops of `crop` px where it is set."""
    count = stage_a_parameters(config)

    def kept(phase: Phase) -> float:
        side = crop or phase.size
        looked_up = min(LOOKUP_ROWS * workers / phase.batch_size, (side >> config.levels) ** 2)
        return _kept_a(config, side, _itemsize(train), train.checkpointing) + looked_up * config.codebook_size * FP32

    return _memory(count, count, train, workers, kept)


def train_b(
    config: StageBConfig,
    compressor: CompressorConfig,
    joint: bool,
    tokens: int,
    train: TrainingConfig,
    workers: int,
) -> Memory:
    """Stage B with captions of `tokens` tokens and the compressor, which is trained along where `joint`."""
    own, fixed = compressor_parameters(compressor), 2 * compressor.latent_channels * (compressor.batch_norm == "fixed")
    count = stage_b_parameters(config)

    def kept(phase: Phase) -> float:
        size = _itemsize(train)
        side = int(phase.size * compressor.input_ratio)
        seen = _kept_compressor(compressor, side) if joint else 0.0
        return seen + _kept_b(config, phase.size // 4 // config.patch, tokens, size, train.checkpointing)

    return _memory(count + own, count + (own - fixed if joint else 0), train, workers, kept)


def warm_up(config: CompressorConfig, width: int, latent_channels: int, train: TrainingConfig, workers: int) -> Memory:
    """The compressor's warm-up, with a throwaway decoder of `width` channels."""
    sides = (width, width * 2 // 3, width // 3)  # channels at a 32nd, a 16th and an 8th of the picture's side
    decoder = 9 * config.latent_channels * width + 36 * latent_channels * sides[2] + 4 * latent_channels
    decoder += sum(16 * outer * inner for outer, inner in pairwise(sides)) + sum(sides)
    count, fixed = compressor_parameters(config) + decoder, 2 * config.latent_channels * (config.batch_norm == "fixed")

    def kept(phase: Phase) -> float:
        first = (phase.size // 32) ** 2
        numbers = first * config.latent_channels + sum(2 * first * 4**level * side for level, side in enumerate(sides))
        return _kept_compressor(config, int(phase.size * config.input_ratio)) + numbers * _itemsize(train)

    return _memory(count, count - fixed, train, workers, kept)


def train_c(
    config: StageCConfig, compressor: CompressorConfig, tokens: int, train: TrainingConfig, workers: int
) -> Memory:
    """Stage C on the compressor's codes, with captions of `tokens` tokens."""
    count = stage_c_parameters(config)

    def kept(phase: Phase) -> float:
        side = int(phase.size * compressor.input_ratio) // CODE_STRIDE
        return _kept_c(config, side * side, tokens, _itemsize(train), train.checkpointing)

    return _memory(count, count, train, workers, kept)


def _memory(
    parameters: int, trained: int, train: TrainingConfig, workers: int, kept: Callable[[Phase], float]
) -> Memory:
    """AdamW in fp32 (two moments a weight), and the largest phase's activations; `kept` gives a sample's bytes.

    Under autocast the backward pass needs the weights in half precision too. The moving average, where it lies beside
    the model, is a copy of all weights.
    """
    half = 2 * parameters if train.precision == "bf16" else 0
    beside = train.ema is not None and train.ema.device == "model"
    return Memory(
        weights=FP32 * parameters + half,
        gradients=FP32 * trained,
        moments=2 * FP32 * trained,
        average=FP32 * parameters if beside else 0,
        activations=max(int(phase.batch_size // workers * kept(phase)) for phase in train.phases),
    )


def _itemsize(train: TrainingConfig) -> int:
    return 2 if train.precision == "bf16" else FP32


# ------------------------------------------------------------------------------------------------ parameters


def stage_a_parameters(config: StageAConfig) -> int:
    """Parameters of `StageA`."""
    widths, latents = _widths_a(config), config.latent_channels
    mixing = [8 * width**2 + 15 * width + 6 for width in widths]  # 3x3 depthwise, two linears, six scalars
    resampling = sum(2 * 16 * outer * inner + outer + inner for outer, inner in pairwise(widths))
    borders = 2 * 12 * widths[0] + widths[0] + 12 + 2 * latents * widths[-1] + 2 * latents + widths[-1]
    codebook = config.codebook_size * latents
    return 2 * sum(mixing[:-1]) + (1 + config.bottleneck_blocks) * mixing[-1] + resampling + borders + codebook


def stage_b_parameters(config: StageBConfig) -> int:
    """Parameters of `StageB`."""
    first, pixels = config.widths[0], config.latent_channels * config.patch**2
    text = _linear(config.text_width, config.cond_width)
    maps = 2 * sum(config.inject_code) * _linear(config.code_channels, config.cond_width)
    resampling = sum(8 * outer * inner + outer + inner for outer, inner in pairwise(config.widths))
    blocks = sum(
        _block_parameters(block.kind, block.width, extra, config.cond_width, config.timestep_channels)
        for block in _blocks_b(config)
        for extra in [block.skip + config.cond_width * block.code]
    )
    return text + maps + _linear(pixels, first) + resampling + blocks + _linear(first, 2 * pixels)


def stage_c_parameters(config: StageCConfig) -> int:
    """Parameters of `StageC`."""
    width, latents = config.width, config.latent_channels
    block = sum(_block_parameters(kind, width, 0, width, config.timestep_channels) for kind in "CTA")
    text = _linear(config.text_width, width) + _linear(width, width)
    return _linear(latents, width) + text + config.depth * block + _linear(width, 2 * latents)


def compressor_parameters(config: CompressorConfig) -> int:
    """Parameters of `Compressor`; gamma and beta of a `fixed` BatchNorm are among them."""
    layers = _convolutions(_stages_of(config), 1)
    backbone = sum(layer.weights + 2 * layer.outputs * layer.norm for layer in layers)
    norm = 0 if config.batch_norm == "plain" else 2 * config.latent_channels
    return backbone + _stages_of(config).last * config.latent_channels + norm


def compressor_products(config: CompressorConfig, side: int) -> int:
    """Multiplications of `Compressor` for what its backbone sees, of `side` px."""
    table = _stages_of(config)
    last = table.last * config.latent_channels * (side // CODE_STRIDE) ** 2
    return sum(layer.products for layer in _convolutions(table, side)) + last


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


# ----------------------------------------------------------------------------------------------- activations


def _kept_a(config: StageAConfig, side: int, size: int, checkpointing: bool) -> float:
    """Bytes that Stage A keeps of a picture of `side` px."""
    total = largest = 0.0
    for level, width in enumerate(_widths_a(config)):
        numbers = (side >> (1 + level)) ** 2 * width
        blocks = 2 if level < config.levels - 1 else 1 + config.bottleneck_blocks
        kept = numbers * (5 * FP32 + 12 * size)  # five of its two norms, twelve of its products
        if checkpointing:
            largest, kept = max(largest, kept), numbers * size
        total += blocks * kept + 2 * numbers * size  # and resampling, or the borders
    return total + largest


def _kept_b(config: StageBConfig, side: int, tokens: int, size: int, checkpointing: bool) -> float:
    """Bytes that Stage B keeps of a sample whose first level has `side` positions a side."""
    total = largest = 0.0
    for block in _blocks_b(config):
        positions = (side >> block.level) ** 2
        extra = block.skip + config.code_channels * block.code
        kept = _kept_block(block.kind, positions, block.width, extra, tokens, config.cond_width, size)
        if checkpointing and block.kind != "T":
            largest = max(largest, kept)
            kept = positions * block.width * size
        total += kept
    for level, (outer, inner) in enumerate(pairwise(config.widths)):
        total += (side >> level) ** 2 * (FP32 + size) * (outer + inner // 4)
    return total + largest + side**2 * config.widths[0] * 3 * FP32


def _kept_c(config: StageCConfig, positions: int, tokens: int, size: int, checkpointing: bool) -> float:
    """Bytes that Stage C keeps of a sample with `positions` positions."""
    width = config.width
    kept = {kind: _kept_block(kind, positions, width, 0, tokens, width, size) for kind in "CTA"}
    if checkpointing:
        blocks = config.depth * (2 * positions * width * size + kept["T"]) + max(kept.values())
    else:
        blocks = config.depth * sum(kept.values())
    return blocks + positions * width * 2 * FP32 + tokens * (config.text_width + 2 * width) * size


def _kept_block(kind: str, positions: int, width: int, extra: int, tokens: int, cond: int, size: int) -> float:
    """Bytes that a block keeps of a sample.

    C: what the depthwise convolution, the norm and the first linear see; of four times the channels what GELU, the
    response norm (in fp32, and under autocast once more) and the second linear see, and dropout's mask.
    T: its input. A: the norm's input, what goes into and comes out of the two linears, and keys and values of the text.
    """
    match kind:
        case "C":
            response = FP32 if size == FP32 else FP32 + size
            return positions * (width * (FP32 + 2 * size + 4 * (2 * size + response + 1)) + extra * size)
        case "T":
            return positions * width * size
        case _:
            return positions * width * (FP32 + 7 * size) + tokens * (cond * (FP32 + size) + 3 * width * size)


def _kept_compressor(config: CompressorConfig, side: int) -> float:
    """Bytes that the compressor, always in fp32, keeps of a picture of `side` px: what each convolution, BatchNorm and
    non-linearity sees."""
    return sum(FP32 * layer.kept for layer in _convolutions(_stages_of(config), side))


# --------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class _Block:
    """A block of Stage B: kind (C, T, A), level, channels, further ones from the way down, whether it sees code."""

    kind: str
    level: int
    width: int
    skip: int
    code: bool


def _blocks_b(config: StageBConfig) -> Iterator[_Block]:
    """Every block of `StageB`, down and up."""
    deepest = len(config.widths) - 1
    for level, width in enumerate(config.widths):
        pattern = config.patterns[level] * config.blocks[level]
        for way in ("down", "up"):
            for place, kind in enumerate(pattern):
                skip = width if way == "up" and place == 0 and level < deepest else 0
                yield _Block(kind, level, width, skip, kind == "C" and config.inject_code[level])


@dataclass(frozen=True)
class _Convolution:
    """A convolution of an EfficientNet: weights, output channels, whether BatchNorm follows, numbers kept, products."""

    weights: int
    outputs: int
    norm: bool
    kept: int
    products: int


def _convolutions(table: EfficientNetStages, side: int) -> Iterator[_Convolution]:
    """Every convolution of torchvision's EfficientNetV2, for a picture of `side` px.

    Kept are its input, what BatchNorm sees, and, where one follows, what SiLU sees.
    """

    def layer(
        kernel: int, inputs: int, outputs: int, before: int, after: int, active: bool, groups: int = 1
    ) -> _Convolution:
        kept = inputs * before**2 + outputs * after**2 * (1 + active)
        weights = kernel**2 * inputs * outputs // groups
        return _Convolution(weights, outputs, True, kept, weights * after**2)

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
                yield _Convolution(products + wide + squeezed, 0, False, wide * after**2, products)
            if stage.block == "mb" or stage.expand > 1:
                yield layer(1, wide, stage.channels, after, after, False)
            channels, side = stage.channels, after
    yield layer(1, channels, table.last, side, side, True)


def _stages_of(config: CompressorConfig) -> EfficientNetStages:
    return EFFICIENTNETS[config.backbone] if isinstance(config.backbone, str) else config.backbone


def _widths_a(config: StageAConfig) -> list[int]:
    """Channels of Stage A's levels, from the pixels down."""
    return [config.hidden >> level for level in reversed(range(config.levels))]
