"""What a step's trainings leave in its artifact for whoever goes on with them, and in the end for the driver."""

from operator import itemgetter
from typing import Any

from datasets.files import json_files, storage
from pipeline.store.deleting import RESULT


def phase_file(model: str, number: int) -> str:
    """File of a model's weights after a phase, counted from 1, that was not the last."""
    return f"phases/{number}/{model}.safetensors"


def checkpoints_of(building: str, name: str) -> str:
    """Where a training of an unfinished artifact keeps its checkpoints."""
    return storage.join(building, "checkpoints", name)


def log_of(building: str, name: str) -> str:
    """Where a training of an unfinished artifact keeps what it logged up to each checkpoint, by step."""
    return storage.join(building, "log", name)


def logged_steps(building: str, name: str) -> list[tuple[int, dict[str, float]]]:
    """What a training of an unfinished artifact logged up to its last checkpoint: steps, in their order, and values."""
    logs = json_files.read_each(
        log_of(building, name), r"\d+\.json", lambda told: {int(step): told[step] for step in told}
    )
    return sorted((item for log in logs.values() for item in log.items()), key=itemgetter(0))


def result(artifact: str) -> dict[str, Any] | None:
    """What a finished job left for the driver in the artifact's folder, or None."""
    return json_files.read(storage.join(artifact, RESULT), _result)


def _result(told: dict[str, Any]) -> dict[str, Any]:
    return {key: told[key] for key in ("files", "metrics", "rows", "pids")}
