"""How often each host is asked, and over how many connections: what it bears is learned from its answers.

A host is asked over one connection more than it has answered over, from two on: so never over more than one too many,
and as soon as it bears no more, for a while over none. That while grows each time that one more is tried in vain. One
more begins in the middle between others: a host that wants requests apart is not taken for one that counts them.

A host that has enough says so: with 429 or 503, with Retry-After, or by dropping a connection while it has others. It
is left alone for as long as it asks, and then asked less often; refusals of requests that were sent before it was first
heard are of the same cause. What it has answered until then, the pause included, is a rate that it bears. From there
the rate rises, as TCP's windows do (RFC 9438): quickly until it is refused; then from a part of that quickly at first,
slowly near to it, where it stays for a while, before more is tried.

A limit of connections and one of requests answer alike. If the connections were more than it has ever answered over,
they were too many; if as many, both may be; else they came too fast.
"""

import itertools
import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from datasets.outcomes import Lost, Outcome

POLL_S = 0.05  # between two looks whether a connection is free, at least
SELDOM_S = 2.0  # and at most
POLLS = 4  # looks of all who wait for a turn at a host: where there are more for each that is given, they become rarer
FIRST_PAUSE_S = 0.2  # of a host that says not how long; each further one is twice as long
TOGETHER = 2  # connections to a host of which nothing is known
LIFT_S = 2.0  # until one more connection is tried again
LIFT_LONGER = 4  # times as long after each that was tried in vain
GROWTH = 2.0  # of a rate with each answer, until it is refused: sevenfold in a second
BACK = 0.6  # of a rate that was refused: where it begins again, if the host has not answered at more
NEAR = 0.95  # of a rate that was refused: where it stays
CALM_S = 20.0  # at that rate, until more is tried
FULL = 1.0 - 1e-6  # tokens, as far as floating point fills them
REMEMBERED = 10_000  # hosts of which there was no refusal
UNPROVEN = 1 / 8  # of the patience with others, for a host that has never answered
CLOSED = 10  # times the patience, for a host with which it has come to an end


class Heard(Enum):
    """How a host has answered."""

    ANSWER = auto()
    REFUSAL = auto()  # it has enough
    NOTHING = auto()  # what says nothing of its pace


@dataclass(frozen=True)
class Turn:
    """A turn at a host: a ticket and the number of connections to it, this one included; or seconds to wait for one.

    `queued` says that the connections that it bears are taken, otherwise it is asked later.
    """

    ticket: int | None
    together: int = 0
    wait_s: float = 0.0
    queued: bool = False


class Pace(Protocol):
    """Gives out turns at hosts, to the threads of one process or to all workers of a job."""

    def take(self, host: str) -> Turn:
        """A turn, or how long to wait before the next question for one."""

    def give_back(self, host: str, turn: Turn, heard: Heard, after_s: float) -> None:
        """End a turn, with what was heard; a refusal may have asked for `after_s` seconds of patience."""


@dataclass
class _Host:
    """What is known of a host. Moments are on the clock of its `HostSlots`."""

    asked: float  # since when it is, without an answer
    borne: int = field(default=0, kw_only=True)  # connections over which it has answered
    proven: bool = False  # it has answered
    held: dict[int, tuple[float, int, float]] = field(default_factory=dict)  # ticket -> lapse, connections, beginning
    rate: float = math.inf  # requests a second that it bears
    polls: int = 0  # looks for a free connection since the last turn
    look_s: float = POLL_S  # between two looks of one who waits
    low: float = 0.0  # the rate after the last refusal
    top: float = math.inf  # and before: what it bears is not far below
    calm_s: float = 0.0  # since then, as far as the rate was used: each answer is worth 1 / rate
    tokens: float = 1.0
    filled: float = 0.0
    closed_until: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    reacted: float = -math.inf  # to a refusal: those of requests from before are of the same cause
    since: float = 0.0  # answers are counted from then on; at each count they and the time are halved
    answers: float = 0.0
    counted: bool = True  # there was none since the last count
    asked_at: float = -math.inf  # the last time
    answer_s: float = 0.0  # until an answer, of late
    lift_at: float = -math.inf  # until then it is asked over no more than it has borne
    lift_s: float = LIFT_S / LIFT_LONGER

    def early(self, now: float) -> float:
        """Seconds until one connection more than it has borne would be evenly spread among the others."""
        if not 0 < self.borne <= len(self.held):
            return 0.0
        return max(0.0, self.answer_s / (len(self.held) + 1) - (now - self.asked_at))

    def risen(self) -> float:
        """The rate after one more answer."""
        if self.top == math.inf or self.calm_s >= CALM_S:
            return self.rate + GROWTH
        near = NEAR * self.top
        return max(self.rate, near - (near - self.low) * (1 - self.calm_s / CALM_S) ** 3)

    def ceiling(self, now: float) -> int:
        """Connections that it is asked over."""
        return max(1, self.borne) if now < self.lift_at else max(TOGETHER, self.borne + 1)


class HostSlots:
    """The pace of each host, by name. Runs in a worker for itself, or for a whole job as an actor.

    Args:
        each: connections to one host at a time, at most.
        patience_s: seconds for which a host may have enough without an answer; then it is left alone.
        held_s: after so long a turn that nobody has given back is free again: its holder is dead.
        clock: seconds, monotonic.
    """

    def __init__(
        self, each: int, patience_s: float = 60.0, held_s: float = math.inf, clock: Callable[[], float] = time.monotonic
    ):
        self._each, self._patience_s, self._held_s, self._clock = each, patience_s, held_s, clock
        self._hosts: dict[str, _Host] = {}
        self._room = REMEMBERED
        self._tickets, self._random = itertools.count(), random.Random(0)
        self._lock = threading.Lock()

    def take(self, name: str) -> Turn:
        """A turn, or how long to wait before the next question for one."""
        with self._lock:
            now, host = self._clock(), self._host(name)
            host.held = {ticket: one for ticket, one in host.held.items() if one[0] > now}
            if wait_s := self._wait(host, now):
                host.polls += 1
                return Turn(None, wait_s=wait_s)
            if len(host.held) >= min(self._each, host.ceiling(now)):
                host.polls += 1
                return Turn(None, wait_s=host.look_s, queued=True)
            if early_s := host.early(now):
                return Turn(None, wait_s=early_s, queued=True)
            host.asked_at = now
            ticket, together = next(self._tickets), len(host.held) + 1
            host.held[ticket] = (now + self._held_s, together, now)
            host.tokens -= 1
            host.look_s = min(max(POLL_S, host.look_s * min(2.0, 0.9 + 0.1 * host.polls / POLLS)), SELDOM_S)
            host.polls = 0
            return Turn(ticket, together)

    def give_back(self, name: str, turn: Turn, heard: Heard = Heard.NOTHING, after_s: float = 0.0) -> None:
        """End a turn, with what was heard; a refusal may have asked for `after_s` seconds of patience."""
        with self._lock:
            now, host = self._clock(), self._host(name)
            assert turn.ticket is not None
            _, together, began = host.held.pop(turn.ticket, (now, turn.together, now))
            if heard is Heard.ANSWER:
                self._answered(host, now, together, now - began)
            elif heard is Heard.REFUSAL:
                self._refused(host, now, together, began, after_s)

    def _host(self, name: str) -> _Host:
        now = self._clock()
        if name not in self._hosts and len(self._hosts) >= self._room:  # of millions, those that refuse are remembered
            self._hosts = {name: host for name, host in self._hosts.items() if host.held or host.reacted > -math.inf}
            self._room = REMEMBERED + 2 * len(self._hosts)
        return self._hosts.setdefault(name, _Host(now, since=now))

    def _wait(self, host: _Host, now: float) -> float:
        """Seconds until a host may be asked; 0: now. Of many that wait, not all look for the same turn."""
        if now < host.closed_until:
            return host.closed_until - now
        if host.rate == math.inf:
            host.tokens = 1.0
        else:
            host.tokens = min(1.0, host.tokens + (now - host.filled) * host.rate)  # some bear no two at once
        host.filled = now
        if host.tokens >= FULL:
            return 0.0
        later = int(self._random.uniform(0.0, host.look_s) * host.rate)
        return (1.0 - host.tokens + later) / host.rate

    def _answered(self, host: _Host, now: float, together: int, seconds: float) -> None:
        host.answer_s = 0.8 * (host.answer_s or seconds) + 0.2 * seconds
        if together > max(1, host.borne):  # so what was refused before came too fast, not over too many
            host.lift_s, host.lift_at = LIFT_S / LIFT_LONGER, -math.inf
        host.borne = max(host.borne, together)
        host.asked, host.proven, host.pause_s = now, True, FIRST_PAUSE_S
        host.answers += 1
        host.counted = False
        if host.rate < math.inf:
            host.calm_s += 1 / host.rate
            host.rate = host.risen()

    def _refused(self, host: _Host, now: float, together: int, began: float, after_s: float) -> None:
        host.closed_until = max(host.closed_until, now + after_s)
        if began < host.reacted:
            return
        host.reacted = now
        too_many = together > max(1, host.borne)
        if together >= max(TOGETHER, host.borne):
            host.borne = min(host.borne, together - 1)
            host.lift_s *= LIFT_LONGER
            host.lift_at = now + host.lift_s * self._random.uniform(0.75, 1.25)  # not in step with requests
        pause_s = after_s or host.pause_s
        if not too_many:
            host.closed_until = max(host.closed_until, now + pause_s)
        if not too_many or host.top == math.inf:
            self._slow_down(host, now, pause_s)
        if now - host.asked > self._patience_s * (1 if host.proven else UNPROVEN):
            host.closed_until = max(host.closed_until, now + CLOSED * self._patience_s)

    def _slow_down(self, host: _Host, now: float, pause_s: float) -> None:
        """Take for a host's rate that at which it has answered, pauses included, or a part of what it was asked at."""
        host.pause_s = min(2 * host.pause_s, max(FIRST_PAUSE_S, self._patience_s / 4))
        host.tokens = 0.0
        if host.counted and host.rate < math.inf:
            return
        seconds = now - host.since
        borne = max(1.0, host.answers) / (seconds + pause_s)
        at_least = BACK * host.rate if host.rate < math.inf else 0.0
        host.top, host.low = host.rate, min(host.rate, max(borne, at_least))
        host.rate, host.calm_s = host.low, 0.0
        host.answers, host.since, host.counted = host.answers / 2, now - seconds / 2, True


@dataclass
class Patience:
    """Seconds that somebody still waits for hosts: for one that has enough, and for one whose connections are taken."""

    with_refusals_s: float
    in_queues_s: float = math.inf

    def turn(self, pace: Pace, host: str) -> Turn:
        """Wait for a turn at a host.

        Raises:
            Lost: as soon as it is clear that there will be none in time.
        """
        while self.with_refusals_s >= 0 and self.in_queues_s >= 0:
            turn = pace.take(host)
            if turn.ticket is not None:
                return turn
            seconds = turn.wait_s
            if turn.queued:
                seconds *= random.uniform(1.0, 1.5)
                self.in_queues_s -= seconds
            else:
                self.with_refusals_s -= seconds
            if min(self.with_refusals_s, self.in_queues_s) >= 0:
                time.sleep(seconds)
        raise Lost(Outcome.THROTTLED, f"{host} asked for patience, for longer than there is")
