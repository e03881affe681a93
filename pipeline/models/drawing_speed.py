"""The table of how fast pictures are drawn: a line for each number of pictures at a time, eager and compiled."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.store.artifacts import Artifact

FILE, ARTIFACT = "speed.json", "speed"
STAGES = ("stage_c", "stage_b", "stage_a")


@dataclass(frozen=True)
class Timing:
    """Seconds a picture of each stage, `batch` of them drawn at a time."""

    mode: str
    batch: int
    device: str
    precision: str
    stage_c: float
    stage_b: float
    stage_a: float


def read(inputs: Mapping[str, Artifact]) -> list[Timing]:
    """What was measured, where it was."""
    return [Timing(**row) for row in json.loads(inputs[ARTIFACT].read(FILE))] if ARTIFACT in inputs else []


def metrics(timed: Iterable[Timing]) -> dict[str, float]:
    """The lines by name."""
    return {
        f"seconds_a_picture/{line.mode}/batch_{line.batch}/{stage}": getattr(line, stage)
        for line in timed
        for stage in STAGES
    }
