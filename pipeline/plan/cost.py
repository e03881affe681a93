"""What a planned step would cost, before anything exists: work from counts, time from the rates."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from datasets.config import DataError
from datasets.planning.plan import Counts
from datasets.reading import prompts
from datasets.reading.rivals import Rival
from pipeline.errors import UsageError
from pipeline.models.feature_sets import feature_sets
from pipeline.models.prompt_sets import drawn_for
from pipeline.plan import training_memory, volume
from pipeline.plan.dag import Planned, Step, order
from pipeline.plan.table import rows as all_steps
from pipeline.plan.table import table
from pipeline.plan.volume import Volume
from pipeline.settings.config import Config
from pipeline.settings.evaluation import HELD_OUT
from stages.anatomy import flops
from stages.anatomy.memory_estimate import Memory

A100_FLOPS = 0.18 * flops.PEAKS["NVIDIA A100-SXM4-80GB"]  # the share of it that the paper's training of Stage C reached


@dataclass(frozen=True)
class Estimate:
    """What a planned step would cost; None where nobody can tell.

    `basis` says where the number of rows is from, `metadata`, `source` or `config`. `bytes` and `objects` are what it
    stores, `memory` is that of a training's worker. `cached_flops` and `online_flops` are those of an encoder whose
    outputs are stored, or made anew whenever a training sees a picture. `text` says it in short, `phases` are a
    training's.
    """

    work: int | None = None
    unit: str | None = None
    device_seconds: float | None = None
    basis: str | None = None
    text: str = ""
    bytes: int | None = None
    objects: int | None = None
    cached_flops: int | None = None
    online_flops: int | None = None
    memory: Memory | None = None
    phases: Sequence[str] = ()

    def document(self) -> dict[str, Any]:
        """As `plan --json` tells it: memory by what holds it, and its total."""
        memory = vars(self.memory) | {"total": self.memory.total} if self.memory else None
        return vars(self) | {"memory": memory}


def estimates(planned: Sequence[Planned], config: Config, counts: Counts | None = None) -> list[Estimate]:
    """What each step would cost, in the order of the plan.

    Rows come from the metadata's manifest when it stands, else from sources that have been listed (`counts`, those of
    `obstacles.ahead`), else from the config (marked so). `rates` of the config
    gives rows (for trainings: images seen) a device-second; a step may have none.

    Raises:
        UsageError: `rates` names a step that does not exist.
    """
    steps = [step.name for step in all_steps(config)]  # also trainings in whose place weights stand: a rate may stay
    for name in config.rates:
        if name not in steps:
            raise UsageError(f"rates.{name}: there is no such step; there are {', '.join(dict.fromkeys(steps))}")
    rows, basis = most_rows(planned, config, counts)
    wanted = {step.name for step in order(table(config), config.targets)}
    captions = _captions(planned, config, rows, counts)
    return [
        replace(
            _with_volume(_estimate(item, config, rows, captions, basis), item, config, rows, captions, wanted),
            memory=training_memory.needed(item.step.name, config) if item.state != "done" else None,
            phases=_phases(item.step.name, config),
        )
        for item in planned
    ]


def most_rows(planned: Sequence[Planned], config: Config, counts: Counts | None = None) -> tuple[int | None, str]:
    """The most rows that the data can have, None where only fetch can tell, and who says so, as in `basis`."""
    done = {item.step.output: item.artifact for item in planned if item.state == "done"}
    if metadata := done.get("metadata"):
        return metadata.manifest["rows"], "metadata"
    if counts and counts.of_all(config.data):
        return counts.planned, "source"
    return config.data.expected_rows, "config"


def _captions(planned: Sequence[Planned], config: Config, rows: int | None, counts: Counts | None) -> int | None:
    """The most captions that so many rows can have: where they are pictures, the source's own, and one by each of the
    others, which may have more; None where nobody can tell."""
    if rows is None or not config.data.captions:
        return rows
    done = {item.step.output: item.artifact for item in planned if item.state == "done"}
    metadata = done.get("metadata")
    listed = counts.captions if counts and counts.of_all(config.data) else rows
    own: int = metadata.manifest["notes"]["captions"] if metadata else listed
    written = (done.get(f"captions_{name}") for name in config.data.captioned)
    return own + sum(found.manifest["notes"]["captions"] if found else rows for found in written)


def _with_volume(
    estimate: Estimate,
    item: Planned,
    config: Config,
    rows: int | None,
    captions: int | None,
    wanted: Set[str],
) -> Estimate:
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
    text = estimate.text
    if stored and not item.artifact:
        text += f", at most {_size(stored.bytes)} in {stored.objects:,} objects"
    if encoder and encoder.online_flops > A100_FLOPS:  # less than a second is no choice to make
        cached, online = (_time(flops / A100_FLOPS, "A100") for flops in (encoder.cached_flops, encoder.online_flops))
        text += f"; by its FLOPs {cached}, online {online} and no bytes"
    return replace(
        estimate,
        text=text,
        bytes=stored.bytes if stored else None,
        objects=stored.objects if stored else None,
        cached_flops=encoder.cached_flops if encoder else None,
        online_flops=encoder.online_flops if encoder else None,
    )


def _estimate(item: Planned, config: Config, rows: int | None, captions: int | None, basis: str) -> Estimate:
    if item.state == "done" and item.artifact:
        spent = item.artifact.manifest["device_seconds"]
        return Estimate(text=f"spent {_time(spent)}")
    work, unit = _work(item.step, config, rows, captions)
    if work is None:
        return Estimate(unit=unit, text=f"{unit} unknown before fetch")
    if unit not in ("rows", "captions"):
        basis = "config"
    rate = config.rates.get(item.step.name)
    seconds = work / rate if rate else None
    text = f"{work:,} {unit}" + (" (from config)" if basis == "config" else "")
    if seconds is not None:
        text += f", {'about ' * (seconds >= 1)}{_time(seconds)}"
    return Estimate(work, unit, seconds, basis, text)


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
        count = f"{seconds:.0f}" if seconds >= 1 else "less than 1"
        return f"{count} {device}-second{'' if seconds < 1.5 else 's'}"
    return f"{seconds / 3600:,.1f} {device}-hours"


def _phases(step: str, config: Config) -> list[str]:
    """The phases of a step's trainings, in words."""
    found = []
    for phase in (phase for training in config.trainings_of(step).values() for phase in training.phases):
        aspect = f" of up to {phase.max_aspect:g}:1" if phase.max_aspect > 1 else ""
        view = f", view {phase.view}" if phase.view else ""
        found.append(f"{phase.steps:,} steps of {phase.batch_size:,} pictures at {phase.size} px{aspect}{view}")
    return found
