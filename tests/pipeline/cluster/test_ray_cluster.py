"""Starting Ray where it does not start; that it does is in tests/whole."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray

from datasets.files.errors import StorageError
from pipeline.cluster import joining, ray_cluster
from pipeline.cluster.messages import Saved
from pipeline.cluster.ray_cluster import Cluster, _patiently
from pipeline.errors import InfrastructureError, Interrupted, RetriesExhausted, exit_code
from pipeline.settings import compose
from tests.raylets import Raylets

CHECKOUT = Path(__file__).parents[3]


@pytest.mark.parametrize("kind", [Exception, RuntimeError, TimeoutError])
def test_a_ray_that_does_not_start_is_one_sentence(kind, monkeypatch):
    """As Ray raises it on a machine that is too busy; its processes cannot be made late on purpose."""

    told, begun = list[str](), list[subprocess.Popen[bytes]]()

    def late(**_: object) -> None:
        begun.append(subprocess.Popen(["sleep", "600"]))
        raise kind("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(RetriesExhausted, match=r"^Ray did not start \(The current node timed out .*again") as caught:
        Cluster(compose.load("stage_c", ["scale=micro"]).cluster, 1, told.append)
    assert len(begun) == joining.STARTS
    assert not any(psutil.pid_exists(process.pid) for process in begun)
    assert told == [
        f"Ray did not start (The current node timed out during startup.): it is tried again, {number} of 2"
        for number in (1, 2)
    ]
    for process in begun:
        process.wait()
    assert exit_code(caught.value) == 5
    assert "\n" not in str(caught.value)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_error_of_ours_is_not_hidden(monkeypatch):
    def wrong(**_: object) -> None:
        raise TypeError("no such argument")

    monkeypatch.setattr(ray, "init", wrong)
    with pytest.raises(TypeError):
        Cluster(compose.load("stage_c", ["scale=micro"]).cluster, 1)


@pytest.mark.parametrize(
    ("raised", "told", "code"),
    [(KeyboardInterrupt(), KeyboardInterrupt, 130), (SystemExit(15), Interrupted, 143), (OSError("x"), Exception, 5)],
)
def test_a_ray_that_is_not_waited_for_is_ended_with_all_that_it_has_started(raised, told, code, monkeypatch):
    other, begun = subprocess.Popen(["sleep", "600"]), list[subprocess.Popen[bytes]]()

    def half(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)  # as Ray does
        begun.append(subprocess.Popen(["sleep", "600"]))
        raise raised

    monkeypatch.setattr(ray, "init", half)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(told) as caught:
            Cluster(compose.load("stage_c", ["scale=micro"]).cluster, 1)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    assert exit_code(caught.value) == code
    assert not psutil.pid_exists(begun[0].pid)
    begun[0].wait()
    assert signal.getsignal(signal.SIGTERM) is before


def name_of(process: psutil.Process) -> str | None:
    """None of one that is gone: Ray looks at processors and interfaces by programs of a moment."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return None


@pytest.mark.ray
@pytest.mark.parametrize("moment", ["gcs_server", pytest.param("raylet", marks=pytest.mark.cluster)])
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.cluster)])
def test_a_signal_while_ray_starts_ends_the_run_and_all_of_ray(moment, number, tmp_path):
    command = [sys.executable, "-m", "pipeline", "run", "conf=stage_a", "scale=micro", f"root={tmp_path / 'root'}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=CHECKOUT) as run:
        own, seen, deadline = psutil.Process(run.pid), list[psutil.Process](), time.monotonic() + 300
        while not any(name_of(process) == moment for process in seen):
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.02)
            seen = own.children(recursive=True)
        run.send_signal(number)
        assert run.stderr is not None
        said = run.stderr.read()
        assert run.wait() == 128 + number, said
    assert said.endswith("\ninterrupted; the same command goes on from here\n")
    assert said.count("\n") <= 3, said
    assert psutil.wait_procs(seen, timeout=60)[1] == []
    assert list((tmp_path / "root" / "claims").rglob("runs/*.json")) == []


@pytest.mark.parametrize("error", [StorageError(5, "i/o error", "/root/x"), InfrastructureError("the board is gone")])
def test_work_during_which_the_driver_fails_has_ended_before_the_step_is_tried_again(error):
    asked, ended, ticks = threading.Semaphore(0), threading.Event(), list[bool]()

    def blocking() -> None:
        for _ in range(2):  # it does not hear at once
            assert asked.acquire(timeout=60)
        ended.set()

    def tick() -> None:
        ticks.append(ended.is_set())
        raise error

    def end() -> None:
        asked.release()
        raise InfrastructureError("nor can it be asked")

    with pytest.raises(type(error)) as raised:
        _patiently(blocking, tick, end)
    assert raised.value is error
    assert ticks == [False, True]  # and has been heard to its end


@pytest.mark.parametrize(
    ("lost", "address"), [("raylet", None), ("gcs_server", None), ("raylet", "auto"), ("log", None)]
)
def test_a_run_whose_own_ray_has_died_leaves_it_before_it_is_ended_by_it(lost, address, monkeypatch):
    left: list[bool] = []
    monkeypatch.setattr(ray_cluster, "_node", lambda: SimpleNamespace(dead_processes=lambda: [(lost, None)]))
    monkeypatch.setattr(ray_cluster, "get", lambda reference: reference)
    cluster = object.__new__(Cluster)
    cluster.config, cluster.close = SimpleNamespace(address=address), lambda: left.append(True)
    cluster._unheard, cluster._grows = deque(), False
    cluster.board = SimpleNamespace(exchange=SimpleNamespace(remote=lambda stop: [Saved("stage_a", 3)]))
    if lost == "log" or address:
        assert [*cluster.exchange(stop=False)] == [Saved("stage_a", 3)]
        return
    with pytest.raises(RetriesExhausted, match="own Ray has died") as told:
        next(cluster.exchange(stop=False))
    assert (left, exit_code(told.value)) == ([True], 5)


def test_a_ray_that_is_late_once_is_tried_again(monkeypatch):
    told, tries = list[str](), list[object]()

    def late_once(**words: object) -> None:
        tries.append(words)
        if len(tries) == 1:
            raise RuntimeError("late")

    monkeypatch.setattr(ray, "init", late_once)
    joining.start(compose.load("stage_c", ["scale=micro"]).cluster, told.append)
    assert (len(tries), told) == (2, ["Ray did not start (late): it is tried again, 1 of 2"])


BESIDE = """
import sys
import ray
from pipeline.cluster.ray_cluster import Cluster
from pipeline.settings import compose
from tests.raylets import Raylets

cluster = Cluster(compose.load("stage_c", ["scale=micro", *sys.argv[1:]]).cluster, 1)
actors = [cluster.board, *(cluster.slots(1, 1.0, 1.0) for _ in range(4))]
nodes = [actor.__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id()) for actor in actors]
print({node == ray.get_runtime_context().get_node_id() for node in ray.get(nodes)})
"""


@pytest.mark.ray
@pytest.mark.cluster
def test_actors_of_a_run_live_on_its_driver_s_node_and_end_with_no_other():
    """Of three nodes: with any of them taken, five actors are hardly ever on the right one."""
    with Raylets(0, 1, 1) as nodes:
        command = [sys.executable, "-c", BESIDE, *nodes.words]
        environment = os.environ | nodes.environment
        done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, env=environment)
    assert done.stdout.splitlines()[-1:] == ["{True}"], done.stderr


RAISING = """
from pipeline.cluster.ray_cluster import Cluster
from pipeline.errors import ClaimLost
from pipeline.settings import compose
from stages.weight_files import BadWeights

class Worker:
    def __init__(self, error, when):
        self.error = error
        if when == "made":
            raise error

    def __call__(self, shard):
        raise self.error

cluster = Cluster(compose.load("stage_c", ["scale=micro"]).cluster, 1)
ways = (BadWeights("another model"), "made"), (BadWeights("another"), "called"), (ClaimLost("gone"), "called")
for error, when in ways:
    try:
        cluster.map_shards(Worker, (error, when), [1, 2], "encode", lambda: None)
    except Exception as found:
        print(type(found).__name__, found)
cluster.close()
"""


@pytest.mark.ray
def test_what_an_actor_raises_reaches_the_driver_as_it_is():
    """Else a person's mistake, or a claim that is lost, would be tried again as if the cluster had failed."""
    done = subprocess.run([sys.executable, "-c", RAISING], capture_output=True, text=True, cwd=CHECKOUT)
    told = [line for line in done.stdout.splitlines() if "(raylet)" not in line]
    assert told == ["BadWeights another model", "BadWeights another", "ClaimLost gone"], done.stderr
    assert "Traceback" not in done.stderr
