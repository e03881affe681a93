"""What a planned step would cost, before anything exists: work from counts, time from the rates in the config."""

from collections.abc import Sequence
from typing import Any

from pipeline.config import Config
from pipeline.dag import Planned
from pipeline.errors import UsageError
from pipeline.steps import table


def estimates(planned: Sequence[Planned], config: Config) -> list[dict[str, Any]]:
    """For each step its work, device-seconds and a text; null where a step is done or its rate is unknown.

    Rows come from the metadata's manifest when it stands, else from the config (marked so). `rates` of the config
    gives rows (for trainings: images seen) a device-second; a step may have none.

    Raises:
        UsageError: `rates` names a step that does not exist.
    """
    steps = [step.name for step in table(config)]
    for name in config.rates:
        if name not in steps:
            raise UsageError(f"rates.{name}: there is no such step; there are {', '.join(dict.fromkeys(steps))}")
    metadata = next((item.artifact for item in planned if item.step.output == "metadata" and item.artifact), None)
    rows = metadata.manifest["rows"] if metadata else config.data.expected_rows
    basis = "metadata" if metadata else "config"
    return [_estimate(item, config, rows, basis) for item in planned]


def _estimate(item: Planned, config: Config, rows: int | None, basis: str) -> dict[str, Any]:
    if item.state == "done" and item.artifact:
        spent = item.artifact.manifest["device_seconds"]
        return {"work": None, "unit": None, "device_seconds": None, "basis": None, "text": f"spent {_time(spent)}"}
    work, unit = _work(item.step.name, config, rows)
    if work is None:
        unknown = f"{unit} unknown before fetch"
        return {"work": None, "unit": unit, "device_seconds": None, "basis": None, "text": unknown}
    if unit != "rows":
        basis = "config"
    rate = config.rates.get(item.step.name)
    seconds = work / rate if rate else None
    text = f"{work:,} {unit}" + (" (from config)" if basis == "config" else "")
    if seconds is not None:
        text += f", about {_time(seconds)}"
    return {"work": work, "unit": unit, "device_seconds": seconds, "basis": basis, "text": text}


def _work(step: str, config: Config, rows: int | None) -> tuple[int | None, str]:
    """How much a step has to do, and of what; None where only the metadata can tell."""
    trainings = config.trainings_of(step)
    if trainings:
        return sum(training.images_after(training.num_steps) for training in trainings), "images seen"
    if step in ("sample", "sample_baseline", "evaluate"):
        return min(config.sample.limit, rows or config.sample.limit), "pictures"
    if step == "export":
        return 1, "release"
    return rows, "rows"


def _time(device_seconds: float) -> str:
    if device_seconds < 600:
        return f"{device_seconds:.0f} device-seconds"
    return f"{device_seconds / 3600:,.1f} device-hours"
