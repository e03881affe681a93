"""Device-hours and peak memory: what is written survives a kill, and adds up."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.files import storage
from pipeline.errors import Grows, Interrupted
from pipeline.hours.spent import by_step, totals
from pipeline.run.memory import PeakMemory, tree_bytes
from pipeline.store import ledger
from pipeline.store.ledger import Writer

CHECKOUT = Path(__file__).parents[3]
PATIENCE_S = 120
KEY = ("train_c", "abc123")


def _lines(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in (root / "ledger").glob("*.jsonl") for line in file.read_text().splitlines()]


def test_a_lease_is_charged_from_open_to_close(tmp_path: Path) -> None:
    with Writer(str(tmp_path), "one").lease(*KEY, devices=8, kind="cuda:NVIDIA A100-SXM4-80GB"):
        pass
    opening, closing = _lines(tmp_path)
    assert (opening["event"], closing["event"], closing["outcome"]) == ("lease_open", "lease_close", "done")
    spent = totals(str(tmp_path)).steps[KEY]
    assert (spent.step, spent.fingerprint) == KEY
    assert (spent.attempts, spent.failed_attempts, spent.estimated) == (1, 0, False)
    assert spent.device_seconds == 8 * closing["held_s"]


def test_a_heartbeat_says_that_it_is_one_and_of_which_lease(tmp_path: Path) -> None:
    """Ledgers are read by whoever wants to, so the words are fixed."""
    with Writer(str(tmp_path), "one", heartbeat_s=0.01).lease(*KEY, devices=1, kind="cpu"):
        began = time.monotonic()
        while len(_lines(tmp_path)) < 3 and time.monotonic() - began < PATIENCE_S:
            time.sleep(0.01)
    opening, *beats, closing = _lines(tmp_path)
    assert (opening["event"], closing["event"]) == ("lease_open", "lease_close")
    assert {beat["event"] for beat in beats} == {"heartbeat"}
    assert {beat["lease"] for beat in beats} == {opening["lease"]}


def test_each_line_is_on_the_disk_before_the_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        file = Path(f"/proc/self/fd/{descriptor}").resolve()
        if file.is_file():  # the folder's, for its name, is `local`'s own
            synced.append(file.read_text().splitlines()[-1])

    monkeypatch.setattr(os, "fsync", fsync)
    with Writer(str(tmp_path), "one").lease(*KEY, devices=1, kind="cpu"):
        assert [json.loads(line)["event"] for line in synced] == ["lease_open"]
    assert [json.loads(line)["event"] for line in synced] == ["lease_open", "lease_close"]


def test_failures_count_as_attempts_and_as_time(tmp_path: Path) -> None:
    writer = Writer(str(tmp_path), "one")
    for error in (OSError("a node left"), Interrupted(signal.SIGTERM), Grows("room for more ranks"), None):
        expected = pytest.raises(type(error)) if error else nullcontext()
        with expected, writer.lease(*KEY, devices=1, kind="cpu"):
            if error:
                raise error
    with writer.lease(*KEY, devices=1, kind="cpu"):  # a second lease of the attempt that succeeded
        pass
    spent = totals(str(tmp_path)).steps[KEY]
    assert (spent.attempts, spent.failed_attempts, spent.estimated) == (4, 1, False)
    closings = [event for event in _lines(tmp_path) if event["event"] == "lease_close"]
    assert [event["outcome"] for event in closings] == ["failed", "interrupted", "interrupted", "done", "done"]
    assert spent.device_seconds == pytest.approx(sum(event["held_s"] for event in closings))


def test_a_killed_process_is_charged_up_to_its_last_heartbeat(tmp_path: Path) -> None:
    program = """
        import sys, time
        from pipeline.store.ledger import Writer
        with Writer(sys.argv[1], "killed", heartbeat_s=0.02).lease("train_c", "abc123", 2, "cpu"):
            time.sleep(600)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], cwd=CHECKOUT)
    file, deadline = tmp_path / "ledger" / "killed.jsonl", time.monotonic() + PATIENCE_S
    try:
        while not file.exists() or '"heartbeat"' not in file.read_text():
            assert process.poll() is None, "the process ended by itself"
            assert time.monotonic() < deadline, "no heartbeat is ever written"
            time.sleep(0.01)
    except BaseException:
        process.kill()
        raise
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = json.loads(file.read_text().splitlines()[-1])
    with open(file, "a") as stream:
        stream.write('{"event": "heartb')  # what a kill in the middle of a write leaves

    table = totals(str(tmp_path))
    assert table.torn_lines == 1
    assert table.steps[KEY].estimated
    assert table.steps[KEY].device_seconds == 2 * last["held_s"] > 0

    with Writer(str(tmp_path), "resumed").lease(*KEY, devices=2, kind="cpu"):
        pass
    spent = totals(str(tmp_path)).steps[KEY]
    assert (spent.attempts, spent.failed_attempts, spent.estimated) == (2, 1, True)
    assert spent.device_seconds >= 2 * last["held_s"]


def test_a_ledger_that_cannot_be_written_does_not_end_the_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "ledger"
    with Writer(str(tmp_path), "one").lease(*KEY, devices=1, kind="cpu"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        folder.write_text("a file is in the way")
    assert "missed a lease_close" in caplog.text
    with (
        pytest.raises(OSError, match="ledger"),
        Writer(str(tmp_path), "two").lease(*KEY, devices=1, kind="cpu"),
    ):
        pytest.fail("began although nothing can be accounted for")


@pytest.mark.parametrize("place", ["s3_root", "tmp_path"])
def test_each_lease_is_kept_in_three_lines_however_long_it_lasts(place: str, request: pytest.FixtureRequest) -> None:
    root = str(request.getfixturevalue(place))
    writer = Writer(root, "one", heartbeat_s=0.01)
    for devices in (1, 3):
        with writer.lease(*KEY, devices=devices, kind="cpu"):
            deadline, beats = time.monotonic() + PATIENCE_S, set[bytes]()
            while len(beats) < 3:
                lines = storage.read(f"{root}/ledger/one.jsonl").splitlines()
                beats |= {line for line in lines[-1:] if b'"heartbeat"' in line}
                assert time.monotonic() < deadline, "no heartbeats are ever written"
    assert len(storage.read(f"{root}/ledger/one.jsonl").splitlines()) == 6
    spent = totals(root).steps[KEY]
    assert (spent.attempts, spent.failed_attempts, spent.estimated) == (1, 0, False)
    assert spent.device_seconds > 0


def _event(event: str, lease: str, held: float, **fields: Any) -> dict[str, Any]:
    return {"event": event, "lease": lease, "attempt": lease, "held_s": held, "time": 1e9 + held, **fields}


@st.composite
def _histories(draw: st.DrawFn) -> tuple[list[dict[str, Any]], float]:
    """Leases of one step with whole devices and seconds, and the device-seconds they add up to."""
    events: list[dict[str, Any]] = []
    expected = 0
    for number in range(draw(st.integers(1, 5))):
        lease, devices = f"lease-{number}", draw(st.integers(1, 64))
        opening = {"step": "train_c", "fingerprint": "abc123", "devices": devices, "kind": "cpu"}
        events.append(_event("lease_open", lease, 0, **opening))
        beats = draw(st.integers(0, 4))
        events += [_event("heartbeat", lease, 10 * (beat + 1)) for beat in range(beats)]
        end = 10 * beats
        if draw(st.booleans()):
            end += draw(st.integers(0, 9))
            events.append(_event("lease_close", lease, end, outcome="done"))
        expected += devices * end
    return events, expected


@given(_histories(), st.randoms())
def test_order_and_repetition_do_not_change_the_sum(
    history: tuple[list[dict[str, Any]], float], random: Random
) -> None:
    events, expected = history
    table = by_step(ledger.leases(events))
    assert table[KEY].device_seconds == expected
    shuffled = events + random.choices(events, k=3)
    random.shuffle(shuffled)
    assert by_step(ledger.leases(shuffled)) == table


@pytest.mark.parametrize(
    "other",
    [
        *({"held_s": "1"}, {"held_s": float("nan")}, {"time": None}, {"lease": []}, {"event": 1}, {"queued_s": "x"}),
        *({"joules": {}}, {"phases": {"steps": "x"}}, {"phases": 1}, {"step": 1}, {"devices": "two"}, {"kind": None}),
        *({"phases": []}, {"phases": {"steps": -1.0}}, {"held_s": -1.0}, {"devices": -2}, {"queued_s": -0.5}),
        *({"parents": ["0" * 16]}, {"parents": {"images": 5}}, {"output": 7}, {"build": []}, {"price": "dear"}),
        {"event": "lease_close"},
    ],
    ids=str,
)
def test_a_line_with_values_of_another_kind_is_as_good_as_torn(tmp_path: Path, other: dict[str, Any]) -> None:
    opening = _event("lease_open", "a", 0.0, step="train_c", fingerprint="abc123", devices=2, kind="cpu")
    lines = [opening, _event("lease_close", "a", 5.0, outcome="done"), opening | {"lease": "b"} | other]
    storage.publish("".join(json.dumps(line) + "\n" for line in lines).encode(), f"{tmp_path}/ledger/one.jsonl")
    (lease,), torn = ledger.read(str(tmp_path))
    assert (torn, lease.phases) == (1, {"other": 10.0})


def test_artifacts_of_one_step_and_fingerprint_do_not_stand_for_each_other() -> None:
    """As the samples of several prompt sets: none throws another away, and an open one is another's successor never."""
    opening = {"step": "sample", "fingerprint": "abc123", "devices": 2, "kind": "cpu"}
    events = []
    for number, (lease, output) in enumerate((("a", "samples"), ("b", "samples_held_out"))):
        told = opening | {"output": output, "build": lease, "attempt": lease, "time": number}
        events += [_event("lease_open", lease, 0, **told), *[_event("lease_close", lease, 5, outcome="done")] * number]
    found = {lease.about.output: (lease.lasting, lease.outcome) for lease in ledger.leases(events)}
    assert found == {"samples": (True, "open"), "samples_held_out": (True, "done")}


def test_kinds_of_device_are_kept_apart() -> None:
    events = []
    for lease, kind in (("a", "cpu"), ("b", "cuda:NVIDIA H200")):
        opening = {"step": "train_c", "fingerprint": "abc123", "devices": 2, "kind": kind}
        events += [_event("lease_open", lease, 0, **opening), _event("lease_close", lease, 5, outcome="done")]
    spent = by_step(ledger.leases(events))[KEY]
    assert spent.device_seconds_by_kind == {"cpu": 10, "cuda:NVIDIA H200": 10}
    assert (spent.kind, spent.device_seconds) == ("cuda:NVIDIA H200", 10)


CHILD = "import sys; block = b'x' * int(sys.argv[1]); print('ready', flush=True); sys.stdin.read()"


@contextmanager
def _child(size: int) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    yield
    process.communicate()


def test_peak_memory_counts_children_and_outlives_them() -> None:
    """To half of a block either way: a Ray of other tests, which is below this process too, grows and shrinks."""
    size = 400 << 20
    before = tree_bytes()
    with _child(size), PeakMemory() as memory:
        assert before + size / 2 < memory.lap_bytes() < before + 1.5 * size
    memory.lap()
    assert memory.lap_bytes() < before + size / 2  # what the lap before held is not this one's
    assert before + size / 2 < memory.peak_bytes < before + 1.5 * size
    assert tree_bytes() < before + size / 2


def test_peak_memory_counts_shared_pages_once() -> None:
    """Three forks of this process share a block that only the first of them wrote."""
    block = bytearray(os.urandom(1 << 20) * 200)
    before = tree_bytes()
    reader, writer = os.pipe()
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        children.append(pid)
    try:
        assert tree_bytes() < before + len(block) / 2
    finally:
        os.close(writer)
        for pid in children:
            os.waitpid(pid, 0)
