"""What each node of a Ray is like, and how fast they reach the root and each other: for `doctor`."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from datasets.files import storage
from pipeline.cluster.board import BoardClient
from pipeline.cluster.failures import cause
from pipeline.cluster.joining import code
from pipeline.cluster.messages import Sums

T = TypeVar("T")

SAMPLE = 32 * 2**20  # bytes that are written to the root and read again
GRADIENTS = 16 * 2**20  # numbers that ranks add up, 4 bytes each
ROUNDS = 5
PINGS = 3
LIBRARIES = ("ray", "torch", "pyarrow")
ANSWER_S = 120.0  # for a node that has to start a process, which imports torch


@dataclass(frozen=True)
class Node:
    """A node as Ray knows it: its id, address, and what it has, by Ray's names."""

    id: str
    address: str
    resources: dict[str, float]

    @property
    def gpus(self) -> str:
        """How many, of which kind."""
        kinds = [name.partition(":")[2] for name in self.resources if name.startswith("accelerator_type:")]
        count = int(self.resources.get("GPU", 0))
        return f"{count} GPUs" + (f" ({'+'.join(sorted(kinds))})" if kinds and count else "")


@dataclass(frozen=True)
class Seen:
    """What a node says of itself. `code` is a hash of our packages there, `free` are bytes of Ray's `folder`'s disk."""

    versions: dict[str, str]
    code: str
    free: int
    store: str | None  # what the root said, where it did not take a file
    written_s: float = 0.0
    read_s: float = 0.0
    folder: str = "/tmp"


def every() -> list[Node]:
    """The nodes that answer, by address."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    found = [Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"]) for node in alive]
    return sorted(found, key=lambda node: (node.address, node.id))


def ask(nodes: Sequence[Node], function: Callable[..., T], *arguments: Any) -> list[T | BaseException]:
    """What a function returns on each node, at the same time on all; or what it raised there."""
    references = [_on(node, function, *arguments) for node in nodes]
    ray.wait(references, num_returns=len(references), timeout=ANSWER_S)
    return [_outcome(reference) for reference in references]


def look(folder: str) -> Seen:
    """What this node is like, with a file in `folder` written, read and removed."""
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}
    place = _ray_folder()
    free = shutil.disk_usage(place).free
    path, sample = storage.join(folder, uuid.uuid4().hex), os.urandom(SAMPLE)
    try:
        begun = time.monotonic()
        storage.publish(sample, path)
        written = time.monotonic()
        same = storage.read(path) == sample
        ended = time.monotonic()
        storage.remove(path)
    except OSError as error:
        return Seen(versions, code_hash(), free, str(error), folder=place)
    wrong = None if same else "it gave other bytes"
    return Seen(versions, code_hash(), free, wrong, written - begun, ended - written, place)


def _ray_folder() -> str:
    """Where this node's Ray keeps its logs, and what its memory has no room for."""
    node = ray._private.worker._global_node
    return str(node.get_temp_dir_path()) if node else tempfile.gettempdir()


def code_hash() -> str:
    """Of the modules of our packages that this process imports."""
    digest = hashlib.sha256()
    for package in map(Path, code()):
        for file in sorted(package.rglob("*.py")):
            digest.update(f"{package.name}/{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def skew_s(node: Node) -> float:
    """By how many seconds a node's clock is ahead of this one's, as exactly as its fastest answer tells."""
    told = []
    for _ in range(PINGS + 1):  # the first may have to start a process
        before = time.time()
        theirs = ray.get(_on(node, _clock), timeout=ANSWER_S)
        after = time.time()
        told.append((after - before, theirs - (before + after) / 2))
    return min(told)[1]


def add_up(board: BoardClient) -> None:
    """A rank's part of some sums over all ranks; the first tells the board of the seconds of each."""
    rank, device = ray.train.get_context().get_world_rank(), ray.train.torch.get_device()
    numbers, seconds = torch.ones(GRADIENTS, device=device), []
    for _ in range(ROUNDS + 1):  # the first connects
        dist.barrier()
        begun = time.monotonic()
        dist.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.monotonic() - begun)
    if rank == 0:
        board.post(Sums(dist.get_backend(), sorted(seconds[1:])[ROUNDS // 2]))


def bandwidth(ranks: int, seconds: float) -> float:
    """Bytes a second over the slowest link of a ring: each sends 2 (n-1)/n of the numbers, as NCCL's tests count."""
    return 2 * (ranks - 1) / ranks * GRADIENTS * 4 / seconds


def _clock() -> float:
    return time.time()


def _on(node: Node, function: Callable[..., Any], *arguments: Any) -> Any:
    there = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(function).remote(*arguments)


def _outcome(reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return TimeoutError(f"no answer within {ANSWER_S:.0f} s")
    except ray.exceptions.RayError as error:
        return cause(error)
