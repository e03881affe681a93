"""What each rank of a training job is told besides what to train."""

from collections.abc import Mapping
from dataclasses import dataclass

from datasets.files.fence import Fence


@dataclass(frozen=True)
class Job:
    """A step's trainings, once for each attempt at them; can be sent to the ranks.

    `path` is the artifact's folder, `building` the one for what only an unfinished build needs, `log` the step's log
    below the root, beside which ranks have theirs. `flops` are those of a picture, by training and size; `bytes` of
    memory what each rank takes where it recomputes nothing, by how many ranks there are.
    """

    path: str
    building: str
    fence: Fence
    log: str
    seed: int
    stall_s: float
    flops: Mapping[str, Mapping[int, int]]
    bytes: Mapping[int, int]
    attempt: int = 0  # counted from 1, when it begins
