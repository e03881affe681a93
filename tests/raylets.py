"""Several raylets on this machine, as if they were nodes: `python -m tests.raylets CPUS...`, the head's first.

Prints the head's address. Then it obeys the lines that it reads, and answers each: `drain SECONDS` and `remove` a node
with a training rank (the same one, and never the head), `add CPUS [POOL]` a node, `metrics` with the ports to scrape,
where Ray's agents have what they need for that.
"""

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from pipeline.settings.resources import POOL_LABEL

SIZE = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
HEALTH = {  # how soon a dead node counts as dead
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
    "metrics_report_interval_ms": 1000,
}


TRIES = 3
CHECKOUT = Path(__file__).parents[1]
CLUSTER_PACKAGES = CHECKOUT / ".cluster-packages"


class Raylets:
    """Those of this module in a process of their own, and what a driver needs to join them.

    Where they are `watched`, they find the packages that clusters have beside ours, which `make test-cluster` has put
    there, and tell metrics.
    """

    def __init__(self, *cpus: int, watched: bool = False):
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        }
        if watched:
            before = os.environ.get("PYTHONPATH")
            self.environment["PYTHONPATH"] = os.pathsep.join([*([before] if before else []), str(CLUSTER_PACKAGES)])
        self.said = Path(tempfile.mkdtemp(), "said")
        command = [sys.executable, "-m", "tests.raylets", *map(str, cpus)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                command, cwd=CHECKOUT, env=os.environ | self.environment, stderr=said, **pipes
            )

    def __enter__(self) -> "Raylets":
        self.address = self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        below = psutil.Process(self.process.pid).children(recursive=True)
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(60)
        finally:
            for process in [*below, psutil.Process(self.process.pid)] if self.process.poll() is None else below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    @property
    def words(self) -> tuple[str, ...]:
        """Those of a run on them, in their `environment`."""
        return (f"cluster.address={self.address}",)

    def tell(self, command: str) -> list[str]:
        """Have a command carried out; what it answers."""
        assert self.process.stdin
        print(command, file=self.process.stdin, flush=True)
        return list(iter(self._answer, "done"))

    def _answer(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline().strip()
        assert line, f"the raylets are gone: {self.said.read_text()[-4000:]}"
        return line


def with_rank(cluster: Cluster):
    """A node, not the head, on which a training rank runs."""
    for node in cluster.worker_nodes:
        (raylet,) = node.all_processes["raylet"]
        below = psutil.Process(raylet.process.pid).children(recursive=True)
        if any("RayTrainWorker" in " ".join(process.cmdline()) for process in below):
            return node
    raise RuntimeError("no node but the head has a rank")


def drain(cluster: Cluster, node, seconds: int) -> bool:
    """Tell Ray that a node will be taken away; whether it agrees."""
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = ray._raylet.GcsClient(address=cluster.address)
    accepted, _ = client.drain_node(node.node_id, reason, "a test", int(1000 * (time.time() + seconds)))
    return accepted


def ports(cluster: Cluster) -> list[int]:
    """Those where each node tells its metrics."""
    return sorted(node["MetricsExportPort"] for node in cluster.global_state.node_table() if node["Alive"])


def begun(cpus: int) -> Cluster:
    """A head; a busy machine gets another try, since Ray waits for half a minute only."""
    for left in reversed(range(TRIES)):
        try:
            return Cluster(True, head_node_args={"num_cpus": cpus, "_system_config": HEALTH, **SIZE})
        except Exception:
            if not left:
                raise
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    raise AssertionError


def main(cpus: list[int]) -> None:
    cluster = begun(cpus[0])
    try:
        for count in cpus[1:]:
            cluster.add_node(num_cpus=count, **SIZE)
        print(cluster.address, flush=True)
        victim = None
        for line in sys.stdin:
            match line.split():
                case ["drain", seconds]:
                    victim = with_rank(cluster)
                    assert drain(cluster, victim, int(seconds))
                case ["remove"]:
                    cluster.remove_node(victim or with_rank(cluster), allow_graceful=False)
                    victim = None
                case ["add", count, *pool]:  # it is busy: whoever needs it waits
                    labels = {POOL_LABEL: pool[0]} if pool else {}
                    cluster.add_node(wait=False, num_cpus=int(count), labels=labels, **SIZE)
                case ["metrics"]:
                    print(*ports(cluster), sep="\n")
            print("done", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
