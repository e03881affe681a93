"""A node that is added in the middle of a data step is used; `python -m tests.whole.test_growing ADDRESS` drives it.

It says `tasks` and `actors` once one node works, and ends each part when a second one, and a third, has done some.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

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


def drive(address: str, folder: Path) -> None:
    words = ["scale=micro", f"cluster.address={address}", "cluster.encoders={min: 1, max: 8}"]
    cluster = Cluster(compose.load("stage_c", words).cluster, 1)
    begun = set()

    def tick(part: str, nodes: int) -> None:
        seen = len(list(folder.iterdir()))
        if seen >= nodes - 1 and part not in begun:
            begun.add(part)
            print(part, flush=True)
        if seen >= nodes:
            raise Enough

    try:
        for _ in cluster.call_each(
            work, ((str(folder), item) for item in range(WORK)), "data", lambda: tick("tasks", 2)
        ):
            pass
    except Enough:
        print("both", flush=True)
    try:
        cluster.map_shards(Worker, (str(folder),), range(WORK), "encode", lambda: tick("actors", 3))
    except Enough:
        print("all", flush=True)


def test_a_node_that_is_added_gets_tasks_and_actors(tmp_path):
    with Raylets(1) as nodes:
        command = [sys.executable, "-m", "tests.whole.test_growing", nodes.address, str(tmp_path)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=CHECKOUT, env=os.environ | nodes.environment, **pipes) as driver:
            try:
                for part, then in (("tasks\n", "both\n"), ("actors\n", "all\n")):
                    assert driver.stdout.readline() == part, driver.stderr.read()
                    nodes.tell("add 1")
                    assert driver.stdout.readline() == then, driver.stderr.read()
            finally:
                driver.kill()


if __name__ == "__main__":
    drive(sys.argv[1], Path(sys.argv[2]))
