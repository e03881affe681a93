"""`doctor`: does this machine have what a run needs? Each check says what it found and what to do.

With a config it also says whether that could run as it is: what can be told without its cluster.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass

import psutil
from rich.table import Table

from datasets import storage
from pipeline import cost
from pipeline.config import Config
from pipeline.dag import Planned, Selection
from pipeline.errors import UsageError
from pipeline.run import check_writable, missing_rows, missing_weights, planned_steps
from pipeline.screen import print_table

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


@dataclass(frozen=True)
class Finding:
    """One check: `state` is ok, warning or failed."""

    check: str
    state: str
    found: str


def examine(root: str, as_json: bool, config: Config | None) -> None:
    """Run every check, and those of a config where there is one; `UsageError` when one failed."""
    findings = [
        check(root)
        for check in (_python, _versions, _datasets, _device, _memory, _shm, _disk, _storage, _clock, _token)
    ]
    if config:
        planned = [item for item in planned_steps(config, root, Selection()) if item.state != "done"]
        findings += [_workers(config), _device_memory(config, planned), _inputs(config, planned)]
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        lines = Table("check", "state", "found", box=None, pad_edge=False)
        for finding in findings:
            lines.add_row(finding.check, finding.state, finding.found)
        print_table(lines)
    failed = [finding.check for finding in findings if finding.state == "failed"]
    if failed:
        raise UsageError(f"doctor: {', '.join(failed)} failed, see above")


def _finding(check: str, good: bool, found: str, else_state: str = "failed") -> Finding:
    return Finding(check, "ok" if good else else_state, found)


def _python(_: str) -> Finding:
    return _finding(
        "python", (3, 11) <= sys.version_info[:2] <= (3, 12), f"{platform.python_version()}, 3.11 or 3.12 needed"
    )


def _versions(_: str) -> Finding:
    found, missing = [], []
    for name in NEEDED:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    text = ", ".join(found) + (f"; missing: {', '.join(missing)}, run `make setup`" if missing else "")
    return _finding("packages", not missing, text)


def _datasets(_: str) -> Finding:
    import datasets

    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    ours = os.path.abspath(str(datasets.__file__)).startswith(here)
    return _finding("datasets package", ours, f"{datasets.__file__}; run from the checkout's root")


def _device(_: str) -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("device", "ok", f"no CUDA device: {os.cpu_count()} CPU cores, for the local scale")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return _finding("device", torch.cuda.is_bf16_supported(), f"{len(names)} x {names[0]}, bf16 needed")


def _memory(_: str) -> Finding:
    free = psutil.virtual_memory().available / 2**30
    return _finding("memory", free >= 8, f"{free:.1f} GiB available, the local scale needs up to 8", "warning")


def _shm(_: str) -> Finding:
    path = "/dev/shm"
    if not os.path.isdir(path):
        return Finding(
            "shared memory", "warning", f"no {path}: Ray's object store falls back to {tempfile.gettempdir()}"
        )
    free = shutil.disk_usage(path).free / 2**30
    return _finding(
        "shared memory", free >= 1, f"{free:.1f} GiB free in {path}, Ray's object store wants at least 1", "warning"
    )


def _disk(root: str) -> Finding:
    if storage.is_remote(root):
        return Finding("disk", "ok", "the root is remote")
    folder = root
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free / 2**30
    return _finding("disk", free >= 5, f"{free:.1f} GiB free in {folder}, the local scale needs about 1", "warning")


def _storage(root: str) -> Finding:
    existed = storage.exists(root)
    started = time.monotonic()
    try:
        check_writable(root, "root")
    except UsageError as error:
        return Finding("storage", "failed", str(error))
    if not existed:
        storage.remove(root)
    return Finding("storage", "ok", f"{root} takes a file in {(time.monotonic() - started) * 1000:.0f} ms")


def _clock(_: str) -> Finding:
    with tempfile.NamedTemporaryFile() as file:
        skew = abs(os.stat(file.name).st_mtime - time.time())
    return _finding("clock", skew < 5, f"{skew:.1f} s between the clock and the file system's", "warning")


def _token(_: str) -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    return Finding(
        "ray token", "ok", f"RAY_AUTH_MODE is {mode}; a local Ray gets a secret of its own, a cluster needs its token"
    )


def _workers(config: Config) -> Finding:
    """Rows of each rank; a config whose batches do not divide is refused before this."""
    rows = []
    for key, training in config.trainings().items():
        each = ", ".join(str(phase.batch_size // config.workers) for phase in training.phases)
        rows.append(f"{key} {each}")
    return Finding("workers", "ok", f"workers={config.workers}, rows of each a batch: {'; '.join(rows)}")


def _device_memory(config: Config, planned: list[Planned]) -> Finding:
    needs = {item.step.name: cost.memory(item.step.name, config) for item in planned}
    text = ", ".join(f"{name} {need.total / 2**30:.1f}" for name, need in needs.items() if need)
    try:
        cost.check_memory(planned, config)
    except UsageError as error:
        return Finding("device memory", "failed", str(error))
    if not text:
        return Finding("device memory", "ok", "nothing is left to train")
    known = config.cluster.gpu_memory_gib is not None
    ask = "" if known else "; cluster.gpu_memory_gib=GIB holds them against what a GPU has"
    return _finding("device memory", known or config.cluster.device == "cpu", f"GiB a worker: {text}{ask}", "warning")


def _inputs(config: Config, planned: list[Planned]) -> Finding:
    try:
        missing = [
            text for text in (missing_rows(config, planned, ask_stores=True), missing_weights(config, planned)) if text
        ]
    except OSError as error:
        missing = [f"cannot be reached: {error}"]
    return _finding("inputs", not missing, "; ".join(missing) or "metadata and weights are where the config says")
