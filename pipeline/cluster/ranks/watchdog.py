"""Stalls: a rank that stops makes all others wait for it, each in another place. All tell the board what they do."""

import logging
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from stages.training.activity import SAVING, Activity

log = logging.getLogger(__name__)

EXIT_STALLED = 70
BEATS = 5  # in the time that counts as a stall
LAST_WORDS_S = 10.0  # that a log may take to be written, where a store takes it, before the process ends


class Board(Protocol):
    """What ranks tell of themselves to."""

    def beat(self, rank: int, step: int, doing: str, seconds: float, stall_s: float) -> str | None:
        """What a rank does, and for how long; the answer is the stall that all of them are in, if they are."""

    def rest(self, rank: int) -> None:
        """A rank does nothing that could stall."""


@dataclass(frozen=True)
class Pulse:
    """What a rank did when it was last heard of: steps done, doing what, for how many seconds; and when that was."""

    step: int
    doing: str
    seconds: float
    heard: float


class Pulses:
    """A board for the ranks of one job."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.stall: str | None = None
        self._clock = clock
        self._pulses: dict[int, Pulse] = {}
        self._storage_works = -math.inf  # the last sign that it gets further while ranks wait for it

    def beat(self, rank: int, step: int, doing: str, seconds: float, stall_s: float) -> str | None:
        """See `Board`."""
        now = self._clock()
        self._pulses[rank] = Pulse(step, doing, seconds, now)
        if doing == SAVING:  # a state may take long, as long as it gets further
            self._storage_works = max(self._storage_works, now - seconds)
        if now - self._storage_works > stall_s:
            self.stall = self.stall or _stall(self._pulses, now, stall_s)
        return self.stall

    def storage_fails(self) -> None:
        """A rank asks the storage again, for which the others wait: that has a patience of its own, and is no stall."""
        self._storage_works = self._clock()

    def rest(self, rank: int) -> None:
        """See `Board`."""
        self._pulses.pop(rank, None)


def _stall(pulses: dict[int, Pulse], now: float, stall_s: float) -> str | None:
    """What each rank does, who is least far first, in words, where one has done it for too long or fell silent."""
    silent = {rank for rank, pulse in pulses.items() if now - pulse.heard > stall_s}
    if not silent and all(pulse.seconds <= stall_s for pulse in pulses.values()):
        return None
    places: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
    for rank, pulse in pulses.items():
        places[pulse.step, f"{pulse.doing}{', and silent since' if rank in silent else ''}"].append(rank)
    # Who waits does so where most are; who is behind, or alone, comes first.
    ordered = sorted(places.items(), key=lambda place: (place[0][0], len(place[1])))
    parts = [f"rank {_listed(ranks)} after step {step}: {doing}" for (step, doing), ranks in ordered]
    return f"nothing went on for {stall_s:g} s (cluster.stall_s): {'; '.join(parts)}"


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, sorted(ranks)[:8]))
    return f"{shown} and {len(ranks) - 8} more" if len(ranks) > 8 else shown


class Watchdog:
    """Tells the board what this rank does, from a thread, and ends the process where the board finds a stall.

    Ending it is all that helps: a rank inside a collective can neither be interrupted nor leave it. The step's next
    attempt goes on from the newest checkpoint.
    """

    def __init__(
        self,
        board: Board,
        rank: int,
        doing: Activity,
        stall_s: float,
        end: Callable[[int], None] = os._exit,
    ):
        self._board, self._rank, self._doing, self._stall_s, self._end = board, rank, doing, stall_s, end
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._board.rest(self._rank)

    def _watch(self) -> None:
        while True:  # at once, so that the board knows of every rank
            step, doing, seconds = self._doing.now()
            if found := self._board.beat(self._rank, step, doing, seconds, self._stall_s):
                log.error(found)
                last_words = threading.Thread(target=_flush, daemon=True)
                last_words.start()
                last_words.join(LAST_WORDS_S)
                self._end(EXIT_STALLED)
            if self._over.wait(self._stall_s / BEATS):
                return


def _flush() -> None:
    for handler in logging.getLogger("pipeline").handlers:
        handler.flush()
