"""The budget of a plan, before anything runs: a line for each step and phase, and the total.

Rates come from what this root has trained on the same kind of device, where it has; else from the conf's `rates` (of
scale=paper: the paper's speed), else from FLOPs at the share of an A100's peak that the paper's Stage C reached. Each
line says which: `root`, `conf`, or the share. Imports no torch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets.planning.plan import Counts
from pipeline.hours.paper import paper_kg
from pipeline.plan import cost, training_flops
from pipeline.plan.cost import Estimate
from pipeline.plan.dag import Planned
from pipeline.settings.config import Config
from pipeline.store.artifacts import Artifact
from pipeline.store.ledger import CPU
from stages.anatomy import parameters

FP32 = 4  # bytes of a stored weight
BY_A100 = "18 % of A100"
BASES = "root, what was trained here; conf, its `rates` (of scale=paper, the paper's speed); 18 % of A100, by FLOPs"


@dataclass(frozen=True)
class Line:
    """What a step, or a phase of it, would take; None where nobody can tell.

    `hours` are device-hours, `wall_h` hours of a clock, `kg` of CO2 by the paper's method; `basis` says where the rate
    is from.
    """

    step: str
    phase: str
    parameters: int | None = None
    rank_bytes: int | None = None
    flops: int | None = None  # of an image, forward and backward
    images: int | None = None
    hours: float | None = None
    wall_h: float | None = None
    stored_bytes: int | None = None
    kg: float | None = None
    cost: float | None = None
    basis: str = ""


def lines(
    planned: Sequence[Planned], estimates: Sequence[Estimate], config: Config, made: Iterable[Artifact]
) -> list[Line]:
    """The budget of all steps that are not done; `made` are the root's finished artifacts."""
    speeds = _speeds(made, config)
    found: list[Line] = []
    for item, estimate in zip(planned, estimates, strict=True):
        if item.state == "done":
            continue
        if config.trainings_of(item.step.name):
            found += _training(item.step.name, config, estimate, speeds)
        elif estimate.bytes or estimate.device_seconds or estimate.cached_flops:
            found.append(_other(item.step.name, config, estimate))
    return found


def predicted(
    planned: Sequence[Planned], config: Config, made: Iterable[Artifact], counts: Counts | None = None
) -> float | None:
    """Device-hours of all that is to do; None where some are those of an A100, whatever this machine has."""
    found = lines(planned, cost.estimates(planned, config, counts), config, made)
    return None if BY_A100 in {line.basis for line in found} else total(found).hours


def total(found: Sequence[Line]) -> Line:
    """All lines together, of what is known."""

    def add(name: str) -> Any:
        known = [getattr(line, name) for line in found if getattr(line, name) is not None]
        return sum(known) if known else None

    sums = {name: add(name) for name in ("hours", "wall_h", "stored_bytes", "kg", "cost")}
    return Line("total", "", **sums)


def _training(step: str, config: Config, estimate: Estimate, speeds: Mapping[str, tuple[float, str]]) -> Iterator[Line]:
    """A line a phase; the step's device-seconds go to them by their FLOPs."""
    each = training_flops.per_picture(step, config)
    phases = [(name, phase) for name, training in config.trainings_of(step).items() for phase in training.phases]
    work = [phase.steps * phase.batch_size * each[name][phase.size] for name, phase in phases]
    seconds, basis = _seconds(step, sum(work), estimate, speeds)
    needs = estimate.memory.total if estimate.memory else None
    devices = config.ranks_of(step) * max(1, config.cluster.gpus_per_worker)
    for (name, phase), flops in zip(phases, work, strict=True):
        count = _parameters(name, config)
        hours = seconds * flops / sum(work) / 3600
        yield Line(
            step,
            f"{phase.steps:,}x{phase.batch_size:,} {phase.size}px",
            parameters=count,
            rank_bytes=needs,
            flops=each[name][phase.size],
            images=phase.steps * phase.batch_size,
            hours=hours,
            wall_h=hours / devices,
            stored_bytes=FP32 * count,
            kg=_kg(hours, basis),
            cost=_cost(hours, config),
            basis=basis,
        )


def _seconds(step: str, flops: int, estimate: Estimate, speeds: Mapping[str, tuple[float, str]]) -> tuple[float, str]:
    """Device-seconds of a training, and where the rate is from."""
    if step in speeds:
        speed, kind = speeds[step]
        return flops / speed, f"root, {kind}"
    if estimate.device_seconds is not None:
        return estimate.device_seconds, "conf"
    return flops / cost.A100_FLOPS, BY_A100


def _other(step: str, config: Config, estimate: Estimate) -> Line:
    seconds, basis = estimate.device_seconds, "conf"
    if seconds is None and estimate.cached_flops:
        seconds, basis = estimate.cached_flops / cost.A100_FLOPS, BY_A100
    hours = None if seconds is None else seconds / 3600
    return Line(
        step,
        "",
        images=estimate.work,
        hours=hours,
        wall_h=None if hours is None else hours / (config.cluster.encoders.max * config.cluster.encoders.gpus),
        stored_bytes=estimate.bytes,
        kg=None if hours is None else _kg(hours, basis),
        cost=None if hours is None else _cost(hours, config),
        basis=basis if hours is not None else "",
    )


def _kg(hours: float, basis: str) -> float | None:
    return None if basis.endswith(CPU) else paper_kg(hours)


def _cost(hours: float, config: Config) -> float | None:
    price = config.cluster.price_per_hour
    return None if price is None else hours * price


def _parameters(training: str, config: Config) -> int:
    """Of all that a training trains or sees, as its checkpoint holds them."""
    match training:
        case "stage_a":
            return parameters.stage_a(config.stage_a.model)
        case "compressor":
            return parameters.compressor(config.compressor.model)
        case "stage_b":
            return parameters.stage_b(config.stage_b.model)
        case "stage_c":
            return parameters.stage_c(config.stage_c.model)
        case "previewer":
            return parameters.previewer(config.previewer.model)
        case "baseline":
            return parameters.baseline(config.baseline.model)
    raise AssertionError(f"{training} is no training")


def _speeds(made: Iterable[Artifact], config: Config) -> dict[str, tuple[float, str]]:
    """FLOP/s over all of its time, failures included, and the kind of device, of each training's newest artifact."""
    found = {}
    for artifact in made:  # oldest first
        told = artifact.manifest
        flops, seconds, kind = (
            told.get("metrics", {}).get("model_flops"),
            told.get("device_seconds"),
            told.get("devices"),
        )
        same = config.cluster.device == "auto" or (kind == CPU) == (config.cluster.device == CPU)
        if flops and seconds and kind and same:
            found[told["step"]] = (flops / seconds, kind)
    return found
