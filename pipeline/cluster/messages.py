"""What workers tell the driver by the board: a value of one of these classes each time, or a notice of the storage.

`steps.build` says what the driver does on each.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from datasets.files.notices import Notice


@dataclass(frozen=True)
class Advanced:
    """So much more work is done of a total."""

    count: int
    total: int
    unit: str


@dataclass(frozen=True)
class Reached:
    """So much work is done of a total."""

    done: int
    total: int
    unit: str


@dataclass(frozen=True)
class Assembled:
    """All ranks are there; the first has held its device for `age` seconds."""

    age: float


@dataclass(frozen=True)
class Resumed:
    """A training goes on after so many steps."""

    training: str
    step: int


@dataclass(frozen=True)
class Logged:
    """What was measured at a training's step."""

    training: str
    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class Saved:
    """A training's state after so many steps is kept: the first rank's part of it."""

    training: str
    step: int


@dataclass(frozen=True)
class Drawn:
    """A picture for the reviewers, as PNG."""

    name: str
    png: bytes
    step: int


@dataclass(frozen=True)
class Spent:
    """Seconds by the ledger's phases until a training's step, of a rank that has held its device for `age` seconds."""

    training: str
    step: int
    seconds: Mapping[str, float]
    age: float


@dataclass(frozen=True)
class Energy:
    """J that the GPUs of a node have used in this job so far."""

    node: int
    joules: float


@dataclass(frozen=True)
class Sampled:
    """Figures of a node's GPUs, by a number of their own."""

    values: dict[str, float]
    number: int


@dataclass(frozen=True)
class Warned:
    """Something that went wrong and was got over."""

    text: str


@dataclass(frozen=True)
class Sums:
    """Seconds that ranks need to add up their numbers, by which of PyTorch's backends."""

    backend: str
    seconds: float


Message = (
    Advanced
    | Reached
    | Assembled
    | Resumed
    | Logged
    | Saved
    | Drawn
    | Spent
    | Energy
    | Sampled
    | Warned
    | Sums
    | Notice
)
