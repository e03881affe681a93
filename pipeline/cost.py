"""What a planned step would cost, before anything exists: work from counts, time from the rates in the config."""

from collections.abc import Sequence
from typing import Any

from pipeline.config import Config
from pipeline.dag import Planned


def estimates(planned: Sequence[Planned], config: Config) -> list[dict[str, Any]]:
    """For each step its work, device-seconds and a text; null where a step is done or its rate is unknown.

    Rows come from the metadata's manifest when it stands, else from the config (marked so). `rates` of the config
    gives rows (for trainings: images seen) a device-second; a step may have none.
    """
    metadata = next((item.artifact for item in planned if item.step.output == "metadata" and item.artifact), None)
    rows = metadata.manifest["rows"] if metadata else config.data.expected_rows
    basis = "metadata" if metadata else "config"
    return [_estimate(item, config, rows, basis) for item in planned]


def _estimate(item: Planned, config: Config, rows: int | None, basis: str) -> dict[str, Any]:
    if item.state == "done" and item.artifact:
        spent = item.artifact.manifest["device_seconds"]
        return {"work": None, "unit": None, "device_seconds": None, "basis": None, "text": f"spent {_time(spent)}"}
    trainings = config.trainings_of(item.step.name)
    if trainings:
        work: int | None = sum(training.images_after(training.num_steps) for training in trainings)
        unit = "images seen"
        basis = "config"
    else:
        work, unit = rows, "rows"
    rate = config.rates.get(item.step.name)
    seconds = work / rate if work is not None and rate else None
    if work is None:
        text = "rows unknown until fetch has run"
    else:
        known = "" if basis == "metadata" or trainings else " (from config)"
        text = f"{work:,} {unit}{known}" + (f", about {_time(seconds)}" if seconds is not None else "")
    return {"work": work, "unit": unit, "device_seconds": seconds, "basis": basis, "text": text}


def _time(device_seconds: float) -> str:
    if device_seconds < 600:
        return f"{device_seconds:.0f} device-seconds"
    return f"{device_seconds / 3600:,.1f} device-hours"
