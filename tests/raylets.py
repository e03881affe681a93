"""Several raylets on this machine, as if they were nodes: `python -m tests.raylets CPUS...`, the head's first.

Prints the head's address. Then it obeys the lines that it reads, and answers each: `drain SECONDS` and `remove` a node
with a training rank (the same one, and never the head), `add CPUS` a node.
"""

import sys
import time

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

SIZE = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
HEALTH = {  # how soon a dead node counts as dead
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}


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


def main(cpus: list[int]) -> None:
    cluster = Cluster(True, head_node_args={"num_cpus": cpus[0], "_system_config": HEALTH, **SIZE})
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
                case ["add", count]:
                    cluster.add_node(num_cpus=int(count), **SIZE)
            print("done", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
