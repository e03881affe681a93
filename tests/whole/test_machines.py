"""The whole DAG on machines with addresses of their own, handed in by `ray job submit` as infra/README.md says.

Once nothing befalls it. Once more, in another root, a machine loses its power in a training, another one joins, and a
person stops the job in the next training and hands it in again: the same content.
"""

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from mlflow import MlflowClient

from datasets.files import filesystems, storage
from pipeline.store.artifacts import Artifact, Store
from tests import machines
from tests.conftest import MICRO
from tests.machines import BUCKET, Machines, wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.cluster,
    pytest.mark.timeout(1800),
]  # the first has the cluster's start in it
CALM, OTHER = f"s3://{BUCKET}/calm", f"s3://{BUCKET}/other"
TO_STAGE_B = "targets=[stage_b]"  # of two trainings, the first loses a node, and the second is stopped
PATIENCE_S = 900
MOST_ASKED = 2500  # 1,711 were counted on a busy machine, where heartbeats are many


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """A head and two nodes, whose store this process reads too."""
    if told := machines.lacking():
        pytest.skip(told)
    with pytest.MonkeyPatch.context() as patch, machines.running(tmp_path_factory.mktemp("cluster"), 2) as made:
        for name, value in made.storage.items():
            patch.setenv(name, value)
        filesystems.forget_clients()
        yield made
    filesystems.forget_clients()


class Job:
    """A run that was handed in, and what was said to whoever did."""

    def __init__(self, cluster: Machines, name: str, root: str, folder: Path, *more: str):
        self.log = folder / f"{name}.log"
        words = ["run", *MICRO, "cluster=cpus", "workers=2", f"root={root}"]
        words += ["tracking=server", f"tracking.uri={cluster.url}", *more]
        self.process = cluster.submit(name, "python", "-m", "pipeline", *words, log=self.log)

    def end(self) -> tuple[int, str]:
        """Wait for it: the exit code of who handed it in, and all that was said."""
        code = self.process.wait(PATIENCE_S)
        return code, self.log.read_text()


class Moment:
    """When a request is made for the first time: something is done before it is answered."""

    def __init__(self, cluster: Machines, method: str, pattern: str, do: Callable[[], None]):
        self.came, self._lock = threading.Event(), threading.Lock()
        self._asked, self._do = (method, re.compile(pattern)), do
        cluster.store.fault = self._look

    def _look(self, method: str, path: str) -> None:
        wanted, pattern = self._asked
        with self._lock:
            if not self.came.is_set() and method == wanted and pattern.search(unquote(path)):
                self._do()
                self.came.set()


def saved(root: str, training: str) -> tuple[str, str]:
    """The request that tells that a training has a first state."""
    return "PUT", rf"{root.removeprefix('s3:/')}/artifacts/{training}/\w+/building/checkpoints/.*\.json$"


def made(root: str) -> dict[str, Artifact]:
    return {artifact.name: artifact for artifact in Store(root).finished()}


def contents(root: str) -> dict[str, str]:
    return {name: artifact.manifest["content"] for name, artifact in made(root).items()}


def where(root: str, artifact: str) -> set[str]:
    """The machines that ranks of a training have said that they are on."""
    pieces = [name for name in storage.listing(f"{root}/logs") if f"/{artifact}.ranks/" in name]
    said = "".join(storage.read(f"{root}/logs/{name}").decode() for name in pieces)
    return set(re.findall(r"rank \d of 2 on (\S+) \(cpu\)", said))


@pytest.fixture(scope="module")
def calm(cluster: Machines, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the run made that nothing befell, of which the requests were counted."""
    cluster.store.seen.clear()
    code, said = Job(cluster, "calm", CALM, tmp_path_factory.mktemp("calm")).end()
    assert code == 0, said
    return contents(CALM)


def test_a_job_makes_the_whole_dag_on_machines_without_a_checkout(cluster, calm):
    asked = cluster.store.requests()
    objects = len(storage.listing(CALM))
    assert {"samples", "scores", "release"} <= calm.keys()
    for training in ("stage_a", "stage_b", "stage_c"):
        assert where(CALM, training) == {node.name for node in cluster.nodes}
    print(f"{asked} requests for {objects} objects")  # seen with pytest -rP
    assert asked < MOST_ASKED, cluster.store.seen
    client = MlflowClient(cluster.url)
    (experiment,) = (one for one in client.search_experiments() if one.name == "wuerstchen")
    told = [run.data.tags.get("wst.output") for run in client.search_runs([experiment.experiment_id])]
    assert calm.keys() <= set(told)


def test_a_node_dies_another_joins_and_the_job_is_stopped_and_handed_in_again(cluster, calm, tmp_path):
    lost = cluster.nodes[0]
    moment = Moment(cluster, *saved(OTHER, "stage_a"), lost.go)
    job = Job(cluster, "taken", OTHER, tmp_path, TO_STAGE_B)
    wait_for(moment.came.is_set, job.process, PATIENCE_S)
    added = cluster.add()
    moment = Moment(cluster, *saved(OTHER, "stage_b"), lambda: cluster.stop("taken"))
    _, said = job.end()
    assert moment.came.is_set(), said
    assert "interrupted; the same command goes on from here" in said
    assert "stage_a" in contents(OTHER)
    assert "stage_b" not in contents(OTHER)
    code, said = Job(cluster, "again", OTHER, tmp_path, TO_STAGE_B).end()
    assert code == 0, said
    assert contents(OTHER) == {name: calm[name] for name in contents(OTHER)}
    others = where(OTHER, "stage_a") - {lost.name}  # whose log may have gone with it, before it was sent
    assert others == {cluster.nodes[1].name, added.name}
    metrics = {name: artifact.manifest["metrics"] for name, artifact in made(OTHER).items()}
    assert metrics["stage_a"]["interruptions"] == 1
    assert metrics["stage_b"]["interruptions"] == 1
    assert metrics["stage_b"]["steps_again"] == 0  # the state was saved
