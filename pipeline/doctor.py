"""`doctor`: does this machine have what a run needs? Each check says what it found and what to do."""

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
from rich.console import Console
from rich.table import Table

from datasets import storage
from pipeline.errors import UsageError
from pipeline.run import check_writable

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


def examine(root: str, as_json: bool) -> None:
    """Run every check; `UsageError` when one failed."""
    findings = [
        check(root)
        for check in (_python, _versions, _datasets, _device, _memory, _shm, _disk, _storage, _clock, _token)
    ]
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        lines = Table("check", "state", "found", box=None, pad_edge=False)
        for finding in findings:
            lines.add_row(finding.check, finding.state, finding.found)
        Console(file=sys.stdout, highlight=False, soft_wrap=True).print(lines)
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
