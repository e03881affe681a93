"""Object stores that are busy, break connections, or are away: a real server behind a proxy that does all of that.

What goes wrong is drawn from a seed or follows from what is asked; nothing here depends on how fast a machine is.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from datasets.files import filesystems, notices, storage
from datasets.files.errors import NothingThere, StoreAway, StoreRefuses
from datasets.files.notices import Notice, Retry
from datasets.files.retrying import PATIENCE
from pipeline.__main__ import main
from pipeline.store import claims
from pipeline.store.artifacts import Store
from pipeline.store.claims import Pace
from pipeline.tracking.outbox import Outbox, Record
from tests.faulty_store import FaultyStore, some
from tests.object_store import serving

CHECKOUT = Path(__file__).parents[2]
LARGE = 25 << 20  # bytes: uploaded in three parts
WRITERS = 3


@pytest.fixture
def store(s3: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> FaultyStore:
    """A real server, seen through a proxy; this process is patient."""
    monkeypatch.setenv(PATIENCE, "120")
    return s3


@pytest.fixture
def root(s3_root: str) -> str:
    return s3_root


@pytest.fixture
def heard() -> Iterator[list[Notice]]:
    found: list[Notice] = []
    with notices.heard_by(found.append):
        yield found


# ------------------------------------------------------------------------------------------------ single requests


@pytest.mark.parametrize("kind", ["slow", "lost", "cut"])
def test_a_fifth_of_all_requests_may_fail(store, root, heard, kind):
    large = os.urandom(LARGE)
    store.fault = some(0.2, kind, seed=1)
    for number in range(30):
        storage.publish(b"%d" % number, f"{root}/small/{number:02d}")
    entry = storage.publish(large, f"{root}/large")
    assert storage.read(f"{root}/large", expect=entry) == large
    assert storage.sha256(f"{root}/large") == hashlib.sha256(large).hexdigest()
    paths = [f"{root}/small/{number:02d}" for number in range(30)]
    assert storage.read_all(paths) == [b"%d" % number for number in range(30)]
    assert storage.listing(root) == ["large", *(f"small/{number:02d}" for number in range(30))]
    storage.move(f"{root}/small/00", f"{root}/small/30")
    storage.remove(f"{root}/small")
    assert storage.listing(root) == ["large"]
    assert store.requests(kind) > 10
    if kind == "slow":  # the others, some of Arrow's client hears of, and some are mended below it
        assert len(heard) > 5
    assert all(isinstance(notice, Retry) and notice.path.startswith(root) for notice in heard)


@pytest.mark.parametrize("kind", ["slow", "lost"])
def test_of_many_who_create_one_does_though_requests_fail(store, root, kind):
    store.fault = some(0.2, kind, seed=2)
    made = [storage.create(b"%d" % who, f"{root}/{place}") for place in range(5) for who in range(3)]
    assert made == [True, False, False] * 5
    assert store.requests(kind) > 5


def test_a_store_that_comes_back_is_waited_for(store, root, heard):
    entry = storage.publish(b"content", f"{root}/x")

    def come(notice: Notice) -> None:
        if len(heard) == 3:
            store.come()

    store.go()
    with notices.heard_by(come):
        assert storage.read(f"{root}/x", expect=entry) == b"content"
    assert len(heard) >= 3
    assert "Could not connect" in heard[0].reason


def test_who_never_answers_is_given_up(store, root, monkeypatch):
    monkeypatch.setenv(PATIENCE, "0")
    monkeypatch.setattr("datasets.files.filesystems.SILENCE_S", 1)
    filesystems.forget_clients()
    store.fault = lambda method, path: "mute"
    with pytest.raises(StoreAway, match=rf"{root}/x: .* \(3 tries\): Read timeout"):
        storage.read(f"{root}/x")
    assert store.requests("mute") == 3


def test_what_is_not_there_or_not_allowed_is_told_at_once(store, root, heard):
    with pytest.raises(NothingThere, match=f"{root}/x: there is no such file"):
        storage.read(f"{root}/x")
    with pytest.raises(StoreRefuses, match="s3://nobody/x: the store refuses it: NO_SUCH_BUCKET"):
        storage.publish(b"content", "s3://nobody/x")
    assert heard == []


def test_half_an_upload_is_nothing(store, root, monkeypatch):
    monkeypatch.setenv(PATIENCE, "0")
    storage.publish(b"old", f"{root}/x")
    store.fault = lambda method, path: "slow" if "partNumber=2" in path else None
    with pytest.raises(StoreAway):
        storage.publish(os.urandom(LARGE), f"{root}/x")
    store.fault = lambda method, path: None
    assert storage.read(f"{root}/x") == b"old"


# -------------------------------------------------------------------------------------------------------- outages

ROUNDS = 20


class Work:
    """Some write files and read them, one holds a claim, all of them halfway when the store goes."""

    def __init__(self, root: str, folder: Path) -> None:
        self.root = root
        self.halfway, self.gone = threading.Barrier(WRITERS + 1), threading.Event()
        self.outbox = Outbox(folder / "unsent", "one", self._send)
        self.sent: list[int] = []

    def write(self, who: int) -> None:
        for number in range(ROUNDS):
            if number == ROUNDS // 2:
                self.halfway.wait()
                self.gone.wait()
            self.outbox.add({"number": who * ROUNDS + number})
            path = f"{self.root}/{who}/{number:02d}"
            entry = storage.publish(os.urandom(1000), path)
            storage.read(path, expect=entry)

    def _send(self, records: Sequence[Record]) -> None:
        storage.publish(json.dumps(records).encode(), f"{self.root}/sent/{records[-1]['number']}")
        self.sent += [record["number"] for record in records]

    def gets_over(self, go: Callable[[], None], come: Callable[[], None], until: Callable[[], None]) -> None:
        """Do it all, while the store goes, until that returns, and comes back; nothing of it is lost."""
        what, manifest = "artifacts/x/0", f"{self.root}/artifacts/x/0/manifest.json"
        held = claims.hold(self.root, what, print, pace=Pace(heartbeat_s=0.1))
        with ThreadPoolExecutor(WRITERS) as pool, held as claim:
            done = [pool.submit(self.write, who) for who in range(WRITERS)]
            self.halfway.wait()
            go()
            self.gone.set()
            until()
            come()
            for one in done:
                one.result()
            claim.publish(b"done", manifest)
        assert self.outbox.close(60) == 0
        assert sorted(set(self.sent)) == list(range(WRITERS * ROUNDS))
        names = [name for name in storage.listing(self.root) if re.fullmatch(r"\d/\d\d", name)]
        assert len(names) == WRITERS * ROUNDS
        assert storage.read(manifest) == b"done"
        with claims.hold(self.root, what, print) as after:  # the first was released, by its own owner
            assert after.fence.number == claim.fence.number + 1


def test_work_goes_on_after_an_outage_with_nothing_lost(store, root, tmp_path, heard):
    def until() -> None:
        while len(heard) < 2 * WRITERS:
            time.sleep(0.05)

    Work(root, tmp_path).gets_over(store.go, store.come, until)
    assert all(isinstance(notice, Retry) for notice in heard)


@pytest.mark.cluster
@pytest.mark.parametrize("away_s", [0, 60])
def test_work_goes_on_after_a_real_outage(tmp_path, monkeypatch, heard, away_s):
    """The server is killed, and comes back with what it had said that it holds; who begins meanwhile waits for it."""
    with serving(tmp_path / "store", "pictures") as server, ThreadPoolExecutor() as pool:
        for name, value in {**server.environment, PATIENCE: "600"}.items():
            monkeypatch.setenv(name, value)
        filesystems.forget_clients()
        began = []

        def gone() -> None:
            server.go()
            began.append(pool.submit(claims.take, "s3://pictures/root", "artifacts/y/0", print))

        Work("s3://pictures/root", tmp_path).gets_over(gone, server.come, lambda: time.sleep(away_s))
        began[0].result().release()
        assert heard
    filesystems.forget_clients()


# ----------------------------------------------------------------------------------------------------------- verbs


MICRO = ["conf=stage_c", "scale=micro"]


@pytest.mark.parametrize(
    "line",
    [
        ["plan", *MICRO],
        ["plan", *MICRO, "--json"],
        ["run", *MICRO],
        ["show", *MICRO, "artifact=scores"],
        ["data", "funnel", *MICRO],
        ["data", "forget", f"keys={'0' * 32}"],
        ["status"],
        ["status", "--json"],
        ["gc"],
        ["gc", "--yes"],
        ["report", "hours"],
        ["export", *MICRO, "out={folder}/out"],
    ],
    ids=" ".join,
)
def test_a_store_that_is_away_at_the_start_is_one_sentence(store, root, tmp_path, monkeypatch, capsys, line):
    monkeypatch.setenv(PATIENCE, "0")
    store.go()
    words = [word.replace("{folder}", str(tmp_path)) for word in line]
    tracking = [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"] if MICRO[0] in line else []
    assert main([*words, f"root={root}", *tracking]) == 5
    said = capsys.readouterr()
    errors = [text for text in said.err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert f"error: {root}" in errors[0]
    assert "start the same command again once it works" in errors[0]
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_doctor_tells_of_a_store_that_is_away(store, root, monkeypatch, capsys):
    monkeypatch.setenv(PATIENCE, "0")
    store.go()
    assert main(["doctor", f"root={root}", "--json"]) == 2
    findings = json.loads(capsys.readouterr().out)["findings"]
    (found,) = (finding for finding in findings if finding["check"] == "storage")
    assert found["state"] == "failed"
    assert "cannot be reached" in found["found"]


# ------------------------------------------------------------------------------------------------------------ runs


def start(root: str, folder: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pipeline", "run", *MICRO, "--until", "download", "--json", f"root={root}"]
    command += [f"tracking.uri=sqlite:///{folder}/mlflow.db", *words]
    return subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(root: str) -> dict[str, str]:
    return {artifact.name: artifact.manifest["content"] for artifact in Store(root).finished()}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run makes where nothing fails."""
    folder = tmp_path_factory.mktemp("calm")
    with start(str(folder / "root"), folder) as running:
        assert running.wait() == 0, running.communicate()[1]
    return contents(str(folder / "root"))


@pytest.mark.ray
@pytest.mark.cluster
def test_a_run_gets_over_a_store_that_fails_and_goes_and_comes_back(store, root, tmp_path, calm):
    """A fifth of all requests fails, and with the first receipt the store goes away until it was asked for it often."""
    busy, gone = some(0.2, "slow", seed=3), {"asked": 0}

    def fault(method: str, path: str) -> str | None:
        if "receipts/" in path and method == "PUT" and gone["asked"] < 8:
            gone["asked"] += 1
            return "lost"
        return busy(method, path)

    store.fault = fault
    with start(root, tmp_path, "cluster.patience_s=300") as running:
        out, err = running.communicate()
    assert running.returncode == 0, err
    assert json.loads(out)["outcome"] == "done"
    (told,) = (line for line in err.splitlines() if line.startswith("storage  "))
    assert int(told.split()[1].replace(",", "")) > 10
    assert "SLOW_DOWN" in err or "503" in err
    assert store.requests("slow") > 30
    store.fault = lambda method, path: None
    assert contents(root) == calm
    pieces = [name for name in storage.listing(f"{root}/logs") if ".log/" in name]
    assert any(b"trying again" in storage.read(f"{root}/logs/{name}") for name in pieces)


@pytest.mark.ray
@pytest.mark.cluster
def test_a_run_whose_store_goes_for_good_ends_in_a_sentence_and_goes_on_later(store, root, tmp_path, calm):
    def fault(method: str, path: str) -> str | None:
        if "receipts/" in path and method == "PUT":
            away.append(path)
        return "slow" if away else None

    away: list[str] = []
    store.fault = fault
    with start(root, tmp_path, "cluster.patience_s=1", "cluster.retries=0") as running:
        out, err = running.communicate()
    assert running.returncode == 5, err
    (told,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert f"{root}/" in told
    assert "Traceback" not in err
    assert out == ""
    store.fault = lambda method, path: None
    assert "metadata" in contents(root)  # what was done stays done
    with start(root, tmp_path) as running:
        out, err = running.communicate()
    assert running.returncode == 0, err
    assert contents(root) == calm
