"""Claims of real processes, in containers too: killed, alive, and many at once."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from datasets.files import storage
from pipeline.errors import LeaseHeld
from pipeline.store import claims
from pipeline.store.artifacts import Fingerprint, Store
from pipeline.store.claims import Owner
from pipeline.store.process import ProcessId
from tests.pipeline.store.claiming import WHAT, Time, file_of, hold, told

CHECKOUT = Path(__file__).parents[3]


HOLD = """
import sys, time
from pipeline.store import claims
with claims.hold(sys.argv[1], sys.argv[2], print):
    print("held", flush=True)
    time.sleep(600)
"""


CONTAINED = ("unshare", "-pf", "--kill-child")  # a command in a PID namespace of its own, which ends with unshare(1)


@contextlib.contextmanager
def another(*command: str) -> Iterator[subprocess.Popen[str]]:
    """Another process, and whatever it has started in a namespace of its own; gone after the block, however it ends."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def holder(root: Path, *before: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the claim."""
    with another(*before, sys.executable, "-c", HOLD, str(root), WHAT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def test_a_process_that_was_killed_is_replaced_at_once(tmp_path, capsys):
    with holder(tmp_path) as process:
        with pytest.raises(LeaseHeld, match=f"pid {process.pid}"):
            hold(str(tmp_path), Time()).__enter__()
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked for its exit code yet
        with hold(str(tmp_path), clock := Time()):
            assert clock.now == 0
    assert f"taking over from pid {process.pid}" in capsys.readouterr().out


def namespaces() -> str | None:
    """Why processes of another PID namespace cannot be made here; None where they can."""
    probe = subprocess.run([*CONTAINED, "true"], capture_output=True, text=True)
    return probe.stderr.strip() if probe.returncode else None


try:
    NO_NAMESPACES = namespaces()
except FileNotFoundError:
    NO_NAMESPACES = "there is no unshare(1)"
needs_namespaces = pytest.mark.skipif(NO_NAMESPACES is not None, reason=f"no PID namespaces: {NO_NAMESPACES}")


@needs_namespaces
def test_no_holder_outlives_its_test(tmp_path):
    with holder(tmp_path, *CONTAINED) as process:
        inside = psutil.Process(process.pid).children(recursive=True)
        assert inside
    assert psutil.wait_procs(inside, timeout=60)[1] == []


@needs_namespaces
def test_a_live_process_of_another_container_on_this_host_is_respected(tmp_path):
    """Its number is of nobody here, or of somebody else; its heartbeat is what counts."""
    with holder(tmp_path, *CONTAINED):
        owner = told(str(tmp_path), 1)
        assert (owner["host"], owner["boot"]) == (ProcessId.own().host, ProcessId.own().boot)
        storage.publish(json.dumps({**owner, "pid": 2**22 - 1}).encode(), file_of(str(tmp_path), 1))
        with pytest.raises(LeaseHeld):
            hold(str(tmp_path), look_s=0.1).__enter__()


WORKER = """
import os, random, sys, time
from datasets.files import storage
from pipeline.errors import ClaimLost, LeaseHeld
from pipeline.store import claims
from pipeline.store.artifacts import Fingerprint, Store

root, rounds, name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
pace = claims.Pace(heartbeat_s=0.1, silence_s=1.5, look_s=0.05)

def late(function):
    def call(*arguments):
        time.sleep(random.uniform(0.01, 0.05))
        return function(*arguments)
    return call

for slow in ("remove", "create", "move", "publish"):
    setattr(storage, slow, late(getattr(storage, slow)))

for number in range(rounds):
    fingerprint = Fingerprint("train_a", 1, {"round": number}, {})
    while not os.path.exists(f"{root}/go{number}"):
        time.sleep(0.001)
    store, told = Store(root), "nothing"
    while not store.find("stage_a", fingerprint.digest):
        try:
            what = claims.artifact("stage_a", fingerprint.digest)
            with claims.hold(root, what, lambda text: None, pace=pace) as claim:
                if not store.find("stage_a", fingerprint.digest):
                    path = store.path("stage_a", fingerprint.digest)
                    files = {name: storage.publish(name.encode(), f"{path}/{name}")}
                    facts = {"files": files, "timed": [], "rows": 1, "created": name}
                    store.commit("stage_a", fingerprint, facts, claim)
                    told = "committed"
        except (LeaseHeld, ClaimLost):
            time.sleep(0.05)
    print(number, told, flush=True)
"""


@needs_namespaces
@pytest.mark.parametrize("rounds", [5, pytest.param(25, marks=pytest.mark.chaos)])
def test_of_three_containers_that_take_over_at_once_one_builds(tmp_path, rounds):
    """Each round somebody died elsewhere; all three wait for the same minute, which is short here, and then try."""
    root = str(tmp_path)
    prints = [Fingerprint("train_a", 1, {"round": number}, {}) for number in range(rounds)]
    for print_ in prints:
        dead = Owner("t", ProcessId(ProcessId.own().host, 7, 0.0, ProcessId.own().boot, "pid:[1]"), "anna")
        storage.publish(dead.content(), f"{root}/claims/{claims.artifact('stage_a', print_.digest)}/000001.json")
    command = [*CONTAINED, sys.executable, "-c", WORKER, root, str(rounds)]
    with contextlib.ExitStack() as exits:
        workers = [exits.enter_context(another(*command, name)) for name in ("a", "b", "c")]
        outcomes = []
        for number in range(rounds):
            (tmp_path / f"go{number}").touch()
            outcomes.append([worker.stdout.readline().split()[1] for worker in workers])  # type: ignore[union-attr]
        assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert [outcome.count("committed") for outcome in outcomes] == [1] * rounds
    for print_ in prints:
        found = Store(root).find("stage_a", print_.digest)
        assert found is not None
        (name,) = found.files
        assert found.read(name) == name.encode() == found.manifest["created"].encode()
