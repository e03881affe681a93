"""The pace of hosts: against servers with limits of their own, in simulated time, and one on loopback in real time."""

import heapq
import itertools
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow as pa
import pytest

from datasets.config import DownloadConfig, ImageConfig
from datasets.fetching import pace
from datasets.fetching.download import download_shard
from datasets.fetching.pace import CLOSED, LIFT_LONGER, Heard, HostSlots
from datasets.planning import plan
from datasets.sources.loopback import Address
from tests.datasets.fetching.servers import PICTURE

HOST = "pictures.invalid"
Limit = Callable[[float, int], bool]  # moment, connections now -> whether the server has enough


def bucket(rate: float, burst: float = math.inf) -> Limit:
    """Holds so many tokens, or those of a second."""
    most = min(rate, burst)
    tokens, filled = most, 0.0

    def refuses(now: float, _: int) -> bool:
        nonlocal tokens, filled
        tokens, filled = min(most, tokens + (now - filled) * rate), now
        if tokens < 1:
            return True
        tokens -= 1
        return False

    return refuses


def window(rate: float, seconds: float = 1.0) -> Limit:
    served: list[float] = []

    def refuses(now: float, _: int) -> bool:
        served[:] = [moment for moment in served if moment > now - seconds]
        if len(served) >= rate * seconds:
            return True
        served.append(now)
        return False

    return refuses


def connections(most: int) -> Limit:
    return lambda _, now: now > most


def at_first(count: int, limit: Limit) -> Limit:
    """So many are refused before a limit counts: where the machine is slow it may never be reached."""
    first = iter(range(count))
    return lambda moment, now: next(first, None) is not None or limit(moment, now)


class World:
    """Threads that fetch from one server, in time that costs nothing."""

    def __init__(self, limit: Limit, each: int, threads: int, latency_s: float, retry_after_s: float):
        self.now, self.together, self.most, self.stored, self.refused = 0.0, 0, 0, 0, 0
        self.moments: list[float] = []
        self.polls = 0
        self.pace = HostSlots(each, clock=lambda: self.now)
        self.limit, self.threads, self.latency_s, self.retry_after_s = limit, threads, latency_s, retry_after_s
        self.random = random.Random(0)

    def fetcher(self, rows: Iterator[int]) -> Iterator[float]:
        """One thread; it yields how long it sleeps."""
        for _ in rows:
            refused = True
            while refused:
                while (turn := self.pace.take(HOST)).ticket is None:
                    self.polls += 1
                    yield turn.wait_s * (self.random.uniform(1.0, 1.5) if turn.queued else 1.0)
                self.together += 1
                self.most = max(self.most, self.together)
                self.moments.append(self.now)
                refused = self.limit(self.now, self.together)
                yield 0.001 if refused else self.latency_s
                self.together -= 1
                self.refused += refused
                heard = Heard.REFUSAL if refused else Heard.ANSWER
                self.pace.give_back(HOST, turn, heard, self.retry_after_s if refused else 0.0)
            self.stored += 1

    def run(self, rows: int) -> float:
        """Fetch so many; the seconds that it took."""
        left, order = iter(range(rows)), itertools.count()
        events = [(0.0, next(order), self.fetcher(left)) for _ in range(self.threads)]
        while events:
            self.now, _, thread = heapq.heappop(events)
            if (pause := next(thread, None)) is not None:
                heapq.heappush(events, (self.now + pause, next(order), thread))
        return self.now


@pytest.mark.parametrize("retry_after_s", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("latency_s", [0.002, 0.2])
@pytest.mark.parametrize("burst", [1.0, 5.0, math.inf])
@pytest.mark.parametrize("rate", [3.0, 20.0, 50.0])
def test_a_rate_is_learned_whatever_the_burst_that_is_borne(rate, burst, latency_s, retry_after_s):
    world = World(bucket(rate, burst), 16, 16, latency_s, retry_after_s)
    seconds = world.run(int(15 * rate))
    assert world.stored == int(15 * rate)
    assert seconds <= 2 * 15
    assert world.refused <= 60


@pytest.mark.parametrize("retry_after_s", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("latency_s", [0.002, 0.2])
@pytest.mark.parametrize("threads", [8, 64])
def test_so_is_one_of_a_window(latency_s, retry_after_s, threads):
    world = World(window(20), 8, threads, latency_s, retry_after_s)
    assert world.run(300) <= 2 * (300 - 20) / 20
    assert world.stored == 300
    assert world.most <= 8
    assert world.refused <= 60


@pytest.mark.parametrize("retry_after_s", [0.0, 1.0])
@pytest.mark.parametrize("latency_s", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_so_is_how_many_connections_there_may_be(most, latency_s, retry_after_s):
    world = World(connections(most), 8, 32, latency_s, retry_after_s)
    seconds = world.run(300)
    assert world.stored == 300
    assert seconds <= 1.6 * 300 * latency_s / most + retry_after_s
    assert world.most <= most + 1  # which is how it is learned
    assert world.refused <= 2 + math.log(seconds, LIFT_LONGER)


@pytest.mark.parametrize("latency_s", [0.05, 0.2, 1.0])
def test_who_waits_for_a_connection_looks_as_often_as_is_of_use(latency_s):
    world = World(connections(3), 8, 64, latency_s, 0.0)
    assert world.run(1000) <= 1.1 * 1000 * latency_s / 3
    assert world.polls <= 12 * 1000


def test_no_more_connections_are_opened_than_may_be_by_the_config():
    world = World(connections(8), 3, 64, 0.1, 0.0)
    world.run(100)
    assert (world.most, world.refused) == (3, 0)


def test_a_window_of_a_minute_is_waited_for():
    world = World(window(1, seconds=60), 8, 16, 0.05, 0.0)
    assert world.run(180) <= 2 * 120
    assert world.stored == 180


def test_a_server_without_limits_is_not_held_up():
    world = World(lambda *_: False, 8, 16, 0.1, 0.0)
    assert world.run(160) == pytest.approx(160 * 0.1 / 8, rel=0.3)


def test_of_many_hosts_those_that_have_refused_are_remembered(monkeypatch):
    monkeypatch.setattr(pace, "REMEMBERED", 100)
    slots = HostSlots(8, clock=lambda: 0.0)
    busy = slots.take("busy")
    for number in range(1000):
        host = f"{number}.invalid"
        slots.give_back(host, slots.take(host), Heard.REFUSAL if number % 100 == 0 else Heard.ANSWER)
    assert len(slots._hosts) <= 200
    assert {f"{number}.invalid" for number in range(0, 1000, 100)} | {"busy"} <= slots._hosts.keys()
    slots.give_back("busy", busy)


def test_a_rate_that_falls_is_followed_and_one_that_rises_too():
    slow, quick = bucket(5), bucket(40)
    world = World(lambda now, together: (slow if 10 < now < 60 else quick)(now, together), 8, 16, 0.01, 0.0)
    world.run(1600)
    served = {span: sum(span[0] <= moment < span[1] for moment in world.moments) for span in ((20, 60), (75, 85))}
    assert 0.5 * 200 <= served[20, 60] <= 2 * 200
    assert served[75, 85] >= 0.5 * 400


def test_patience_that_is_asked_for_is_given_to_the_end():
    world = World(window(20), 8, 16, 0.01, 5.0)
    world.run(60)
    gaps = [later - sooner for sooner, later in itertools.pairwise(world.moments)]
    assert sum(gap >= 4.9 for gap in gaps) >= 1
    assert sum(gap >= 0.5 for gap in gaps) == sum(gap >= 4.9 for gap in gaps)


def test_whoever_never_answers_is_left_alone_and_tried_again_later():
    now = 0.0
    slots = HostSlots(8, patience_s=8.0, clock=lambda: now)
    tries: list[float] = []
    while now < 8.0 * CLOSED:
        turn = slots.take(HOST)
        if turn.ticket is None:
            now += turn.wait_s
            continue
        tries.append(now)
        slots.give_back(HOST, turn, Heard.REFUSAL)
    assert len(tries) <= 5
    assert max(tries) < 8.0
    assert slots.take(HOST).ticket is not None


def test_a_turn_that_nobody_gives_back_is_free_again():
    now = 0.0
    slots = HostSlots(1, held_s=10.0, clock=lambda: now)
    assert slots.take(HOST).ticket is not None
    assert slots.take(HOST).queued
    now = 10.5
    lost = slots.take(HOST)
    assert lost.ticket is not None
    slots.give_back(HOST, lost)
    slots.give_back(HOST, lost)  # the first holder was slow, not dead


# --------------------------------------------------------------------------------------------------- in real time


class Limiting(BaseHTTPRequestHandler):
    """Answers by a limit, and keeps a log."""

    # set on a subclass for each test
    lock: threading.Lock
    limit: Limit
    refusal: str
    state: dict[str, int]

    def do_GET(self) -> None:
        with self.lock:
            self.state["now"] += 1
            self.state["most"] = max(self.state["most"], self.state["now"])
            refused = type(self).limit(time.monotonic(), self.state["now"])
            self.state["refused"] += refused
        if refused and self.refusal == "hangs up":
            with self.lock:
                self.state["now"] -= 1
            return
        if not refused:
            time.sleep(0.02)
        with self.lock:  # before the answer: once it has that, a client may come again at once
            self.state["now"] -= 1
        status, _, after = self.refusal.partition(" ") if refused else ("200", "", "")
        self.send_response(int(status))
        if after:
            self.send_header("Retry-After", after)
        body = b"" if refused else PICTURE
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    request_queue_size = 128


def downloaded(tmp_path: Any, limit: Limit, refusal: str, rows: int) -> tuple[int, dict[str, int]]:
    """Pictures stored of so many, and the server's log."""
    state = {"now": 0, "most": 0, "refused": 0}
    about = {"lock": threading.Lock(), "limit": staticmethod(limit), "refusal": refusal, "state": state}
    urls = [f"http://{HOST}/{number}" for number in range(rows)]
    table = pa.Table.from_pylist(
        [{"key": plan.key_of(url, "x"), "url": url, "caption": "x", "row": row} for row, url in enumerate(urls)],
        schema=plan.SCHEMA,
    )
    config = DownloadConfig(threads=32, timeout_s=60, retries=0, user_agent="test/1", max_lost=1.0, per_host=4)
    with Server(("127.0.0.1", 0), type("Handler", (Limiting,), about)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        address: Address = ("127.0.0.1", server.server_port)
        image = ImageConfig(size=32, format="png")
        receipt = download_shard(
            table, shard=0, folder=str(tmp_path), image=image, download=config, hosts={HOST: address}
        )
        server.shutdown()
        thread.join()
    return receipt.rows_out, state


@pytest.mark.parametrize(
    ("limit", "refusal"),
    [
        (at_first(3, bucket(60)), "429 1"),
        (at_first(3, bucket(60)), "429"),
        (at_first(3, bucket(60)), "503"),
        (at_first(3, window(60)), "429"),
        (connections(2), "503"),
        (connections(2), "hangs up"),
    ],
)
def test_a_server_that_has_enough_loses_no_picture(tmp_path, limit, refusal):
    stored, log = downloaded(tmp_path, limit, refusal, 120)
    assert stored == 120
    assert log["refused"] > 0
    assert log["most"] <= (3 if limit.__qualname__.startswith("connections") else 4)
