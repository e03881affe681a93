"""Looking names up: within a deadline, each once, many at a time. The resolver is a stub that takes its time."""

import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from datasets.fetching import names
from datasets.fetching.names import Names
from datasets.outcomes import Lost, Outcome


class Resolver:
    """Answers by name after a delay; a name without an address is not known."""

    def __init__(self, delays: dict[str, float], unknown: frozenset[str] = frozenset(), error: int = socket.EAI_NONAME):
        self.delays, self.unknown, self.error = delays, unknown, error
        self.asked: Counter[str] = Counter()
        self.now = self.most = 0
        self.lock = threading.Lock()

    def __call__(self, name: str, port: int, **_: Any) -> list[Any]:
        with self.lock:
            self.asked[name] += 1
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.delays.get(name, 0.0))
        with self.lock:
            self.now -= 1
        if name in self.unknown:
            raise socket.gaierror(self.error, "not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", port))]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Any:
    def made(*arguments: Any) -> Resolver:
        stub = Resolver(*arguments)
        monkeypatch.setattr("datasets.fetching.names.socket.getaddrinfo", stub)
        return stub

    return made


def outcome(found: Names, name: str) -> Outcome:
    try:
        found.places(name, 80)
    except Lost as error:
        return error.outcome
    return Outcome.OK


def test_ten_thousand_names_of_which_many_are_not_known_take_no_longer_than_their_deadlines(resolver):
    """Delays of 0 to 10 s and a deadline of 5, a thousandfold quicker: the stub counts who is asked at a time."""
    scale, asked = 0.001, [f"h{number}.example" for number in range(10_000)]
    generator = random.Random(0)
    delays = {name: generator.uniform(0, 10) * scale for name in asked}
    unknown = frozenset(generator.sample(asked, 4_000))
    stub = resolver(delays, unknown)
    found = Names(5 * scale, 64)
    found.expect(asked)
    with ThreadPoolExecutor(16) as pool:
        ends = Counter(pool.map(lambda name: outcome(found, name), asked * 2))
    assert stub.asked == Counter(asked)
    assert ends.keys() == {Outcome.OK, Outcome.DNS}
    assert ends[Outcome.DNS] >= 8_000
    assert stub.most <= 64 * (1 + names.LATE_AT_MOST)


def test_whoever_is_late_holds_nobody_up(resolver):
    over = threading.Event()
    late = [f"late{number}.example" for number in range(8)]
    stub = resolver({})
    answer = stub.__call__

    def stuck(name: str, port: int, **options: Any) -> list[Any]:
        if name in late:
            over.wait()
        return answer(name, port, **options)

    names.socket.getaddrinfo = stuck  # undone with the stub
    found = Names(0.05, 4)
    found.expect([*late, "quick.example"])
    assert outcome(found, "quick.example") is Outcome.OK
    assert [outcome(found, name) for name in late] == [Outcome.DNS] * 8
    over.set()
    for _ in range(1000):
        if [outcome(found, name) for name in late] == [Outcome.OK] * 8:  # they came after all
            break
        time.sleep(0.01)
    else:
        pytest.fail("a late answer is no answer")


def test_a_resolver_that_never_comes_back_holds_nobody_up_for_ever(resolver, monkeypatch):
    monkeypatch.setattr(names, "KEPT_S", 0.05)
    over = threading.Event()
    resolver({})
    names.socket.getaddrinfo = lambda *_, **__: over.wait()  # undone with the stub
    found = Names(0.02, 1)
    for _ in range(3):
        assert outcome(found, "stuck.example") is Outcome.DNS
        time.sleep(0.06)  # its answer is no longer kept
    over.set()


def test_an_unknown_name_is_asked_once_and_one_that_may_be_known_soon_again(resolver, monkeypatch):
    monkeypatch.setattr(names, "SOON_S", 0.05)
    for error, times in ((socket.EAI_NONAME, 1), (socket.EAI_AGAIN, 3)):
        stub = resolver({}, frozenset(["x.example"]), error)
        found = Names(60.0, 2)
        for _ in range(3):
            assert outcome(found, "x.example") is Outcome.DNS
            time.sleep(0.1)
        assert stub.asked["x.example"] == times


def test_a_port_is_the_callers(resolver):
    stub = resolver({})
    found = Names(60.0, 2)
    assert [found.places("x.example", port)[0][4] for port in (80, 8080)] == [("8.8.8.8", 80), ("8.8.8.8", 8080)]
    assert stub.asked == {"x.example": 1}


def test_a_name_that_no_resolver_takes_is_no_failure_of_the_name_servers(resolver, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise UnicodeError("label too long")

    monkeypatch.setattr("datasets.fetching.names.socket.getaddrinfo", refuse)
    assert outcome(Names(60.0, 2), "x" * 70) is Outcome.HTTP_ERROR


def test_answers_whose_time_is_over_are_forgotten_once_there_are_many(resolver, monkeypatch):
    monkeypatch.setattr(names, "REMEMBERED", 4)
    monkeypatch.setattr(names, "KEPT_S", 0.0)
    monkeypatch.setattr(names, "SOON_S", 60.0)
    stub = resolver({}, frozenset({"away.example"}), socket.EAI_AGAIN)
    found = Names(5.0, 1)
    assert outcome(found, "away.example") == Outcome.DNS
    for number in range(20):
        found.expect([f"h{number}.example"])
        assert outcome(found, "away.example") == Outcome.DNS
    while stub.asked.total() < 21 or stub.now:
        time.sleep(0.001)
    assert len(found._known) <= 4 + 2 * 2  # of which the one whose time is not over
    assert stub.asked["away.example"] == 1
