"""Ending a run on request: the first Ctrl-C, SIGTERM or closed terminal lets it save, where there is anything."""

import contextlib
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from datasets.files import retrying
from datasets.files.errors import StoreAway
from pipeline.errors import Interrupted
from pipeline.terminal import console

SAME_SIGNAL_S = 1.0  # who signals a process and then its group, as timeout(1) does, asks once
STOPPING_S = 10.0  # that a store which is away may delay a stop on request
POLL_S = 0.2  # between two looks whether somebody asked for the end


@dataclass
class Stop:
    """The signal that asked for the end, if one did; `watch` may find another reason."""

    number: int | None = None
    since: float = 0.0
    watch: Callable[[], Interrupted | None] = lambda: None
    waits: bool = True  # a signal is seen at the next check; else it ends what goes on at once

    def __call__(self) -> Interrupted | None:
        return self.watch() if self.number is None else Interrupted(self.number)

    def raise_if_asked(self) -> None:
        """End the run here."""
        if reason := self():
            raise reason

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A block of which nothing is worth saving: the first signal ends it wherever it stands.

        Raises:
            Interrupted: it came, or had come before.
        """
        self.raise_if_asked()
        self.waits = False
        try:
            yield
            self.waits = True
        except BaseException as error:  # libraries may make another error of it
            self.waits = True
            if self.number is not None and not isinstance(error, Interrupted):
                raise Interrupted(self.number) from error
            raise
        self.raise_if_asked()  # they may have passed over it


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """The first SIGINT, SIGTERM or SIGHUP asks for a clean end, a later one ends at once; nohup(1) keeps SIGHUP away.

    Raises:
        Interrupted: it was asked for, and then the storage was away: what is not written is made again by the next run.
    """
    stop = Stop()

    def handle(number: int, _: FrameType | None) -> None:
        if stop.number is not None:
            if time.monotonic() - stop.since > SAME_SIGNAL_S:
                raise KeyboardInterrupt
            return
        stop.number, stop.since = number, time.monotonic()
        if number == signal.SIGHUP:
            _leave_closed_terminal()
        if not stop.waits:
            raise KeyboardInterrupt
        retrying.set_patience(min(STOPPING_S, retrying.patience_s()))
        console.print("[yellow]saving and stopping; once more to abort at once[/]")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    heeded = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        heeded.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in heeded}
    try:
        yield stop
    except StoreAway:
        stop.raise_if_asked()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_closed_terminal() -> None:
    """Let go nowhere what went to a terminal that is gone, where each word would be an error."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
                os.dup2(nowhere, number)
    os.close(nowhere)


def pause(seconds: float, stopped: Callable[[], Interrupted | None]) -> None:
    """Wait, or until somebody asks for the end."""
    deadline = time.monotonic() + seconds
    while stopped() is None and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(POLL_S, left))
