"""`doctor`: does this machine have what a run needs? Each check says what it found and what to do.

With a conf the checks are about that: whether it could run here, or as much as can be told without its cluster.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from typing import Any, TypeVar

import psutil
from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from datasets.config import DataError
from datasets.files import storage
from pipeline.errors import UsageError
from pipeline.plan import cost, obstacles
from pipeline.plan.dag import Planned
from pipeline.plan.wanted import planned_steps
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.settings.sections import Cluster, Tracking
from pipeline.settings.selection import Selection
from pipeline.settings.words import Words
from pipeline.store.writable import check_writable
from pipeline.terminal import print_table
from pipeline.tracking.mlflow_store import locate_store
from stages.anatomy.memory_estimate import GIB
from stages.settings.base import Settings

S = TypeVar("S", bound=Settings)
PATIENCE_S = 3.0  # for an answer of a server
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


def handle(words: Words) -> None:
    conf = words.required_conf() if words.conf or words.overrides else None
    examine(storage.absolute(words.root), words.json, conf, words.overrides)


@dataclass(frozen=True)
class Finding:
    """One check: `state` is ok, warning or failed."""

    check: str
    state: str
    found: str


@dataclass(frozen=True)
class Wanted:
    """A conf's plan, with the bytes that its steps to do store (None: unknown as yet); of a wrong conf, the sections
    that are right."""

    config: Config | None
    cluster: Cluster | None
    tracking: Tracking | None
    planned: list[Planned] = field(default_factory=list)
    stored: int | None = None

    @property
    def todo(self) -> list[str]:
        """Names of the steps to do."""
        return [item.step.name for item in self.planned if item.state != "done"]


def examine(root: str, as_json: bool, conf: str | None, overrides: list[str]) -> None:
    """Run every check, and those of a conf where there is one; `UsageError` when one failed."""
    wanted, findings = None, []
    if conf is not None:
        wanted, finding = _composed(conf, overrides, root)
        findings.append(finding)
    findings += [check(root) for check in (_python, _versions, _datasets)]
    findings += [_device(wanted), _memory(wanted), _shm(root), _disk(root, wanted)]
    findings += [check(root) for check in (_storage, _clock, _token)]
    if wanted and wanted.cluster:
        findings.append(_cluster(wanted.cluster))
    if wanted and wanted.tracking:
        findings.append(_tracking(root, wanted.tracking))
    if wanted and wanted.config:
        findings += [check(wanted.config, wanted) for check in (_workers, _device_memory, _inputs)]
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        lines = Table("check", "state", "found", box=None, pad_edge=False)
        for finding in findings:
            lines.add_row(finding.check, finding.state, escape(finding.found))
        print_table(lines)
    failed = [finding.check for finding in findings if finding.state == "failed"]
    if failed:
        raise UsageError(f"doctor: {', '.join(failed)} failed, see above")


def _composed(conf: str, overrides: list[str], root: str) -> tuple[Wanted, Finding]:
    """What a conf wants, and whether it can be planned."""
    tree: dict[str, Any] = {}
    try:
        tree = compose.compose(conf, overrides)
        config = compose.check(tree)
        locate_store(root, config.tracking.uri)  # before a remote root is asked
        planned = planned_steps(config, root, Selection())
        costs = cost.estimates(planned, config)
    except (UsageError, DataError, OSError) as error:  # the last: a remote root does not answer
        right = Wanted(None, _section(Cluster, tree.get("cluster")), _section(Tracking, tree.get("tracking")))
        told = f"cannot be planned: {error}" if isinstance(error, OSError) else str(error)
        return right, Finding("config", "failed", told)
    known = cost.most_rows(planned, config)[0] is not None
    stored = sum(one["bytes"] or 0 for item, one in zip(planned, costs, strict=True) if item.state != "done")
    wanted = Wanted(config, config.cluster, config.tracking, planned, stored if known else None)
    return wanted, Finding("config", "ok", f"conf={conf}: {len(wanted.todo)} of {len(planned)} steps are to be done")


def _section(kind: type[S], tree: object) -> S | None:
    """A section of the config, None where it is wrong too."""
    try:
        return kind.model_validate(tree)
    except ValidationError:
        return None


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


def _device(wanted: Wanted | None) -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return _finding("device", torch.cuda.is_bf16_supported(), f"{len(names)} x {names[0]}, bf16 needed")
    found = f"no CUDA device: {os.cpu_count()} CPU cores"
    cluster = wanted.cluster if wanted else None
    if cluster and cluster.device == "cuda":
        state, told = ("warning", "other nodes must have some") if cluster.address else ("failed", "use auto or cpu")
        return Finding("device", state, f"{found}, but cluster.device=cuda; {told}")
    return Finding("device", "ok", found if wanted else f"{found}, for the local scale")


def _on_our_cpus(cluster: Cluster) -> bool:
    """Whether a run's trainings compute in the memory of this machine."""
    import torch

    return cluster.address is None and (cluster.device == "cpu" or not torch.cuda.is_available())


def _memory(wanted: Wanted | None) -> Finding:
    free = psutil.virtual_memory().available / GIB
    if wanted is None:
        return _finding("memory", free >= 8, f"{free:.1f} GiB available, the local scale needs up to 8", "warning")
    needed, told = float(RUN_GIB), f"{free:.1f} GiB available, a run takes about {RUN_GIB} beside its trainings"
    if wanted.config and _on_our_cpus(wanted.config.cluster):
        needs = {step: need for step in wanted.todo if (need := cost.memory(step, wanted.config))}
        if needs:
            step, workers = max(needs, key=lambda name: needs[name].total), wanted.config.workers
            needed += workers * needs[step].total / GIB
            told += f"; {step}, the largest, about {needs[step].total / GIB:.1f} for each of workers={workers}"
    return _finding("memory", free >= needed, told, "warning")


def _shm(_: str) -> Finding:
    path = "/dev/shm"
    if not os.path.isdir(path):
        return Finding(
            "shared memory", "warning", f"no {path}: Ray's object store falls back to {tempfile.gettempdir()}"
        )
    free = shutil.disk_usage(path).free / GIB
    return _finding(
        "shared memory", free >= 1, f"{free:.1f} GiB free in {path}, Ray's object store wants at least 1", "warning"
    )


def _disk(root: str, wanted: Wanted | None) -> Finding:
    if storage.is_remote(root):
        return Finding("disk", "ok", "the root is remote")
    folder = root
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free / GIB
    found = f"{free:.1f} GiB free in {folder}"
    if wanted is None:
        return _finding("disk", free >= 5, f"{found}, the local scale needs about 1", "warning")
    if wanted.stored is None:
        return Finding("disk", "ok", f"{found}; what the steps will store is not known yet")
    needed = wanted.stored / GIB
    told = f"the steps to do store at most {max(needed, 0.1):.1f}, beside weights and checkpoints"
    return _finding("disk", free >= needed + 1, f"{found}, {told}", "warning")


def _storage(root: str) -> Finding:
    try:
        existed = storage.exists(root)
        started = time.monotonic()
        check_writable(root, "root")
    except UsageError as error:
        return Finding("storage", "failed", str(error))
    except OSError as error:
        return Finding("storage", "failed", f"root={root}: cannot be reached ({error})")
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


def _cluster(cluster: Cluster) -> Finding:
    """Whether something listens where a run would look for Ray; a run then joins it, with the token."""
    check = "cluster.address"
    if cluster.address is None:
        return Finding(check, "ok", "null: a run starts a Ray of its own here, for as long as it lasts")
    named = os.environ.get("RAY_ADDRESS") if cluster.address == "auto" else cluster.address
    addresses = [named] if named else _rays_here()
    if not addresses:
        remedy = "start one with `ray start --head`, or run on a node of the cluster"
        return Finding(check, "failed", f"{cluster.address}: no Ray runs on this machine; {remedy}")
    try:
        for address in addresses:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), PATIENCE_S).close()
    except ValueError:
        return Finding(check, "failed", f"{address} is no address; give auto, HOST:PORT or ray://HOST:PORT")
    except OSError as error:
        return Finding(check, "failed", f"{cluster.address}: no Ray answers at {address} ({error})")
    return Finding(check, "ok", f"{cluster.address}: there is one at {' and '.join(addresses)}")


def _rays_here() -> list[str]:
    """Addresses of the clusters that this machine is a node of: as Ray itself finds `auto`, by its processes."""
    flag = "--gcs-address="
    found: set[str] = set()
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]
        if os.path.basename(words[0]) == "raylet":
            found.update(word.removeprefix(flag) for word in words if word.startswith(flag))
    return sorted(found)


def _tracking(root: str, tracking: Tracking) -> Finding:
    """Whether an MLflow server answers; a run does not need it to."""
    try:
        store = locate_store(root, tracking.uri)
    except UsageError as error:
        return Finding("tracking", "failed", str(error))
    if store.artifacts is not None:
        return Finding("tracking", "ok", f"{store.uri}, made where it is missing")
    try:
        with urllib.request.urlopen(f"{store.uri}/health", timeout=PATIENCE_S):
            pass
    except urllib.error.HTTPError as error:
        return _finding("tracking", error.code < 500, f"{store.uri} answers: {error}", "warning")
    except (OSError, HTTPException) as error:
        what_then = f"a run goes on without, keeps its records in {store.unsent}, and a later one sends them"
        reason = getattr(error, "reason", error)
        return Finding("tracking", "warning", f"{store.uri}: no server answers ({reason}); {what_then}")
    return Finding("tracking", "ok", f"{store.uri} answers")


def _workers(config: Config, wanted: Wanted) -> Finding:
    """Rows of each rank; a config whose batches do not divide is refused before this."""
    trained = {name for step in wanted.todo for name in config.trainings_of(step)}
    rows = []
    for key, training in config.trainings().items():
        if key.partition(".")[0] in trained:
            each = ", ".join(str(phase.batch_size // config.workers) for phase in training.phases)
            rows.append(f"{key} {each}")
    told = f"rows of each a batch: {'; '.join(rows)}" if rows else "nothing is left to train"
    return Finding("workers", "ok", f"workers={config.workers}, {told}")


def _device_memory(config: Config, wanted: Wanted) -> Finding:
    needs = {step: cost.memory(step, config) for step in wanted.todo}
    text = ", ".join(f"{name} {need.total / GIB:.1f}" for name, need in needs.items() if need)
    try:
        cost.check_memory(wanted.planned, config)
    except UsageError as error:
        return Finding("device memory", "failed", str(error))
    if not text:
        return Finding("device memory", "ok", "nothing is left to train")
    if _on_our_cpus(config.cluster):
        return Finding("device memory", "ok", "none is needed: trainings run on this machine's CPUs")
    known = config.cluster.gpu_memory_gib is not None
    ask = "" if known else "; cluster.gpu_memory_gib=GIB holds them against what a GPU has"
    return _finding("device memory", known or config.cluster.device == "cpu", f"GiB a worker: {text}{ask}", "warning")


def _inputs(config: Config, wanted: Wanted) -> Finding:
    try:
        found = obstacles.every(config, wanted.planned, ask_stores=True)
    except DataError as error:
        found = [str(error)]
    except OSError as error:
        found = [f"cannot be reached: {error}"]
    told = "metadata and weights are where the config says, batches fit the data, as far as can be told"
    return _finding("inputs", not found, "; ".join(found) or told)
