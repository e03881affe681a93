"""Names of hosts and their addresses: looked up ahead, many at a time, each once, and for so long only.

The system's resolver has no deadline and cannot be stopped, and it holds the thread that asks. So each look-up has a
thread of its own, and one that is late is not waited for: its name counts as unknown until the answer comes after all.
"""

import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from datasets.outcomes import Lost, Outcome

Place = tuple[Any, ...]  # as `socket.getaddrinfo` gives it: family, type, protocol, name, (address, port, ...)
KEPT_S = 300.0  # answers, also that there is no such name
SOON_S = 5.0  # that a name server had none to give for now
REMEMBERED = 10_000  # answers, before those whose time is over are forgotten
LATE_AT_MOST = 8  # times as many look-ups as at a time may be late; then names wait for one of them to end


@dataclass(frozen=True)
class _Answer:
    """What is known of a name, up to a moment."""

    places: list[Place]
    loss: tuple[Outcome, str] | None
    until: float


class Names:
    """The addresses of hosts, for all threads of a process.

    Args:
        deadline_s: seconds for one look-up, after which its name counts as unknown.
        at_once: look-ups at a time.
    """

    def __init__(self, deadline_s: float, at_once: int):
        self._deadline_s, self._at_once = deadline_s, at_once
        self._changed = threading.Condition()
        self._known: dict[str, _Answer] = {}
        self._room = REMEMBERED
        self._queue: dict[str, None] = {}  # in the order in which they were asked for
        self._running: dict[str, float] = {}  # name -> when its look-up is late
        self._late: set[str] = set()

    def expect(self, names: Iterable[str]) -> None:
        """Look names up that will be asked for, in this order."""
        with self._changed:
            for name in names:
                self._ask(name)

    def places(self, name: str, port: int) -> list[Place]:
        """Where to connect to reach a host, in the resolver's order.

        Raises:
            Lost: there is no such name, or no answer in time.
        """
        with self._changed:
            while (answer := self._fresh(name)) is None:
                self._ask(name)
                ends = [end - time.monotonic() for end in self._running.values()]
                self._changed.wait(max(0.0, min([self._deadline_s, *ends])))
                self._give_up_the_late()
        if answer.loss:
            raise Lost(*answer.loss)
        return [(*about, (place[0], port, *place[2:])) for *about, place in answer.places]

    def _fresh(self, name: str) -> _Answer | None:
        answer = self._known.get(name)
        return answer if answer and answer.until > time.monotonic() else None

    def _ask(self, name: str) -> None:
        if not (self._fresh(name) or name in self._running or name in self._late):
            self._queue.setdefault(name)
            self._start()

    def _start(self) -> None:
        """Begin look-ups as long as there is room."""
        while self._queue and len(self._running) < self._at_once and len(self._late) < LATE_AT_MOST * self._at_once:
            name = next(iter(self._queue))
            del self._queue[name]
            self._running[name] = time.monotonic() + self._deadline_s
            threading.Thread(target=self._look_up, args=(name,), name="look-up", daemon=True).start()

    def _look_up(self, name: str) -> None:
        places, loss, kept_s = [], None, KEPT_S
        try:
            places = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            loss = Outcome.DNS, str(error)
            kept_s = SOON_S if error.errno == socket.EAI_AGAIN else KEPT_S
        except Exception as error:  # a name that no resolver takes, such as one with an empty label
            loss = Outcome.HTTP_ERROR, str(error)
        with self._changed:
            self._running.pop(name, None)
            self._late.discard(name)
            self._keep(name, _Answer(places, loss, time.monotonic() + kept_s))
            self._start()
            self._changed.notify_all()

    def _keep(self, name: str, answer: _Answer) -> None:
        if len(self._known) >= self._room:  # of the millions of hosts of a large plan
            now = time.monotonic()
            self._known = {other: known for other, known in self._known.items() if known.until > now}
            self._room = REMEMBERED + 2 * len(self._known)
        self._known[name] = answer

    def _give_up_the_late(self) -> None:
        now = time.monotonic()
        overdue = [name for name, end in self._running.items() if end <= now]
        for name in (*overdue, *(name for name in self._late if not self._fresh(name))):  # some never come back
            self._running.pop(name, None)
            self._late.add(name)
            loss = Outcome.DNS, f"no name server answered in {self._deadline_s:g} s"
            self._keep(name, _Answer([], loss, now + KEPT_S))
        self._start()
        self._changed.notify_all()
