"""What the storage has to say of itself while it works, to whoever wants to hear it: nothing is got over in silence."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retry:
    """A request failed for a reason that may pass; it is made again after a pause of `pause_s` seconds."""

    path: str
    reason: str
    pause_s: float

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; trying again"


@dataclass(frozen=True)
class PassedOver:
    """Something was done without: a file that is none of ours, or damaged; a cache that took no file."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"passed over {self.path}: {self.reason}"


Notice = Retry | PassedOver
Listener = Callable[[Notice], None]
_listeners: list[Listener] = []
_lock = threading.Lock()


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Tell `listener` every notice of this process during the block, in the thread in which it arises.

    What a listener raises goes to whoever asked the storage: so the wait for a store can be ended.
    """
    with _lock:
        _listeners.append(listener)
    try:
        yield
    finally:
        with _lock:
            _listeners.remove(listener)


def tell(notice: Notice) -> None:
    """Tell all listeners; where there is none, the log."""
    with _lock:
        listeners = list(_listeners)
    if not listeners:
        log.warning("%s", notice)
    for listener in listeners:
        listener(notice)
