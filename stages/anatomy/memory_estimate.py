"""How much device memory a training needs, in closed form. Imports no torch: `plan` stays quick.

Weights, gradients and moments follow exactly from the parameter counts. Activations are what autograd keeps for the
backward pass, counted tensor by tensor: of each block, the inputs of its products, norms and non-linearities.
The tests hold them to within 20 % of what torch keeps on a CPU. Kernels of a GPU differ by a few per cent (attention
there stays in half precision, dropout keeps one byte an element); `RUNTIME` stands for what is not counted.

Legend: s bytes of an activation in the precision of the products (4, or 2 under autocast), B samples of one worker.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise

from stages.anatomy import parameters
from stages.anatomy.parameters import (
    DISCRIMINATOR,
    VGG16,
    blocks_b,
    blocks_of_baseline,
    convolutions,
    layers_of_previewer,
    stages_of,
    widths_a,
)
from stages.settings.losses import StageALoss
from stages.settings.models import (
    BaselineConfig,
    CompressorConfig,
    PreviewerConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
    TextConfig,
)
from stages.settings.training import Phase, TrainingConfig

GIB = 1 << 30
FP32 = 4  # bytes
RUNTIME = GIB  # CUDA's context and kernels, workspaces of its libraries, the slack of torch's allocator
LOOKUP_ROWS = 1 << 14  # positions that Stage A compares with its codebook at a time


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one worker, by what they hold."""

    weights: int
    gradients: int
    moments: int
    average: int
    activations: int
    runtime: int = RUNTIME
    encoders: int = 0

    @property
    def total(self) -> int:
        """All of it together."""
        return sum(getattr(self, part.name) for part in fields(self))


def train_a(config: StageAConfig, loss: StageALoss, train: TrainingConfig, workers: int) -> Memory:
    """Stage A, with the discriminator and VGG16 where its loss has them.

    VGG16 is not trained. Both of the discriminator's losses see its weights normalised: two copies more.
    """
    size = _itemsize(train)
    judged, seen = loss.adversarial > 0, loss.perceptual > 0 and loss.perceptual_weights is not None
    count = parameters.stage_a(config) + judged * parameters.discriminator()
    beside = judged * 2 * FP32 * parameters.discriminator()
    beside += seen * parameters.vgg16() * (FP32 + _copied(size))

    def kept(phase: Phase) -> float:
        side = loss.crop or phase.size
        looked_up = min(LOOKUP_ROWS * workers / phase.batch_size, (side >> config.levels) ** 2)
        judges = judged * _kept_discriminator(side) + seen * _kept_vgg16(side, size)
        return _kept_a(config, side, size, train.checkpointing) + looked_up * config.codebook_size * FP32 + judges

    return _memory(count, count, train, workers, kept, beside)


def train_b(
    config: StageBConfig,
    compressor: CompressorConfig,
    joint: bool,
    tokens: int,
    train: TrainingConfig,
    workers: int,
) -> Memory:
    """Stage B with captions of `tokens` tokens and the compressor, which is trained along where `joint`."""
    own, fixed = parameters.compressor(compressor), 2 * compressor.latent_channels * (compressor.batch_norm == "fixed")
    count = parameters.stage_b(config)

    def kept(phase: Phase) -> float:
        size = _itemsize(train)
        side = compressor.seen_side(phase.size)
        seen = _kept_compressor(compressor, side) if joint else 0.0
        return seen + _kept_b(config, phase.size // 4 // config.patch, tokens, size, train.checkpointing)

    return _memory(count + own, count + (own - fixed if joint else 0), train, workers, kept)


def warm_up(config: CompressorConfig, width: int, latent_channels: int, train: TrainingConfig, workers: int) -> Memory:
    """The compressor's warm-up, with a throwaway decoder of `width` channels."""
    sides = (width, width * 2 // 3, width // 3)  # channels at a 32nd, a 16th and an 8th of the picture's side
    decoder = 9 * config.latent_channels * width + 36 * latent_channels * sides[2] + 4 * latent_channels
    decoder += sum(16 * outer * inner for outer, inner in pairwise(sides)) + sum(sides)
    count, fixed = parameters.compressor(config) + decoder, 2 * config.latent_channels * (config.batch_norm == "fixed")

    def kept(phase: Phase) -> float:
        first = (phase.size // 32) ** 2
        numbers = first * config.latent_channels + sum(2 * first * 4**level * side for level, side in enumerate(sides))
        return _kept_compressor(config, config.seen_side(phase.size)) + numbers * _itemsize(train)

    return _memory(count, count - fixed, train, workers, kept)


def train_c(
    config: StageCConfig, compressor: CompressorConfig, tokens: int, train: TrainingConfig, workers: int
) -> Memory:
    """Stage C on the compressor's codes, with captions of `tokens` tokens."""
    count = parameters.stage_c(config)

    def kept(phase: Phase) -> float:
        side = compressor.code_side(phase.size)
        return _kept_c(config, side * side, tokens, _itemsize(train), train.checkpointing)

    return _memory(count, count, train, workers, kept)


def encode_text(config: TextConfig, rows: int) -> int:
    """A text tower that encodes `rows` captions at a time, its weights and its widest layer, in fp32."""
    return FP32 * (parameters.text(config) + rows * config.context_length * 8 * config.width)


def encode_a(config: StageAConfig, side: int, rows: int) -> int:
    """Stage A, which encodes `rows` pictures of `side` px at a time."""
    return FP32 * (parameters.stage_a(config) + rows * (side // 2) ** 2 * 8 * widths_a(config)[0])


def encode_c(config: CompressorConfig, side: int, rows: int) -> int:
    """The compressor, which encodes `rows` pictures of `side` px at a time."""
    widest = max(layer.kept for layer in convolutions(stages_of(config), config.seen_side(side)))
    return FP32 * (parameters.compressor(config) + rows * widest)


def train_previewer(
    config: PreviewerConfig, compressor: CompressorConfig, train: TrainingConfig, workers: int
) -> Memory:
    """The previewer on the compressor's codes."""
    count = parameters.previewer(config)

    def kept(phase: Phase) -> float:
        return _kept_previewer(config, compressor.code_side(phase.size), _itemsize(train))

    return _memory(count, count, train, workers, kept)


def train_baseline(config: BaselineConfig, tokens: int, train: TrainingConfig, workers: int) -> Memory:
    """The baseline on Stage A's latents, with captions of `tokens` tokens."""
    count = parameters.baseline(config)

    def kept(phase: Phase) -> float:
        return _kept_baseline(config, phase.size // 4 // config.patch, tokens, _itemsize(train), train.checkpointing)

    return _memory(count, count, train, workers, kept)


def _memory(
    count: int, trained: int, train: TrainingConfig, workers: int, kept: Callable[[Phase], float], beside: int = 0
) -> Memory:
    """AdamW in fp32 (two moments a weight), and the largest phase's activations; `kept` gives a sample's bytes.

    count, trained: parameters of all modules, and those of them that are trained. beside: bytes of further weights.

    Under autocast the backward pass needs the weights in half precision too. The moving average, where it lies beside
    the model, is a copy of all weights. Where a copy is spread over ranks, each has whole weights beside its share of
    them during a step, and whole gradients while it adds them up over pieces of a batch.
    """
    half = 2 * count if train.precision == "bf16" else 0
    averaged = train.ema is not None and train.ema.device == "model"
    rows = [phase.batch_size // workers for phase in train.phases]
    at_once = [min(most, train.micro_batch or most) for most in rows]
    whole = FP32 * trained if train.shard > 1 and at_once != rows else 0
    return Memory(
        weights=FP32 * count // train.shard + (FP32 * count if train.shard > 1 else 0) + half + beside,
        gradients=FP32 * trained // train.shard + whole,
        moments=2 * FP32 * trained // train.shard,
        average=FP32 * count // train.shard if averaged else 0,
        activations=max(int(most * kept(phase)) for most, phase in zip(at_once, train.phases, strict=True)),
    )


def _itemsize(train: TrainingConfig) -> int:
    return 2 if train.precision == "bf16" else FP32


def _copied(size: int) -> int:
    """Bytes an element of a copy that autocast makes of what is there in fp32."""
    return size if size < FP32 else 0


# ----------------------------------------------------------------------------------------------- activations


def _kept_a(config: StageAConfig, side: int, size: int, checkpointing: bool) -> float:
    """Bytes that Stage A keeps of a picture of `side` px."""
    total = largest = 0.0
    for level, width in enumerate(widths_a(config)):
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
    for block in blocks_b(config):
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
    return sum(FP32 * layer.kept for layer in convolutions(stages_of(config), side))


def _kept_discriminator(side: int) -> float:
    """Bytes that the discriminator, always in fp32, keeps of a picture and, twice, of its reconstruction: of each
    convolution what InstanceNorm (the first has none), LeakyReLU and the next convolution see."""
    numbers = 3 * side**2
    for level, width in enumerate(DISCRIMINATOR):
        side = -(-side // 2)
        numbers += (2 if level == 0 else 3) * side**2 * width
    return 3 * numbers * FP32


def _kept_vgg16(side: int, size: int) -> float:
    """Bytes that VGG16 keeps of a reconstruction: of each stack its convolutions' outputs (ReLU works in place), the
    distance of its features in fp32, and what pooling leaves, with the places of the maxima as 64-bit numbers."""
    total = 0.0
    for number, (width, layers) in enumerate(VGG16):
        features = FP32 + (FP32 if size < FP32 else 0)  # their difference, and under autocast themselves once more
        total += side**2 * width * (layers * size + features)
        side //= 2
        if number < len(VGG16) - 1:
            total += side**2 * width * (size + 8)
    return total


def _kept_previewer(config: PreviewerConfig, side: int, size: int) -> float:
    """Bytes that the previewer keeps of a code of `side` positions a side: of each convolution what GELU, BatchNorm and
    the next convolution see, and the error."""
    layers = list(layers_of_previewer(config))
    numbers = sum(3 * (layer.scale * side) ** 2 * layer.outputs for layer in layers[:-1])
    return numbers * size + (layers[-1].scale * side) ** 2 * layers[-1].outputs * FP32


def _kept_baseline(config: BaselineConfig, side: int, tokens: int, size: int, checkpointing: bool) -> float:
    """Bytes that the baseline keeps of a sample whose first level has `side` positions a side."""
    total = largest = 0.0
    for block in blocks_of_baseline(config):
        positions = (side >> block.level) ** 2
        if block.depth:
            kept = _kept_transformer(positions, block.width, block.depth, tokens, config.text_width, size)
        else:
            kept = _kept_residual(positions, block.inputs, block.width, size)
        if checkpointing:
            largest = max(largest, kept)
            kept = positions * (block.inputs or block.width) * size
        total += kept
    for level, (upper, lower) in enumerate(pairwise(config.widths)):  # what the convolutions between two levels see
        total += (side >> level) ** 2 * (upper + lower) * size
    return total + largest + side**2 * config.widths[0] * 3 * FP32


def _kept_residual(positions: int, inputs: int, width: int, size: int) -> float:
    """Bytes of a residual block of the baseline: of each of its halves what GroupNorm and SiLU (in fp32) and the
    convolution see, and under autocast what the shortcut sees."""
    shortcut = inputs * _copied(size) if inputs != width else 0
    return positions * ((inputs + width) * (2 * FP32 + size) + shortcut)


def _kept_transformer(positions: int, width: int, depth: int, tokens: int, text_width: int, size: int) -> float:
    """Bytes of a transformer of the baseline: what its norms (in fp32) see; of each block what five linears and
    attention (query, key and value, and the other's query) see, and 16 times the channels in its MLP; the text, its
    keys and values."""
    block = width * (3 * FP32 + (5 + 4 + 16) * size)
    text = 2 * tokens * (width + text_width) * size
    return positions * width * (FP32 + 2 * size) + depth * (positions * block + text)
