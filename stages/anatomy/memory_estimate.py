"""How much device memory a training needs. Imports no torch: `plan` stays quick.

Weights, gradients and moments follow exactly from the parameters of the network's blocks. Activations are what autograd
keeps of them for the backward pass. The tests hold them to within 20 % of what torch keeps on a CPU. Kernels of a GPU
differ by a few per cent (attention there stays in half precision, dropout keeps one byte an element); `RUNTIME` stands
for what is not counted.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

from stages.anatomy import architectures, parameters
from stages.anatomy.blocks import FP32, HALF, Block
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

    VGG16 is not trained, and sees reconstructions. The discriminator sees pictures and, twice, reconstructions; both of
    its losses normalise its weights: two copies more.
    """
    judged, seen = loss.adversarial > 0, loss.perceptual > 0 and loss.perceptual_weights is not None
    count = parameters.stage_a(config) + judged * parameters.discriminator()
    beside = judged * 2 * FP32 * parameters.discriminator()
    beside += seen * parameters.vgg16() * (FP32 + HALF * (train.precision == "bf16"))

    def kept(phase: Phase) -> float:
        side = loss.crop or phase.size
        own = _kept(architectures.stage_a(config, side, side), train)
        looked_up = min(LOOKUP_ROWS * workers / phase.batch_size, (side >> config.levels) ** 2)
        judges = judged * _kept(architectures.discriminator(side, pictures=3), train)
        judges += seen * _kept(architectures.vgg16(side), train)
        return own + looked_up * config.codebook_size * FP32 + judges

    return _memory(count, [kept(phase) for phase in train.phases], train, workers, beside=beside)


def train_b(
    config: StageBConfig, compressor: CompressorConfig, joint: bool, tokens: int, train: TrainingConfig, workers: int
) -> Memory:
    """Stage B with captions of `tokens` tokens and the compressor, which is trained along where `joint`."""
    own, other = parameters.stage_b(config), parameters.compressor(compressor)

    def network(size: int) -> Iterator[Block]:
        yield from architectures.compressor(compressor, compressor.seen_side(size) if joint else 0)
        yield from architectures.stage_b(config, size // 4, size // 4, tokens)

    kept = [_kept(network(phase.size), train) for phase in train.phases]
    return _memory(own + other, kept, train, workers, _fixed(compressor) if joint else other)


def warm_up(config: CompressorConfig, width: int, latent_channels: int, train: TrainingConfig, workers: int) -> Memory:
    """The compressor's warm-up, with a throwaway decoder of `width` channels."""
    channels = width, config.latent_channels, latent_channels

    def network(size: int) -> Iterator[Block]:
        yield from architectures.compressor(config, config.seen_side(size))
        yield from architectures.warm_up_decoder(*channels, size // 32)

    count = parameters.compressor(config) + parameters.warm_up_decoder(*channels)
    kept = [_kept(network(phase.size), train) for phase in train.phases]
    return _memory(count, kept, train, workers, _fixed(config))


def train_c(
    config: StageCConfig, compressor: CompressorConfig, tokens: int, train: TrainingConfig, workers: int
) -> Memory:
    """Stage C on the compressor's codes, with captions of `tokens` tokens."""
    sides = [compressor.code_side(phase.size) for phase in train.phases]
    kept = [_kept(architectures.stage_c(config, side, side, tokens), train) for side in sides]
    return _memory(parameters.stage_c(config), kept, train, workers)


def train_previewer(
    config: PreviewerConfig, compressor: CompressorConfig, train: TrainingConfig, workers: int
) -> Memory:
    """The previewer on the compressor's codes."""
    sides = [compressor.code_side(phase.size) for phase in train.phases]
    kept = [_kept(architectures.previewer(config, side, side), train) for side in sides]
    return _memory(parameters.previewer(config), kept, train, workers)


def train_baseline(config: BaselineConfig, tokens: int, train: TrainingConfig, workers: int) -> Memory:
    """The baseline on Stage A's latents, with captions of `tokens` tokens."""
    sides = [phase.size // 4 for phase in train.phases]
    kept = [_kept(architectures.baseline(config, side, side, tokens), train) for side in sides]
    return _memory(parameters.baseline(config), kept, train, workers)


def encode_text(config: TextConfig, rows: int) -> int:
    """A text tower that encodes `rows` captions at a time, its weights and its widest layer, in fp32."""
    return FP32 * (parameters.text(config) + rows * config.context_length * 8 * config.width)


def encode_a(config: StageAConfig, side: int, rows: int) -> int:
    """Stage A, which encodes `rows` pictures of `side` px at a time."""
    return FP32 * (parameters.stage_a(config) + rows * 8 * architectures.levels_a(config, side, side)[0].numbers)


def encode_c(config: CompressorConfig, side: int, rows: int) -> int:
    """The compressor, which encodes `rows` pictures of `side` px at a time."""
    blocks = architectures.compressor(config, config.seen_side(side))
    return FP32 * parameters.compressor(config) + rows * max(block.bytes_kept(autocast=False) for block in blocks)


def _memory(
    count: int, kept: Sequence[float], train: TrainingConfig, workers: int, frozen: int = 0, beside: int = 0
) -> Memory:
    """AdamW in fp32 (two moments a weight), and the largest phase's activations; `kept` are a sample's bytes of each.

    count, frozen: parameters of all modules, and those of them that are not trained. beside: bytes of further weights.

    Under autocast the backward pass needs the weights in half precision too. The moving average, where it lies beside
    the model, is a copy of all weights. Where a copy is spread over ranks, each has whole weights beside its share of
    them during a step, and whole gradients while it adds them up over pieces of a batch.
    """
    trained, half = count - frozen, HALF * count * (train.precision == "bf16")
    averaged = train.ema is not None and train.ema.device == "model"
    rows = [phase.batch_size // workers for phase in train.phases]
    at_once = [min(most, train.micro_batch or most) for most in rows]
    whole = FP32 * trained if train.shard > 1 and at_once != rows else 0
    return Memory(
        weights=FP32 * count // train.shard + (FP32 * count if train.shard > 1 else 0) + half + beside,
        gradients=FP32 * trained // train.shard + whole,
        moments=2 * FP32 * trained // train.shard,
        average=FP32 * count // train.shard if averaged else 0,
        activations=max(int(most * sample) for most, sample in zip(at_once, kept, strict=True)),
    )


def _kept(blocks: Iterable[Block], train: TrainingConfig) -> int:
    """Bytes that a training keeps of a sample; where it recomputes blocks, also those of the largest meanwhile."""
    autocast, total, largest = train.precision == "bf16", 0, 0
    for block in blocks:
        kept = block.bytes_kept(autocast)
        if train.checkpointing and block.recomputed:
            largest = max(largest, kept)
            kept = Block(kept=block.recomputed).bytes_kept(autocast)
        total += kept
    return total + largest


def _fixed(config: CompressorConfig) -> int:
    """Parameters of the compressor that no training changes."""
    return 2 * config.latent_channels * (config.batch_norm == "fixed")
