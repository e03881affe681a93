"""What a planned step would cost, before anything exists: work from counts, time from the rates, device memory."""

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from datasets.config import DataError
from datasets.reading import prompts
from datasets.reading.rivals import Rival
from pipeline.errors import UsageError
from pipeline.models.feature_sets import feature_sets
from pipeline.models.prompt_sets import drawn_for
from pipeline.plan import volume
from pipeline.plan.dag import Planned, Step, order
from pipeline.plan.table import rows as all_steps
from pipeline.plan.table import table
from pipeline.plan.volume import Volume
from pipeline.settings.config import Config
from pipeline.settings.evaluation import HELD_OUT
from pipeline.settings.sections import WITHOUT_BLOCKS, Encoding
from stages.anatomy import flops, memory_estimate
from stages.anatomy.memory_estimate import GIB, Memory
from stages.settings.training import TrainingConfig

COMMON_GIB = 80  # memory of the GPUs that most clusters train on: A100, H100
A100_FLOPS = 0.18 * flops.PEAKS["NVIDIA A100-SXM4-80GB"]  # the share of it that the paper's training of Stage C reached


def estimates(planned: Sequence[Planned], config: Config) -> list[dict[str, Any]]:
    """For each step its work, device-seconds, bytes, objects, memory and a text; null where nobody can tell.

    Rows come from the metadata's manifest when it stands, else from the config (marked so). `rates` of the config
    gives rows (for trainings: images seen) a device-second; a step may have none. Memory is that of a training's
    worker, bytes by what they hold, and their total. `cached_flops` and `online_flops` are those of an encoder whose
    outputs are stored, or made anew whenever a training sees a picture.

    Raises:
        UsageError: `rates` names a step that does not exist.
    """
    steps = [step.name for step in all_steps(config)]  # also trainings in whose place weights stand: a rate may stay
    for name in config.rates:
        if name not in steps:
            raise UsageError(f"rates.{name}: there is no such step; there are {', '.join(dict.fromkeys(steps))}")
    rows, basis = most_rows(planned, config)
    wanted = {step.name for step in order(table(config), config.targets)}
    captions = _captions(planned, config, rows)
    return [
        _with_volume(_estimate(item, config, rows, captions, basis), item, config, rows, captions, wanted)
        | {"memory": _bytes(item, config), "phases": _phases(item.step.name, config)}
        for item in planned
    ]


def most_rows(planned: Sequence[Planned], config: Config) -> tuple[int | None, str]:
    """The most rows that the data can have, None where only fetch can tell, and who says so: metadata or config."""
    done = {item.step.output: item.artifact for item in planned if item.state == "done"}
    metadata = done.get("metadata")
    return (metadata.manifest["rows"], "metadata") if metadata else (config.data.expected_rows, "config")


def _captions(planned: Sequence[Planned], config: Config, rows: int | None) -> int | None:
    """The most captions that so many rows can have: where they are pictures, the source's own, and one by each of the
    others, which may have more; None where nobody can tell."""
    if rows is None or not config.data.captions:
        return rows
    done = {item.step.output: item.artifact for item in planned if item.state == "done"}
    metadata = done.get("metadata")
    own: int = metadata.manifest["notes"]["captions"] if metadata else rows
    written = (done.get(f"captions_{name}") for name in config.data.captioned)
    return own + sum(found.manifest["notes"]["captions"] if found else rows for found in written)


def _with_volume(
    estimate: dict[str, Any],
    item: Planned,
    config: Config,
    rows: int | None,
    captions: int | None,
    wanted: Set[str],
) -> dict[str, Any]:
    """An estimate with the bytes and objects that the step stores, and what its encoder would cost online instead."""
    if item.artifact:
        manifest = item.artifact.manifest
        stored: Volume | None = Volume(manifest["bytes"], manifest.get("objects", len(manifest["files"])))
    else:
        stored = volume.stored(item.step.name, item.step.output, config, rows, captions or rows) if rows else None
    encoder = None
    if rows and not item.artifact:
        count = captions or rows if item.step.name == "encode_text" else rows
        encoder = volume.encoder(item.step.name, item.step.output, config, count, wanted)
    text = estimate["text"]
    if stored and not item.artifact:
        text += f", at most {_size(stored.bytes)} in {stored.objects:,} objects"
    if encoder and encoder.online_flops > A100_FLOPS:  # less than a second is no choice to make
        cached, online = (_time(flops / A100_FLOPS, "A100") for flops in (encoder.cached_flops, encoder.online_flops))
        text += f"; by its FLOPs {cached}, online {online} and no bytes"
    return estimate | {
        "bytes": stored.bytes if stored else None,
        "objects": stored.objects if stored else None,
        "cached_flops": encoder.cached_flops if encoder else None,
        "online_flops": encoder.online_flops if encoder else None,
        "text": text,
    }


def check_memory(planned: Sequence[Planned], config: Config) -> None:
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
    """Sentences about trainings that only the largest GPUs could hold, if any; none where `check_memory` judges."""
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
        need = memory(item.step.name, config, ranks)
        if need and item.state != "done" and need.total > gib * GIB:
            yield item.step.name, need, ranks


def memory(step: str, config: Config, ranks: int | None = None) -> Memory | None:
    """What a worker of a training step needs, at its largest, encoders and panels included; None for other steps.

    It is one of so many `ranks`; None: of as many as the step has. Where `checkpointing` is auto, blocks are recomputed
    if it would take more than a GPU of this cluster has.
    """
    ranks = ranks or config.ranks_of(step)
    need, automatic = whole_memory(step, config, ranks), [t for t in config.trainings_of(step).values() if _auto(t)]
    room = (config.cluster.gpu_memory_gib or COMMON_GIB) * GIB
    return whole_memory(step, config, ranks, recomputed=True) if need and automatic and need.total > room else need


def whole_memory(step: str, config: Config, ranks: int, recomputed: bool = False) -> Memory | None:
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
    needs = {world: whole_memory(step, config, world) for world in config.worlds_of(step)}
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

    towers = {"train_b": config.stage_b.text, "train_c": config.stage_c.text, "train_baseline": config.baseline.text}
    text, a, c = (rows(getattr(config.encode, field)) for field in ("text", "latents_a", "latents_c"))
    total = 0
    if step in towers and text:
        total += memory_estimate.encode_text(config.text[towers[step]], text)
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
        need = memory(step, config, ranks)
        if need and need.total <= gib * GIB:
            return ranks
    return None


def _bytes(item: Planned, config: Config) -> dict[str, int] | None:
    need = memory(item.step.name, config)
    return vars(need) | {"total": need.total} if need and item.state != "done" else None


def _estimate(item: Planned, config: Config, rows: int | None, captions: int | None, basis: str) -> dict[str, Any]:
    if item.state == "done" and item.artifact:
        spent = item.artifact.manifest["device_seconds"]
        return {"work": None, "unit": None, "device_seconds": None, "basis": None, "text": f"spent {_time(spent)}"}
    work, unit = _work(item.step, config, rows, captions)
    if work is None:
        unknown = f"{unit} unknown before fetch"
        return {"work": None, "unit": unit, "device_seconds": None, "basis": None, "text": unknown}
    if unit not in ("rows", "captions"):
        basis = "config"
    rate = config.rates.get(item.step.name)
    seconds = work / rate if rate else None
    text = f"{work:,} {unit}" + (" (from config)" if basis == "config" else "")
    if seconds is not None:
        text += f", about {_time(seconds)}"
    return {"work": work, "unit": unit, "device_seconds": seconds, "basis": basis, "text": text}


def _work(planned: Step, config: Config, rows: int | None, captions: int | None) -> tuple[int | None, str]:
    """How much a step has to do, and of what; None where only the metadata can tell."""
    step = planned.name
    trainings = config.trainings_of(step).values()
    if trainings:
        return sum(training.images_after(training.num_steps) for training in trainings), "images seen"
    if step == "evaluate":
        return sum(_pictures(config, name, rows) for name in config.drawn_sets()), "pictures"
    if step.startswith("sample"):
        return _pictures(config, drawn_for(config, planned.output), rows), "pictures"
    if step == "extract":
        asked = feature_sets(config)[planned.output]
        reference = asked.key and config.eval.distances.references.get(asked.prompts)
        return _real(reference) if reference and not asked.inputs else _pictures(
            config, asked.prompts, rows
        ), "pictures"
    if step == "time_drawing":
        return 1, "table"
    if step == "export":
        return 1, "release"
    if step.startswith("import_") or step == "interpolate":
        return 1, "model"
    if step == "encode_text" and config.data.captions:
        return captions, "captions"
    return rows, "rows"


def _pictures(config: Config, name: str, rows: int | None) -> int:
    """How many a prompt set asks for, at most; those of files are counted, none where there is no good file.

    Of `rows` so many as the config says are held out: each caption's are taken for one.
    """
    if path := config.prompt_files().get(name):
        try:
            return len(prompts.read(path, config.eval.limit, config.seed, f"eval.prompts.{name}").prompts)
        except DataError:  # which is told elsewhere
            return 0
    if rows is None:
        return config.sample.limit
    held_out = min(rows, round(rows * config.data.holdout) + len(config.data.held_out_captions))
    return min(config.sample.limit, held_out if config.drawn_sets()[name] == HELD_OUT else rows - held_out)


def _real(path: str) -> int:
    """How many pictures lie at a path, none where there is no good place."""
    try:
        return len(Rival(path, "").everything())
    except DataError:  # which is told elsewhere
        return 0


def _size(count: int) -> str:
    """Bytes with three digits and a unit."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def _time(seconds: float, device: str = "device") -> str:
    if seconds < 600:
        return f"{seconds:.0f} {device}-seconds" if seconds >= 1 else f"less than 1 {device}-second"
    return f"{seconds / 3600:,.1f} {device}-hours"


def _phases(step: str, config: Config) -> list[str]:
    """The phases of a step's trainings, in words."""
    found = []
    for phase in (phase for training in config.trainings_of(step).values() for phase in training.phases):
        aspect = f" of up to {phase.max_aspect:g}:1" if phase.max_aspect > 1 else ""
        view = f", view {phase.view}" if phase.view else ""
        found.append(f"{phase.steps:,} steps of {phase.batch_size:,} pictures at {phase.size} px{aspect}{view}")
    return found


def _half(rows: int, micro_batch: int | None) -> int:
    """The largest divisor of the rows of a rank that is at most half of what goes through the model at a time now."""
    most = min(rows, micro_batch or rows) // 2
    return next(size for size in range(most, 0, -1) if rows % size == 0)
