"""Slots: how many workers of a job do the same thing at a time, such as asking one host."""

import contextlib
import itertools
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from pipeline.cluster.failures import get

SLOT_POLL_S = 0.05


class Slots:
    """How many of something are held at a time, over all workers, by name. Runs as an actor without a CPU of its own.

    A slot that its holder never gives back, because it died, is free again after `held_s`.
    """

    def __init__(self, each: int, held_s: float) -> None:
        self._each, self._held_s = each, held_s
        self._held: defaultdict[str, dict[int, float]] = defaultdict(dict)  # name -> ticket -> when it lapses
        self._tickets = itertools.count()

    def take(self, name: str) -> int | None:
        """A ticket for one of the slots of `name`, or None while all are held."""
        now = time.monotonic()
        held = self._held[name] = {ticket: end for ticket, end in self._held[name].items() if end > now}
        if len(held) >= self._each:
            return None
        ticket = next(self._tickets)
        held[ticket] = now + self._held_s
        return ticket

    def give_back(self, name: str, ticket: int) -> None:
        """End the hold of a ticket."""
        self._held[name].pop(ticket, None)
        if not self._held[name]:
            del self._held[name]


class SlotsClient:
    """A worker's view of the slots: `with slots(name)` holds one, waiting for it where all are held."""

    def __init__(self, slots: Any):
        self._slots = slots

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        while (ticket := get(self._slots.take.remote(name))) is None:
            time.sleep(random.uniform(0.5, 1.5) * SLOT_POLL_S)
        try:
            yield
        finally:
            self._slots.give_back.remote(name, ticket)
