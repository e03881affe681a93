"""What a bench tells: figures, some of them beside a bar."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Line(NamedTuple):
    """A figure, and the bar that it is held against, where it has one."""

    what: str
    figure: str
    bar: str = ""
    met: bool | None = None


def at_least(what: str, figure: str, value: float, bar: float) -> Line:
    """A line whose value should not be below its bar."""
    return Line(what, figure, f"at least {bar:,}", value >= bar)


def at_most(what: str, figure: str, value: float, bar: float) -> Line:
    """A line whose value should not be above its bar."""
    return Line(what, figure, f"at most {bar:,}", value <= bar)


def ratio(what: str, ours: Sequence[float], theirs: Sequence[float], bar: float | None = None, note: str = "") -> Line:
    """How many times as fast as theirs ours is: quartiles over pairs of seconds; the bar is for the median."""
    found = [b / a for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(found, n=4)
    figure = f"quartiles {low:.2f} {middle:.2f} {high:.2f} ({len(found)} pairs){note}"
    return Line(what, figure) if bar is None else at_least(what, figure, middle, bar)


def took(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of a clock that `work` takes."""
    began = clock()
    work()
    return clock() - began
