"""The whole DAG as a stranger gets it: three machines with addresses of their own and no checkout, Ray with a token, an
object store, an MLflow server, and a job that is handed in from elsewhere. Then machines come and go in its middle.
"""

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from datasets.files import filesystems
from pipeline.store.artifacts import Store
from tests.conftest import CHECKOUT, MICRO
from tests.faulty_store import FaultyStore, before
from tests.machines import Machine, RayMachines, network, why_not
from tests.object_store import ObjectStore
from tests.raylets import CLUSTER_PACKAGES

pytestmark = [pytest.mark.ray, pytest.mark.cluster]
WORDS = (*MICRO, "workers=2", "data.shard_rows=1")  # of several shards each actor has some
PATIENCE_S = 300
WITHOUT_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # of MLflow's own, which take a core


def wait_for(event: Callable[[], object], process: subprocess.Popen[str], said: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not event():
        assert process.poll() is None, f"it ended before the event: {said.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"the event never came: {said.read_text()[-4000:]}"
        time.sleep(0.05)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@contextmanager
def mlflow(address: str, folder: Path) -> Iterator[str]:
    """A server at an address, without users; the words that name it."""
    place, said = f"{address}:5000", folder / "mlflow.txt"
    command = [sys.executable, "-m", "mlflow", "server", "--host", address, "--workers=1", "--allowed-hosts", place]
    command += [f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/pictures"]
    pipes: dict[str, Any] = {"stderr": subprocess.STDOUT, "text": True, "env": {**os.environ, **WITHOUT_JOBS}}
    with said.open("w") as told, subprocess.Popen(command, stdout=told, cwd=folder, **pipes) as server:
        try:
            wait_for(lambda: answers(f"http://{place}/health"), server, said)
            yield f"http://{place}"
        finally:
            server.terminate()


def contents(root: str) -> dict[str, str]:
    return {artifact.name: artifact.manifest["content"] for artifact in Store(root).finished()}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, pipeline: Callable[..., object]) -> dict[str, str]:
    """What the same words make on one machine, where nothing befalls them."""
    root = tmp_path_factory.mktemp("calm")
    pipeline("run", *WORDS, f"root={root}")
    return contents(str(root))


class Handed:
    """A job that was handed in from outside, and the store that it works on."""

    def __init__(self, rays: RayMachines, store: FaultyStore, said: Path, *words: str):
        self._store, self._said = store, said
        command = ["ray", "job", "submit", "--address", rays.jobs, "--working-dir", str(CHECKOUT), "--"]
        with said.open("w") as told:
            self._process = subprocess.Popen(
                [*command, "python", "-m", "pipeline", "run", *words],
                env={**os.environ, **rays.environment},
                stdout=told,
                stderr=told,
                text=True,
            )

    @contextmanager
    def held_at(self, pattern: str) -> Iterator[None]:
        """From when it writes such objects on: they are refused until the end of the block."""
        self._store.seen.clear()
        self._store.fault = lambda method, path: "slow" if method == "PUT" and re.search(pattern, path) else None
        self.wait_for(lambda: self._store.requests("slow"))
        yield
        self._store.fault = lambda method, path: None

    def wait_for_work(self, machine: Machine, pattern: str) -> None:
        """Until a machine asks for such an object."""
        asked = self._store.askers[machine.address]
        self.wait_for(lambda: any(re.search(pattern, path) for path in list(asked)))

    def wait_for(self, event: Callable[[], object]) -> None:
        wait_for(event, self._process, self._said)

    def finish(self) -> str:
        """Wait for the end; what was said."""
        code = self._process.wait(PATIENCE_S)
        assert code == 0, self._said.read_text()[-8000:]
        return self._said.read_text()

    def end(self) -> None:
        self._process.kill()


@pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
def test_machines_come_and_go_and_the_same_is_made(tmp_path, object_store: ObjectStore, calm, monkeypatch):
    if not CLUSTER_PACKAGES.is_dir():
        pytest.skip("no Ray takes jobs without the packages of clusters: make test-cluster puts them there")
    with (
        network(tmp_path) as machines,
        before(object_store.url, machines.address) as store,
        mlflow(machines.address, tmp_path) as tracking,
    ):
        known = {**object_store.environment, "AWS_ENDPOINT_URL": store.url, "MLFLOW_TRACKING_URI": tracking}
        rays = RayMachines(machines, 2, **known)
        root = f"s3://pictures/{tmp_path.name}"
        job = Handed(rays, store, tmp_path / "job.txt", *WORDS, "cluster=cpus", "tracking=server", f"root={root}")
        try:
            with job.held_at("latents_a/.*receipts"):  # in the middle of an encoding
                job.wait_for_work(rays.add(), "images/")
                rays.workers[0].lose()
            with job.held_at("stage_c/.*checkpoints"):  # and of a training, which waits for as many ranks as it had
                rays.workers[1].lose()
            job.wait_for_work(rays.add(), "stage_c/.*checkpoints")
            said = job.finish()
        finally:
            job.end()
        for name, value in known.items():
            monkeypatch.setenv(name, value)
        filesystems.forget_clients()
        assert contents(root) == calm
    filesystems.forget_clients()
    assert not any(secret in said for secret in (rays.environment["RAY_AUTH_TOKEN"],))
