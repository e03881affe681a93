"""How much device memory a training needs. Imports no torch: `plan` stays quick.

Weights, gradients and moments follow exactly from the parameters of the network's blocks. Activations are what autograd
keeps of them for the backward pass, by the rules of a GPU. The tests hold steps of A, B and C at full width to within
10 % of what is alive at most (`tests.bench.fake_step`), the others to within 20 % of what torch keeps on a CPU;
`RUNTIME` stands for what is not counted. What runs between two steps, a validation or a panel, has the room that
activations leave, and counts where it takes more.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

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
VALIDATED = 16  # samples that a validation takes through a model at a time
SHOWN = 2  # those of a panel: one, in fp32
WIDEST_A = 8.3  # times the features at Stage A's first level, what a pass through it alone takes: the MLP of its block


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


class Sample(NamedTuple):
    """Bytes that a sample takes: what a training keeps of it, and what a forward pass alone does.

    That is what the widest block would keep, and as much again: what lies beside it until a later block asks for it.
    """

    kept: float
    passing: int


def train_a(config: StageAConfig, loss: StageALoss, train: TrainingConfig, workers: int) -> Memory:
    """Stage A, with the discriminator and VGG16 where its loss has them.

    VGG16 is not trained, and sees reconstructions. The discriminator sees pictures and, twice, reconstructions; both of
    its losses normalise its weights: two copies more.
    """
    judged, seen = loss.adversarial > 0, loss.perceptual > 0 and loss.perceptual_weights is not None
    count = parameters.stage_a(config) + judged * parameters.discriminator()
    beside = judged * 2 * FP32 * parameters.discriminator()
    beside += seen * parameters.vgg16() * (FP32 + HALF * _in_half(train))

    def sample(phase: Phase) -> Sample:
        side = loss.crop or phase.size
        own = _sample(architectures.stage_a(config, side, side), train)
        looked_up = min(LOOKUP_ROWS / _at_once(phase, train, workers), (side >> config.levels) ** 2)
        judges = judged * _sample(architectures.discriminator(side, pictures=3), train).kept
        judges += seen * _sample(architectures.vgg16(side), train).kept
        return Sample(own.kept + looked_up * config.codebook_size * FP32 + judges, own.passing)

    return _memory(count, [sample(phase) for phase in train.phases], train, workers, beside=beside)


def train_b(
    config: StageBConfig, compressor: CompressorConfig, joint: bool, tokens: int, train: TrainingConfig, workers: int
) -> Memory:
    """Stage B with captions of `tokens` tokens and the compressor, which is trained along where `joint`."""
    own, other = parameters.stage_b(config), parameters.compressor(compressor)

    def network(size: int) -> Iterator[Block]:
        yield from architectures.compressor(compressor, compressor.seen_side(size) if joint else 0)
        yield from architectures.stage_b(config, size // 4, size // 4, tokens)

    samples = [_sample(network(phase.size), train) for phase in train.phases]
    return _memory(own + other, samples, train, workers, _fixed(compressor) if joint else other)


def warm_up(config: CompressorConfig, width: int, latent_channels: int, train: TrainingConfig, workers: int) -> Memory:
    """The compressor's warm-up, with a throwaway decoder of `width` channels."""
    channels = width, config.latent_channels, latent_channels

    def network(size: int) -> Iterator[Block]:
        yield from architectures.compressor(config, config.seen_side(size))
        yield from architectures.warm_up_decoder(*channels, size // 32)

    count = parameters.compressor(config) + parameters.warm_up_decoder(*channels)
    samples = [_sample(network(phase.size), train) for phase in train.phases]
    return _memory(count, samples, train, workers, _fixed(config))


def train_c(
    config: StageCConfig, compressor: CompressorConfig, tokens: int, train: TrainingConfig, workers: int
) -> Memory:
    """Stage C on the compressor's codes, with captions of `tokens` tokens."""
    sides = [compressor.code_side(phase.size) for phase in train.phases]
    samples = [_sample(architectures.stage_c(config, side, side, tokens), train) for side in sides]
    return _memory(parameters.stage_c(config), samples, train, workers)


def train_previewer(
    config: PreviewerConfig, compressor: CompressorConfig, train: TrainingConfig, workers: int
) -> Memory:
    """The previewer on the compressor's codes."""
    sides = [compressor.code_side(phase.size) for phase in train.phases]
    samples = [_sample(architectures.previewer(config, side, side), train) for side in sides]
    return _memory(parameters.previewer(config), samples, train, workers)


def train_baseline(config: BaselineConfig, tokens: int, train: TrainingConfig, workers: int) -> Memory:
    """The baseline on Stage A's latents, with captions of `tokens` tokens."""
    sides = [phase.size // 4 for phase in train.phases]
    samples = [_sample(architectures.baseline(config, side, side, tokens), train) for side in sides]
    return _memory(parameters.baseline(config), samples, train, workers)


def encode_text(config: TextConfig, rows: int) -> int:
    """A text tower that encodes `rows` captions at a time, its weights and its widest layer, in fp32."""
    return FP32 * (parameters.text(config) + rows * config.context_length * 8 * config.width)


def encode_a(config: StageAConfig, side: int, rows: int) -> int:
    """Stage A, which encodes, or decodes, `rows` pictures of `side` px at a time."""
    widest = round(WIDEST_A * architectures.levels_a(config, side, side)[0].numbers)
    return FP32 * (parameters.stage_a(config) + rows * widest)


def draw_b(config: StageBConfig, side: int, tokens: int) -> int:
    """Stage B, which draws one picture of `side` px at a time, in fp32."""
    blocks = architectures.stage_b(config, side // 4, side // 4, tokens)
    return FP32 * parameters.stage_b(config) + 2 * max(block.bytes_kept(autocast=False) for block in blocks)


def encode_c(config: CompressorConfig, side: int, rows: int) -> int:
    """The compressor, which encodes `rows` pictures of `side` px at a time."""
    blocks = architectures.compressor(config, config.seen_side(side))
    return FP32 * parameters.compressor(config) + rows * max(block.bytes_kept(autocast=False) for block in blocks)


def _memory(
    count: int, samples: Sequence[Sample], train: TrainingConfig, workers: int, frozen: int = 0, beside: int = 0
) -> Memory:
    """AdamW in fp32 (two moments a weight), and the largest phase's activations, of which `samples` tells a sample's.

    count, frozen: parameters of all modules, and those of them that are not trained. beside: bytes of further weights.

    Under autocast the backward pass needs the weights in half precision too. The moving average, where it lies beside
    the model, is a copy of all weights. Where a copy is spread over ranks, each has whole weights beside its share of
    them during a step, and whole gradients while it adds them up over pieces of a batch.
    """
    trained, half = count - frozen, HALF * count * _in_half(train)
    averaged = train.ema is not None and train.ema.device == "model"
    at_once = [_at_once(phase, train, workers) for phase in train.phases]
    in_pieces = at_once != [phase.batch_size // workers for phase in train.phases]
    whole = FP32 * trained if train.shard > 1 and in_pieces else 0
    validated = min(VALIDATED, train.micro_batch or VALIDATED) if train.validation else 0
    between = max(validated, SHOWN)
    return Memory(
        weights=FP32 * count // train.shard + (FP32 * count if train.shard > 1 else 0) + half + beside,
        gradients=FP32 * trained // train.shard + whole,
        moments=2 * FP32 * trained // train.shard,
        average=FP32 * count // train.shard if averaged else 0,
        activations=max(
            int(max(rows * sample.kept, between * sample.passing))
            for rows, sample in zip(at_once, samples, strict=True)
        ),
    )


def _in_half(train: TrainingConfig) -> bool:
    """Whether it computes in bf16; auto does on the GPUs whose memory is counted here."""
    return train.precision != "fp32"


def _at_once(phase: Phase, train: TrainingConfig, workers: int) -> int:
    """Rows that a worker takes through the model at a time."""
    rows = phase.batch_size // workers
    return min(rows, train.micro_batch or rows)


def _sample(blocks: Iterable[Block], train: TrainingConfig) -> Sample:
    """Bytes of a sample; where a training recomputes blocks, it keeps also those of the largest meanwhile."""
    autocast, total, largest, widest = _in_half(train), 0, 0, 0
    for block in blocks:
        kept = block.bytes_kept(autocast)
        widest = max(widest, kept)
        if train.checkpointing is True and block.recomputed:
            largest = max(largest, kept)
            kept = Block(kept=block.recomputed).bytes_kept(autocast)
        total += kept
    return Sample(total + largest, 2 * widest)


def _fixed(config: CompressorConfig) -> int:
    """Parameters of the compressor that no training changes."""
    return 2 * config.latent_channels * (config.batch_norm == "fixed")
