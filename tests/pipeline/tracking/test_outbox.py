"""Records for a service that is away: nobody waits for it, and afterwards each record is there once."""

import contextlib
import fcntl
import json
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.mlflow_runs import Tracking, send_unsent
from pipeline.tracking.mlflow_store import MlflowStore, connect, locate_store
from pipeline.tracking.outbox import BATCH, NotTaken, Outbox, Record
from pipeline.verbs.ui import serve_ui

PNG = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\0\0\0\0:~\x9bU"
    b"\0\0\0\nIDATx\x9cc`\0\0\0\x02\0\x01H\xaf\xa4q\0\0\0\0IEND\xaeB`\x82"
)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.outbox.PAUSES_S", (0.01,))


class Service:
    """Takes records, while it is there."""

    def __init__(self, there: bool = True) -> None:
        self.there = there
        self.taken: list[Any] = []
        self.asked = threading.Event()

    def __call__(self, records: Sequence[Record]) -> None:
        self.asked.set()
        if not self.there:
            raise ConnectionError("nobody is there")
        self.taken += [record["number"] for record in records]


def test_records_arrive_in_their_order_and_leave_nothing_behind(tmp_path: Path) -> None:
    service = Service()
    outbox = Outbox(tmp_path / "unsent", "one", service)
    for number in range(3 * BATCH):
        outbox.add({"number": number})
    assert outbox.flush(60)
    assert service.taken == list(range(3 * BATCH))
    assert outbox.close(60) == 0
    assert (outbox.failures, list(outbox.path.parent.iterdir())) == (0, [])


def test_what_fails_is_tried_again_until_it_passes(tmp_path: Path) -> None:
    service = Service(there=False)
    complaints: list[str] = []
    outbox = Outbox(tmp_path, "one", service, complaints.append)
    for number in range(5):
        outbox.add({"number": number})
    assert not outbox.flush(60)
    service.there = True
    assert outbox.close(60) == 0
    assert service.taken == list(range(5))
    assert (outbox.failures > 0, outbox.last_error) == (True, "nobody is there")
    assert complaints == ["nobody is there"]  # however often it was tried


def test_what_the_service_does_not_take_holds_up_nothing_and_stays(tmp_path: Path) -> None:
    """Seven of each ten are refused, in the same process and by the next; then all are taken."""
    taken: list[int] = []
    refused = {number for number in range(3 * BATCH) if number % 10 < 7}

    def send(records: Sequence[Record]) -> None:
        numbers = [record["number"] for record in records]
        taken.extend(number for number in numbers if number not in refused)
        if places := [place for place, number in enumerate(numbers) if number in refused]:
            raise NotTaken(places, "not this user")

    complaints: list[str] = []
    outbox = Outbox(tmp_path, "one", send, complaints.append)
    for number in range(3 * BATCH):
        outbox.add({"number": number})
    assert not outbox.flush(60)
    assert taken == [number for number in range(3 * BATCH) if number not in refused]
    assert outbox.close(60) == len(refused) == len(outbox.path.read_text().splitlines())
    assert (complaints, outbox.last_error) == (["not this user"], "not this user")
    expected = set(range(3 * BATCH)) - {0}
    refused = {0}
    following = Outbox(tmp_path, "two", send)
    assert following.close(60) == 1
    assert (sorted(taken), following.path.read_text()) == (sorted(expected), '{"number": 0}\n')
    assert list(tmp_path.iterdir()) == [following.path]
    refused = set()
    again = Outbox(tmp_path, "three", send)
    assert again.close(60) == 0
    assert (sorted(taken), list(tmp_path.iterdir())) == (list(range(3 * BATCH)), [])


def test_what_is_set_aside_is_tried_again_in_the_same_process(tmp_path: Path) -> None:
    tries = 0

    def send(records: Sequence[Record]) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise NotTaken(range(len(records)), "away")

    outbox = Outbox(tmp_path, "one", send)
    outbox.add({"number": 1})
    deadline = time.monotonic() + 60
    while not outbox.flush(60):
        assert time.monotonic() < deadline
    assert (outbox.close(60), tries, outbox.failures) == (0, 3, 2)


def test_what_waits_does_so_in_the_file(tmp_path: Path) -> None:
    """Pictures of weeks, for a service that is away for as long, are not kept in memory."""
    outbox = Outbox(tmp_path, "one", Service(there=False))
    tracemalloc.start()
    for number in range(100):
        outbox.add({"number": number, "png": "x" * (1 << 20)})
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 60 << 20  # a batch or two on their way among them
    assert outbox.close(60) == 100


def test_the_next_process_sends_what_one_left_behind_and_leaves_the_living_alone(tmp_path: Path) -> None:
    away, service = Service(there=False), Service()
    ended = Outbox(tmp_path, "1-ended", away)
    alive = Outbox(tmp_path, "2-alive", away)
    ended.add({"number": 1})
    alive.add({"number": 2})
    assert not alive.flush(60)  # so it has looked for what others left before there is something
    assert ended.close(60) == 1
    with open(ended.path, "a") as file:
        file.write('{"number": 9')  # a record that its process died in
    following = Outbox(tmp_path, "3-following", service)
    following.add({"number": 3})
    assert following.close(60) == 0
    assert service.taken == [1, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["2-alive.jsonl"]
    away.there = True
    assert alive.close(60) == 0


def test_a_file_that_another_process_takes_for_a_dead_ones_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    """Between its making and its lock it is empty, and nobody's: whoever looks for what dead ones left deletes it."""
    locked: list[int] = []
    real = fcntl.flock

    def flock(file: Any, how: int) -> None:
        if not locked:
            (tmp_path / "one.jsonl").unlink()
        locked.append(how)
        real(file, how)

    monkeypatch.setattr("pipeline.tracking.outbox.fcntl.flock", flock)
    ours = Outbox(tmp_path, "one", Service(there=False))
    ours.add({"number": 1})
    assert ours.close(60) == 1
    assert json.loads((tmp_path / "one.jsonl").read_text()) == {"number": 1}


def test_who_takes_a_record_may_hang(tmp_path: Path) -> None:
    over = threading.Event()
    outbox = Outbox(tmp_path, "one", lambda _: over.wait(60) and None)
    outbox.add({"number": 1})
    assert outbox.close(0.05) == 1
    assert json.loads(outbox.path.read_text()) == {"number": 1}
    over.set()


def test_a_killed_process_leaves_its_records_to_the_next(tmp_path: Path) -> None:
    program = """
        import sys, threading
        from pathlib import Path
        from pipeline.tracking.outbox import Outbox
        outbox = Outbox(Path(sys.argv[1]), "killed", lambda _: threading.Event().wait())
        for number in range(100):
            outbox.add({"number": number})
        print("ready", flush=True)
        sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    service = Service()
    assert Outbox(tmp_path, "next", service).close(60) == 0
    assert service.taken == list(range(100))


# ------------------------------------------------------------------------------------------------- MLflow away


def _tracking(store: MlflowStore, invocation: str, say: Callable[[str], None] = lambda _: None) -> Tracking:
    return Tracking(
        store,
        "wuerstchen",
        conf="stage_c",
        targets=[],
        invocation=invocation,
        fingerprints={},
        config={"seed": 0},
        say=say,
    )


def _train(store: MlflowStore, invocation: str, steps: range, say: Callable[[str], None] = lambda _: None) -> Tracking:
    """A run that records some points and a picture; it ends although nobody may be there to take them."""
    with _tracking(store, invocation, say) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        for step in steps:
            run.metrics({"loss": float(step)}, step)
        run.image("panel", PNG, steps[-1])
    return tracking


def _check(store: MlflowStore, points: list[int]) -> None:
    """Each point and picture is there once, and each run once, ended."""
    client, experiment = connect(store, "wuerstchen")
    parents = client.search_runs([experiment], "tags.`wst.kind` = 'pipeline'")
    children = client.search_runs([experiment], "tags.`wst.step` = 'train_c'")
    assert {run.info.status for run in [*parents, *children]} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {run.info.run_id for run in parents}
    assert all(run.data.params == {"conf": "stage_c"} for run in parents)
    found = [p.step for run in children for p in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(found) == points
    pictures = [file.path for run in children for file in client.list_artifacts(run.info.run_id, "images")]
    assert sum(path.endswith(".png") for path in pictures) == len(children) == len(parents)


def test_a_locked_database_delays_no_step_and_loses_no_point(empty_mlflow: Path, tmp_path: Path) -> None:
    store = locate_store(str(tmp_path), None)
    store.database.parent.mkdir()
    shutil.copy(empty_mlflow, store.database)
    with contextlib.closing(sqlite3.connect(store.database)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        with _tracking(store, "1") as tracking, tracking.step("train_c", "stage_c", "abc") as run:
            for step in range(50):
                run.metrics({"loss": float(step)}, step)
            run.image("panel", PNG, 49)
            assert not tracking.flush(0.5)  # the steps are over, and nothing has arrived
            lock.rollback()
    _check(store, list(range(50)))


class _Broken(BaseHTTPRequestHandler):
    """A server that is there, and fails, or knows nobody."""

    code = 500

    def do_GET(self) -> None:
        self.send_error(self.code)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def _away(kind: str, port: int) -> Iterator[None]:
    """Nobody at the port, somebody who never answers, or somebody who always fails."""
    if kind == "refusing":
        yield
    elif kind == "silent":
        with socket.create_server(("127.0.0.1", port)):
            yield
    else:
        handler = type("Handler", (_Broken,), {"code": 401 if kind == "refused" else 500})
        with HTTPServer(("127.0.0.1", port), handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            yield
            server.shutdown()
            thread.join()


def test_a_server_that_is_away_delays_no_step_and_loses_no_point(
    empty_mlflow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tracking.mlflow_runs.END_PATIENCE_S", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    remote = locate_store(str(tmp_path), f"http://127.0.0.1:{port}")
    reasons = {"refusing": "Connection refused", "silent": "no answer in time", "failing": "500"}
    reasons |= {"refused": "set MLFLOW_TRACKING_USERNAME"}
    for number, (kind, reason) in enumerate(reasons.items()):
        said: list[str] = []
        with _away(kind, port):
            (warning,) = _train(remote, str(number), range(10 * number, 10 * number + 10), said.append).warnings
            if kind == "refusing":
                assert f"all that earlier runs recorded ({reason}); " in str(send_unsent(remote, "wuerstchen"))
        assert re.search(rf"did not take \d+ records \([^()]*{reason}[^()]*\); they wait in ", warning)
        assert "the next run with this root, tracking.uri and experiment sends them" in warning
        if kind != "silent":
            (sentence,) = said
            assert sentence.startswith(f"MLflow at http://127.0.0.1:{port} does not take what it is given (")
            assert reason in sentence
            assert len(sentence) < 250 + len(str(tmp_path))  # with the remedy, where there is one
    monkeypatch.setattr("pipeline.tracking.mlflow_runs.END_PATIENCE_S", 60.0)
    local = locate_store(str(tmp_path / "server"), None)
    local.database.parent.mkdir(parents=True)
    shutil.copy(empty_mlflow, local.database)
    with serve_ui(local, port):
        assert send_unsent(remote, "wuerstchen") == f"MLflow at {remote.uri} has taken what earlier runs could not send"
        _check(remote, list(range(40)))
        assert send_unsent(remote, "wuerstchen") is None
        assert _train(remote, "4", range(40, 50)).warnings == []
        _check(remote, list(range(50)))
    assert not list(remote.unsent.rglob("*.jsonl"))
