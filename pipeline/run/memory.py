"""Peak memory of a run: the summed PSS of this process and everything below it, sampled each second or less often.

PSS counts a page that n processes share as 1/n in each, so the sum is what the tree occupies; summed RSS
would count Ray's object store and every library's pages once per process.
"""

import threading
import time
from types import TracebackType

import psutil

INTERVAL_S = 1.0
SHARE = 0.02  # of the time, at most, that is spent on samples: one takes the kernel 1 to 50 ms a process


class PeakMemory:
    """Samples in the background while the `with` block runs.

    `peak_bytes` is the largest sum so far.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._lap_bytes = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def lap(self) -> None:
        """Begin a new lap."""
        with self._lock:
            self._lap_bytes = 0

    def lap_bytes(self) -> int:
        """The largest sum of the lap so far, now included: it may be shorter than the time between two samples."""
        self._look()
        return self._lap_bytes

    def _sample(self) -> None:
        while True:
            began = time.monotonic()
            self._look()
            if self._stop.wait(max(INTERVAL_S, (time.monotonic() - began) / SHARE)):
                break

    def _look(self) -> None:
        with self._lock:  # so that no sample of the lap before counts in this one
            now = tree_bytes()
            self.peak_bytes, self._lap_bytes = max(self.peak_bytes, now), max(self._lap_bytes, now)


def tree_bytes() -> int:
    """Summed PSS in bytes of this process and all its descendants, now."""
    this = psutil.Process()
    return sum(_pss(process) for process in [this, *this.children(recursive=True)])


def _pss(process: psutil.Process) -> int:
    try:
        usage = process.memory_full_info()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0  # it ended since the tree was listed
    return int(getattr(usage, "pss", usage.uss))  # macOS tells only what a process has for itself
