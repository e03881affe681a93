"""What a run tells Prometheus, through Ray: the one list of metrics, and what is projected onto it.

Each is a projection of a figure that is gathered anyway, by trainings, progress, receipts or the ledger; nothing is
measured for it. Rules and board (`verbs.infra.monitoring`) name metrics of this list alone. Ray is imported where the
first value is told, so that `infra render` does without.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

PREFIX = "wuerstchen_"
RAY = "ray_"  # which Ray puts before the names of all metrics
RUN = ("run", "step")  # labels of all of ours


@dataclass(frozen=True)
class Metric:
    """A figure of a step, its artifact by name; NaN, which Ray leaves out of a scrape, where there is nothing to tell.

    `labels` are beside `run` and `step`. What is `kept` stands when the step has ended; all others are then NaN, so
    that no rule speaks of what is over.
    """

    name: str
    what: str
    labels: tuple[str, ...] = ()
    kept: bool = False

    @property
    def series(self) -> str:
        """Its name in Prometheus."""
        return f"{RAY}{PREFIX}{self.name}"


DONE = Metric("done", "Work done, in units such as images or steps", ("unit",))
BACKLOG = Metric("backlog", "Work left, in the same units", ("unit",))
PROGRESS = Metric("progress_timestamp_seconds", "When more was done last, in seconds since 1970")
DEVICE_HOURS = Metric("device_hours", "Device-hours of the build so far, runs before included", kept=True)
LOST = Metric("lost_pictures", "Pictures that are lost, by cause", ("cause",), kept=True)
RANKS = Metric("ranks", "Ranks that train")
CHECKPOINT = Metric(
    "checkpoint_timestamp_seconds", "When a state was saved last, or the attempt began, in seconds since 1970"
)
IMAGES = Metric("images_per_second", "Images that a rank trains on, a second", ("training",))
MFU = Metric("mfu", "Share of the device's peak FLOP/s that a rank reaches; NaN where that is unknown", ("training",))
DATA_WAIT = Metric("data_wait", "Share of the time that a rank waits for batches", ("training",))
SAVE_STALL = Metric("save_stall", "Share of the time that a rank waits for a state to be saved", ("training",))
LOSS = Metric("loss", "Mean over the ranks since the last entry", ("training",))

TRAINED = {  # by what trainings call them
    "speed/images_per_second": IMAGES,
    "speed/mfu": MFU,
    "speed/waiting_for_data": DATA_WAIT,
    "speed/saving": SAVE_STALL,
    "loss": LOSS,
}
METRICS = (DONE, BACKLOG, PROGRESS, DEVICE_HOURS, LOST, RANKS, CHECKPOINT, *TRAINED.values())

Put = Callable[[Metric, float, Mapping[str, str]], None]


def _nowhere(metric: Metric, value: float, labels: Mapping[str, str]) -> None:
    """Nobody hears of it."""


class Projection:
    """The metrics of a step that goes on; `put` takes a value with its labels beside `run` and `step`."""

    def __init__(self, put: Put = _nowhere, clock: Callable[[], float] = time.time) -> None:
        self._put_it, self._clock = put, clock
        self._over: set[tuple[Metric, tuple[tuple[str, str], ...]]] = set()  # NaN at the end
        self._furthest: dict[str, int] = {}

    def progress(self, done: int, total: int, unit: str) -> None:
        """So much is done of a total."""
        self._put(DONE, done, unit=unit)
        self._put(BACKLOG, max(0, total - done), unit=unit)
        if done != self._furthest.get(unit):  # less is what a new attempt begins with
            self._furthest[unit] = done
            self._put(PROGRESS, self._clock())

    def device_hours(self, hours: float) -> None:
        """Of the build so far."""
        self._put(DEVICE_HOURS, hours)

    def lost(self, causes: Mapping[str, int]) -> None:
        """Pictures that are lost so far, by cause."""
        for cause, count in causes.items():
            self._put(LOST, count, cause=cause)

    def begin_training(self, ranks: int) -> None:
        """An attempt begins on so many ranks."""
        self._put(RANKS, ranks)
        self._put(CHECKPOINT, self._clock())

    def saved(self) -> None:
        """A state is kept: the first rank's part of it, others may be on their way."""
        self._put(CHECKPOINT, self._clock())

    def trained(self, values: Mapping[str, float]) -> None:
        """An entry of a training's log, `<training>/<figure>`; what is not in the list is passed over."""
        training = next(iter(values), "").partition("/")[0]
        for name, metric in TRAINED.items():
            self._put(metric, values.get(f"{training}/{name}", math.nan), training=training)

    def end(self) -> None:
        """The step has ended."""
        for metric, labels in self._over:
            self._put_it(metric, math.nan, dict(labels))

    def _put(self, metric: Metric, value: float, **labels: str) -> None:
        assert set(labels) == set(metric.labels), metric.name
        if not metric.kept:
            self._over.add((metric, tuple(labels.items())))
        self._put_it(metric, float(value), labels)


@contextmanager
def exported(run: str, step: str) -> Iterator[Projection]:
    """What is told of a step meanwhile, through the Ray of this process: its nodes have ports to scrape."""

    def put(metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        _gauge(metric).set(value, {"run": run, "step": step, **labels})

    told = Projection(put)
    try:
        yield told
    finally:
        told.end()


@cache
def _gauge(metric: Metric) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(PREFIX + metric.name, metric.what, (*RUN, *metric.labels))
