"""Device memory of planned trainings: what each needs of a worker, by what holds it, and the keys that lower it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pipeline.errors import UsageError
from pipeline.plan.dag import Planned
from pipeline.settings.config import Config
from pipeline.settings.sections import WITHOUT_BLOCKS, Encoding
from stages.anatomy import memory_estimate
from stages.anatomy.memory_estimate import GIB, Memory
from stages.settings.training import TrainingConfig

COMMON_GIB = 80  # memory of the GPUs that most clusters train on: A100, H100


def check(planned: Sequence[Planned], config: Config) -> None:
    """Refuse trainings that cannot fit into `cluster.gpu_memory_gib`, where that is known, on their fewest workers.

    Raises:
        UsageError: names the step, what it needs, and the keys that lower it.
    """
    room = config.cluster.gpu_memory_gib
    if room is None:
        return
    for step, need, ranks in _larger_than(room, planned, config):
        parts = ", ".join(f"{name} {count / GIB:.1f}" for name, count in vars(need).items() if count)
        raise UsageError(
            f"{step} needs about {need.total / GIB:.1f} GiB of device memory a worker ({parts}) with "
            f"{config.ranks_key(step)}={ranks}, but cluster.gpu_memory_gib={room:g}; "
            f"lower it with {_knobs(step, config, ranks, room)}"
        )


def large_trainings(planned: Sequence[Planned], config: Config) -> list[str]:
    """Sentences about trainings that only the largest GPUs could hold, if any; none where `check` judges."""
    if config.cluster.gpu_memory_gib:
        return []
    return [
        f"{step} needs about {need.total / GIB:.1f} GiB of device memory a worker, more than a GPU of {COMMON_GIB} GiB "
        f"has; lower it with {_knobs(step, config, ranks, COMMON_GIB)}, or give cluster.gpu_memory_gib=, what yours has"
        for step, need, ranks in _larger_than(COMMON_GIB, planned, config)
    ]


def _larger_than(gib: float, planned: Sequence[Planned], config: Config) -> Iterator[tuple[str, Memory, int]]:
    """Trainings to do of which a worker needs more memory; and the fewest workers that they may have."""
    for item in planned:
        ranks = config.worlds_of(item.step.name)[-1]
        need = needed(item.step.name, config, ranks)
        if need and item.state != "done" and need.total > gib * GIB:
            yield item.step.name, need, ranks


def needed(step: str, config: Config, ranks: int | None = None) -> Memory | None:
    """What a worker of a training step needs, at its largest, encoders and panels included; None for other steps.

    It is one of so many `ranks`; None: of as many as the step has. Where `checkpointing` is auto, blocks are recomputed
    if it would take more than a GPU of this cluster has.
    """
    ranks = ranks or config.ranks_of(step)
    need, automatic = _needed(step, config, ranks), [t for t in config.trainings_of(step).values() if _auto(t)]
    room = (config.cluster.gpu_memory_gib or COMMON_GIB) * GIB
    return _needed(step, config, ranks, recomputed=True) if need and automatic and need.total > room else need


def _needed(step: str, config: Config, ranks: int, recomputed: bool = False) -> Memory | None:
    """The same, where trainings whose `checkpointing` is auto do so or not."""
    trainings = {
        name: training.model_copy(update={"checkpointing": recomputed}) if _auto(training) else training
        for name, training in config.trainings_of(step).items()
    }
    need = _training(step, config, trainings, ranks)
    if need is None:
        return None
    return replace(
        need, encoders=_encoders(step, config, ranks), activations=max(need.activations, _panel(step, config))
    )


def whole_bytes(step: str, config: Config) -> dict[int, int]:
    """Bytes of memory that each worker of a training step needs if nothing is recomputed where `checkpointing` is auto,
    by the number of workers: a training goes on with fewer of them where nodes are lost, which then have more rows."""
    needs = {world: _needed(step, config, world) for world in config.worlds_of(step)}
    return {world: need.total if need else 0 for world, need in needs.items()}


def _auto(training: TrainingConfig) -> bool:
    return training.checkpointing == "auto"


def _panel(step: str, config: Config) -> int:
    """Bytes of what a training shows by what it can do, one of its largest pictures at a time: Stage A, and of Stage
    C's before it Stage B."""
    side = max(frame.size for frame in config.frames_of(step))
    by_a = memory_estimate.encode_a(config.stage_a.model, side, rows=1)
    if step == "train_c":
        train, tokens = config.stage_c.train, config.text[config.stage_b.text].context_length
        shows = train is not None and train.panel_every is not None
        return max(by_a, memory_estimate.draw_b(config.stage_b.model, side, tokens)) if shows else 0
    return by_a if step in ("train_a", "train_b", "train_baseline") else 0


def _encoders(step: str, config: Config, ranks: int) -> int:
    """Bytes of the encoders that a training runs online, at its largest pictures."""
    side = max(frame.size for frame in config.frames_of(step))
    most = max(phase.batch_size for training in config.trainings_of(step).values() for phase in training.phases)

    def rows(encoding: Encoding) -> int:
        """Rows at a time, none where it is not this training that encodes."""
        return min(encoding.batch, most // ranks) if encoding.online else 0

    text, a, c = (rows(getattr(config.encode, field)) for field in ("text", "latents_a", "latents_c"))
    total = 0
    if step in config.towers and text:
        total += memory_estimate.encode_text(config.text[config.towers[step]], text)
    if step in ("train_b", "train_baseline") and a:
        total += memory_estimate.encode_a(config.stage_a.model, side, a)
    if step in ("train_c", "train_previewer") and c:
        total += memory_estimate.encode_c(config.compressor.model, side, c)
    return total


def _training(step: str, config: Config, trainings: Mapping[str, TrainingConfig], ranks: int) -> Memory | None:
    """The same without the encoders."""
    a, b, c, compressor = config.stage_a, config.stage_b, config.stage_c, config.compressor
    match step:
        case "train_a":
            return memory_estimate.train_a(a.model, a.loss, trainings["stage_a"], ranks)
        case "train_b":
            tokens = config.text[b.text].context_length
            found = [
                memory_estimate.train_b(
                    b.model, compressor.model, compressor.joint, tokens, trainings["stage_b"], ranks
                )
            ]
            if compressor.warmup and "compressor" in trainings:  # existing weights of Stage B make it needless
                loss = compressor.warmup.loss
                width, channels = loss.width, loss.channels(b.model.latent_channels)
                found.append(memory_estimate.warm_up(compressor.model, width, channels, trainings["compressor"], ranks))
            return max(found, key=lambda need: need.total)
        case "train_c":
            tokens = config.text[c.text].context_length
            return memory_estimate.train_c(c.model, compressor.model, tokens, trainings["stage_c"], ranks)
        case "train_previewer":
            model = config.previewer.model
            return memory_estimate.train_previewer(model, compressor.model, trainings["previewer"], ranks)
        case "train_baseline":
            tokens = config.text[config.baseline.text].context_length
            return memory_estimate.train_baseline(config.baseline.model, tokens, trainings["baseline"], ranks)
        case _:
            return None


def _knobs(step: str, config: Config, ranks: int, gib: float) -> str:
    """The keys that lower the memory of a training step to `gib` or towards it, but not those turned already."""
    found = []
    ours = [id(train) for train in config.trainings_of(step).values()]
    for key, train in config.trainings().items():
        if id(train) not in ours:  # equal ones may belong to other steps
            continue
        rows = math.gcd(*(phase.batch_size // ranks for phase in train.phases))
        half = _half(rows, train.micro_batch)
        parted = half % 2 and config.mixes(key)
        if min(rows, train.micro_batch or rows) > 1 and not parted and _takes(train, micro_batch=half):
            found.append(f"{key}.micro_batch={half}")
        if train.shard < ranks and _takes(train, shard=ranks):
            found.append(f"{key}.shard={ranks}")
        if not train.checkpointing and key not in WITHOUT_BLOCKS:
            found.append(f"{key}.checkpointing=true")
        if train.ema and train.ema.device == "model":
            found.append(f"{key}.ema.device=cpu")
        if train.precision == "fp32":
            found.append(f"{key}.precision=bf16")
    if more := _fitting_ranks(step, config, ranks, gib):
        found.append(f"{config.ranks_key(step)}={more}")
    return ", ".join(found) or "a smaller model"


def _takes(train: TrainingConfig, **change: object) -> bool:
    """Whether a change goes with what else is set of a training."""
    try:
        TrainingConfig.model_validate(train.model_dump() | change)
    except ValueError:
        return False
    return True


def _fitting_ranks(step: str, config: Config, ranks: int, gib: float) -> int | None:
    """The fewest ranks, by doubling, among which the batches divide and a training fits into the memory of each, as far
    as the key that says how many there are can go alone."""
    trainings = config.trainings_of(step).values()
    smallest = min(phase.batch_size for training in trainings for phase in training.phases)
    wanted = [smallest, *(training.ranks for training in trainings if training.ranks)]
    most = min(wanted) if config.ranks_key(step) == "workers" else min(smallest, config.workers)
    while (ranks := 2 * ranks) <= most:
        if not config.divides(step, ranks):
            return None
        need = needed(step, config, ranks)
        if need and need.total <= gib * GIB:
            return ranks
    return None


def _half(rows: int, micro_batch: int | None) -> int:
    """The largest divisor of the rows of a rank that is at most half of what goes through the model at a time now."""
    most = min(rows, micro_batch or rows) // 2
    return next(size for size in range(most, 0, -1) if rows % size == 0)
