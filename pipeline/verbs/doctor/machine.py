"""Checks of this machine, for the local scale or for the conf that is asked about."""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil

import datasets
import pipeline
from datasets.files import storage
from pipeline.environment import ray_folder
from pipeline.errors import UsageError
from pipeline.plan import training_memory
from pipeline.run.writable import check_writable
from pipeline.settings.resources import Cluster
from pipeline.verbs.doctor.finding import Asked, Finding, finding
from pipeline.verbs.doctor.traces import no_traces
from stages.anatomy.memory_estimate import GIB

RUN_GIB = 4  # memory of a run beside its trainings: the driver, Ray, the libraries of its workers; seen at scale=micro

NEEDED = (
    "ray",
    "torch",
    "torchvision",
    "open_clip_torch",
    "img2dataset",
    "webdataset",
    "pyarrow",
    "mlflow",
    "hydra-core",
)


def python(_: Asked) -> Finding:
    return finding(
        "python", (3, 11) <= sys.version_info[:2] <= (3, 12), f"{platform.python_version()}, 3.11 or 3.12 needed"
    )


def packages(_: Asked) -> Finding:
    found, missing = [], []
    for name in NEEDED:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    text = ", ".join(found) + (f"; missing: {', '.join(missing)}, run `make setup`" if missing else "")
    return finding("packages", not missing, text)


def our_datasets(_: Asked) -> Finding:
    """Whether `datasets` is ours, and not Hugging Face's."""
    ours = Path(datasets.__path__[0]).parent == Path(pipeline.__path__[0]).parent
    return finding("datasets package", ours, f"{datasets.__file__}; run from the checkout's root")


def device(asked: Asked) -> Finding:
    import torch

    from stages.precision import computes_bf16

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        able = computes_bf16(torch.device("cuda"))
        without = "" if able else ", which do not compute in bf16: give precision=fp32 or auto"
        return Finding("device", "ok" if able else "warning", f"{len(names)} x {names[0]}{without}")
    found = f"no CUDA device: {os.cpu_count()} CPU cores"
    cluster = asked.cluster
    if cluster and cluster.device == "cuda":
        state, told = ("warning", "other nodes must have some") if cluster.address else ("failed", "use auto or cpu")
        return Finding("device", state, f"{found}, but cluster.device=cuda; {told}")
    return Finding("device", "ok", found if asked.conf else f"{found}, for the local scale")


def on_our_cpus(cluster: Cluster) -> bool:
    """Whether a run's trainings compute in the memory of this machine."""
    import torch

    return cluster.address is None and (cluster.device == "cpu" or not torch.cuda.is_available())


def memory(asked: Asked) -> Finding:
    free = psutil.virtual_memory().available / GIB
    if asked.conf is None:
        return finding("memory", free >= 8, f"{free:.1f} GiB available, the local scale needs up to 8", "warning")
    needed, told = float(RUN_GIB), f"{free:.1f} GiB available, a run takes about {RUN_GIB} beside its trainings"
    if asked.config and on_our_cpus(asked.config.cluster):
        needs = {step: need for step in asked.todo if (need := training_memory.needed(step, asked.config))}
        if needs:
            ranks = {name: asked.config.ranks_of(name) for name in needs}
            step = max(needs, key=lambda name: ranks[name] * needs[name].total)
            needed += ranks[step] * needs[step].total / GIB
            each, key = needs[step].total / GIB, asked.config.ranks_key(step)
            told += f"; {step}, the largest, about {each:.1f} for each of {key}={ranks[step]}"
    return finding("memory", free >= needed, told, "warning")


def shared_memory(_: Asked) -> Finding:
    path = "/dev/shm"
    if not os.path.isdir(path):
        return Finding(
            "shared memory", "warning", f"no {path}: Ray's object store falls back to {tempfile.gettempdir()}"
        )
    free = shutil.disk_usage(path).free / GIB
    return finding(
        "shared memory", free >= 1, f"{free:.1f} GiB free in {path}, Ray's object store wants at least 1", "warning"
    )


def disk(asked: Asked) -> Finding:
    if storage.is_remote(asked.root):
        return Finding("disk", "ok", "the root is remote")
    folder = asked.root
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free / GIB
    found = f"{free:.1f} GiB free in {folder}"
    if asked.conf is None:
        return finding("disk", free >= 5, f"{found}, the local scale needs about 1", "warning")
    if asked.stored is None:
        return Finding("disk", "ok", f"{found}; what the steps will store is not known yet")
    needed = asked.stored / GIB
    told = f"the steps to do store at most {max(needed, 0.1):.1f}, beside weights and checkpoints"
    return finding("disk", free >= needed + 1, f"{found}, {told}", "warning")


def takes_files(asked: Asked) -> Finding:
    root = asked.root
    try:
        with no_traces(root):
            started = time.monotonic()
            check_writable(root, "root")
            took = time.monotonic() - started
    except UsageError as error:
        return Finding("storage", "failed", str(error))
    except OSError as error:
        return Finding("storage", "failed", f"root={root}: cannot be reached ({error})")
    return Finding("storage", "ok", f"{root} takes a file in {took * 1000:.0f} ms")


def clock(_: Asked) -> Finding:
    with tempfile.NamedTemporaryFile() as file:
        skew = abs(os.stat(file.name).st_mtime - time.time())
    return finding("clock", skew < 5, f"{skew:.1f} s between the clock and the file system's", "warning")


def ray_place(asked: Asked) -> Finding | None:
    """Whether a Ray of our own finds a folder whose name is short enough for its sockets; one that is joined has it."""
    if asked.cluster and asked.cluster.address:
        return None
    try:
        return Finding("ray folder", "ok", f"a Ray of our own keeps its sockets and logs in {ray_folder()}")
    except UsageError as error:
        return Finding("ray folder", "failed", str(error))


def token(_: Asked) -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    return Finding(
        "ray token", "ok", f"RAY_AUTH_MODE is {mode}; a local Ray gets a secret of its own, a cluster needs its token"
    )
