"""Where a step's progress and words go: the screen, MLflow, and a log of its own below the root."""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets.files.retrying import persistently
from pipeline.cluster.metrics import Projection
from pipeline.errors import STOPPED
from pipeline.run.progress import StepProgress
from pipeline.store import log_files
from pipeline.tracking.projection import SO_FAR

LOG_EVERY_S = 5.0  # between lines of progress in a step's log
WARMUP = "compressor"  # whose steps begin anew with the training that follows it

log = logging.getLogger(__name__)


@dataclass
class StepReporter:
    """Progress goes to the screen, measurements and pictures to MLflow, and all of it is told to the step's log.

    Prometheus hears of some of it, see `cluster.metrics`.
    """

    screen: StepProgress
    tracked: Any
    warnings: list[str]
    logged: float = field(default_factory=time.monotonic)  # when progress was logged last
    hours: Callable[[], float] | None = None  # device-hours of the build so far
    furthest: dict[tuple[int, str], int] = field(default_factory=dict)  # most that was done, by what of
    further: bool = False
    sign: Callable[[int, int, str], None] = lambda done, total, unit: None  # for `status`
    exported: Projection = field(default_factory=Projection)

    def progress(self, done: int, total: int, unit: str) -> None:
        self.screen.update(done, total, unit)
        self.sign(done, total, unit)
        self.exported.progress(done, total, unit)
        if self.hours:
            self.exported.device_hours(self.hours())
        if done > self.furthest.get((total, unit), 0):
            self.furthest[total, unit], self.further = done, True
        if done >= total or time.monotonic() - self.logged > LOG_EVERY_S:
            self.logged = time.monotonic()
            log.info("%s of %s %s", f"{done:,}", f"{total:,}", unit)

    def begin_attempt(self) -> None:
        """What is done is told from nothing on: an attempt begins with what those before it have left."""
        self.screen.done = 0

    def got_further(self) -> bool:
        """Whether more was done, since it was asked last, than ever before."""
        further, self.further = self.further, False
        return further

    def advance(self, count: int, total: int, unit: str) -> None:
        self.progress(self.screen.done + count, total, unit)

    def lost(self, causes: Mapping[str, int]) -> None:
        self.exported.lost(causes)

    def begin_training(self, ranks: int) -> None:
        self.exported.begin_training(ranks)

    def saved(self, training: str, step: int) -> None:
        self.exported.saved()
        log.info("%s: step %d is saved", training, step)

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.exported.trained(values)
        training = next(iter(values), "").partition("/")[0]
        told = {f"{SO_FAR}/{training}" if training == WARMUP else SO_FAR: self.hours()} if self.hours else {}
        self.tracked.metrics(values | told, step)
        log.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def system(self, values: dict[str, float], step: int) -> None:
        self.tracked.metrics(values, step)

    def image(self, name: str, png: bytes, step: int) -> None:
        self.tracked.image(name, png, step)
        log.info("step %d: picture %s", step, name)

    def warning(self, text: str) -> None:
        log.warning(text)
        self.warnings.append(text)


@contextlib.contextmanager
def logging_to(path: str, warn: Callable[[str], None]) -> Iterator[Collection[str]]:
    """Send the driver's log records to a step's log; where that cannot be kept, `warn` is told, and no step ends.

    Gives the last lines of the log, as they come.

    Raises:
        StorageError: it cannot even be begun.
    """
    file = persistently(path, lambda: log_files.LogFile(path, warn))
    close = log_files.attached(file, "pipeline")
    try:
        yield file.last
    except STOPPED as error:
        log.info("stopped on request: %s", error or "at once, without a save")
        raise
    except Exception:
        log.exception("the step ended with an error")
        raise
    finally:
        close()
