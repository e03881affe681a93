"""A node that is added in the middle of a data step is used; this module as a program is the driver.

It says `tasks` and `actors` once all nodes that there are for these work, and ends each part when one more has, too.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.cluster.ray_cluster import Cluster
from pipeline.settings import compose
from tests.raylets import CHECKOUT, Raylets

pytestmark = [pytest.mark.ray, pytest.mark.cluster]
WORK = 400  # of half a second each: more than one node does in the patience of a test


class Enough(Exception):
    """All nodes have worked."""


class Worker:
    """Works half a second on each, and leaves the name of its node in a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, item: int) -> None:
        time.sleep(0.5)
        Path(self.folder, ray.get_runtime_context().get_node_id()).touch()


def work(folder: str, item: int) -> None:
    """The same as a task."""
    Worker(folder)(item)


def drive(folder: Path, *words: str) -> None:
    cluster = Cluster(compose.load("stage_c", ["scale=micro", *words]).cluster, 1)
    begun = set()

    def tick(part: str, nodes: int) -> None:
        seen = len(list(folder.iterdir()))
        if seen >= nodes - 1 and part not in begun:
            begun.add(part)
            print(part, flush=True)
        if seen >= nodes:
            raise Enough

    items = ((str(folder), item) for item in range(WORK))
    first = 1 if cluster.config.pools else 2
    try:
        for _ in cluster.call_each(work, items, "data", lambda: tick("tasks", first)):
            pass
    except Enough:
        print("enough", flush=True)
    try:
        cluster.map_shards(Worker, (str(folder),), range(WORK), "encode", lambda: tick("actors", first + 1))
    except Enough:
        print("enough", flush=True)


def driven(nodes: Raylets, folder: Path, added: list[str], *words: str) -> None:
    """Each part goes on with the node that is added when it says so."""
    folder.mkdir()
    command = [sys.executable, "-m", "tests.whole.test_growing", str(folder), *nodes.words, *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=CHECKOUT, env=os.environ | nodes.environment, **pipes) as driver:
        try:
            for part, node in zip(("tasks\n", "actors\n"), added, strict=True):
                assert driver.stdout.readline() == part, driver.stderr.read()
                nodes.tell(f"add {node}")
                assert driver.stdout.readline() == "enough\n", driver.stderr.read()
        finally:
            driver.kill()


def test_a_node_that_is_added_gets_tasks_and_actors(tmp_path):
    with Raylets(1) as nodes:
        driven(nodes, tmp_path / "all", ["1", "1"], "cluster.encoders={min: 1, max: 8}")
        pool = "{work: [data], nodes: {count: 1, gpus: 0, cpus: 1, memory_gib: 1}}"
        words = ["cluster=kuberay", "cluster.device=cpu", f"cluster.pools={{cheap: {pool}}}"]
        driven(nodes, tmp_path / "pools", ["1 cheap", "1 workers"], *words)  # none of either is there at first


if __name__ == "__main__":
    drive(Path(sys.argv[1]), *sys.argv[2:])
