"""A run: build what the targets need and is missing, in order, each step under a lease, a ledger and a tracker."""

import contextlib
import importlib
import json
import logging
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from datasets.files import storage
from pipeline import __version__
from pipeline.environment import private_ray, quiet_environment
from pipeline.errors import InfrastructureError, Interrupted, Preempted, RetriesExhausted, UsageError
from pipeline.plan import cost, dag, obstacles
from pipeline.plan.dag import Planned, differences
from pipeline.plan.table import table
from pipeline.plan.wanted import names_of_inputs, prints_of, reading
from pipeline.run.last_screen import Built, Summary
from pipeline.run.memory import PeakMemory
from pipeline.run.progress import StepProgress
from pipeline.settings.config import Config
from pipeline.steps.build import Build, Facts
from pipeline.store import earlier, lease, ledger
from pipeline.store.artifacts import Artifact, Fingerprint, Store
from pipeline.store.process import ProcessId
from pipeline.store.removal_list import check_carried_out, names_of, requests
from pipeline.store.writable import check_writable
from pipeline.terminal import console

SAME_SIGNAL_S = 1.0  # who signals a process and then its group, as timeout(1) does, asks once
LOG_EVERY_S = 30.0  # between lines of progress in a step's log

log = logging.getLogger(__name__)


def run(config: Config, conf: str, root: str, planned: list[Planned], command: str) -> Summary:
    """Build every planned step that is not done; returns what the last screen shows."""
    cost.check_memory(planned, config)
    obstacles.check_weights(config, planned)
    checks = (obstacles.missing_rows, obstacles.missing_scores, obstacles.too_large_batches)
    if found := next(filter(None, (check(config, planned) for check in checks)), None):
        raise UsageError(found)
    check_carried_out(root)
    check_writable(root, "root")
    earlier.keep(root, names_of_inputs(config, root, [item.step for item in planned]))
    quiet_environment()
    if config.cluster.address is None:
        private_ray()
    started = time.monotonic()
    with (
        contextlib.redirect_stdout(sys.stderr),  # Ray tells there of dead workers, but stdout belongs to --json
        _signals() as stopped,
        PeakMemory() as memory,
        _Session(config, conf, root, planned, command, memory) as session,
    ):
        for item in planned:
            if item.state == "done":
                continue
            _raise_if(stopped)
            session.build(item, stopped)
        summary = session.summary
    summary.seconds = time.monotonic() - started
    summary.peak_bytes = memory.peak_bytes
    summary.pictures = [path for path in map(_picture, session.artifacts.values()) if path]
    if "scores" in session.artifacts:
        summary.metrics = session.artifacts["scores"].manifest["metrics"]
    spent = ledger.totals(root).steps
    ours = [spent[key] for key in ((i.step.name, i.fingerprint.digest) for i in planned) if key in spent]
    summary.paper = [str(found) for found in map(ledger.compare_with_paper, ours) if found]
    return summary


def _picture(artifact: Artifact) -> str | None:
    """The path of an artifact's contact sheet, if it has one."""
    sheet = next((name for name in ("grid.png", "panel.png") if name in artifact.files), None)
    return storage.join(artifact.path, sheet) if sheet else None


@dataclass
class _Stop:
    """The signal that asked for the end, if one did."""

    number: int | None = None
    since: float = 0.0

    def __call__(self) -> int | None:
        return self.number


def _raise_if(stopped: _Stop) -> None:
    if stopped.number is not None:
        raise Interrupted(stopped.number)


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """The first SIGINT or SIGTERM asks for a clean end, a later one ends at once."""
    stop = _Stop()

    def handle(number: int, _: FrameType | None) -> None:
        if stop.number is not None:
            if time.monotonic() - stop.since > SAME_SIGNAL_S:
                raise KeyboardInterrupt
            return
        stop.number, stop.since = number, time.monotonic()
        console.print("[yellow]saving and stopping; once more to abort at once[/]")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class _Session:
    """One invocation that does work: Ray, MLflow, the ledger, logs, and the record for `status`."""

    config: Config
    conf: str
    root: str
    planned: list[Planned]
    command: str
    memory: PeakMemory
    summary: Summary = field(default_factory=Summary)

    def __enter__(self) -> "_Session":
        from pipeline.cluster.ray_cluster import Cluster
        from pipeline.tracking.mlflow_runs import Tracking
        from pipeline.tracking.mlflow_store import locate_store

        self.id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:4]
        self.store = Store(self.root)
        self.summary.root = self.root
        self.artifacts: dict[str, Artifact] = {i.step.output: i.artifact for i in self.planned if i.artifact}
        for artifact in self.artifacts.values():
            self.store.tidy(artifact)
        console.print(f"run {self.id} of conf={self.conf} in {self.root}", markup=False)
        self.exits = contextlib.ExitStack()
        with contextlib.ExitStack() as exits:
            self.tracking = exits.enter_context(
                Tracking(
                    locate_store(self.root, self.config.tracking.uri),
                    self.config.tracking.experiment,
                    conf=self.conf,
                    targets=self.config.targets,
                    invocation=self.id,
                    fingerprints={item.step.output: item.fingerprint.digest for item in self.planned},
                    config=self.config.model_dump(mode="json"),
                    say=partial(console.print, style="yellow", markup=False),
                )
            )
            self.ledger = ledger.Writer(self.root, self.id)
            self.cluster = Cluster(self.config.cluster, self.config.workers)
            exits.callback(self.cluster.close)
            obstacles.check_precision(self.config, self.planned, self.cluster.kind)
            self.summary.devices = self.cluster.kind
            self.record: dict[str, Any] = {
                "id": self.id,
                "conf": self.conf,
                "command": self.command,
                "process": vars(ProcessId.own()),
                "version": __version__,
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "outcome": "running",
                "fingerprints": {name: print_.digest for name, print_ in self._wanted().items()},
                "paths": sorted(map(storage.absolute, self.config.existing().values())),
                "steps": {},
            }
            self._write_record()
            self.exits = exits.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.record["outcome"] = "done" if error is None else f"{type(error).__name__}: {error}"
        self._write_record()
        self.exits.__exit__(kind, error, trace)
        self.summary.warnings += self.tracking.warnings

    def _wanted(self) -> dict[str, Fingerprint]:
        """All that this config asks for, also what the flags leave out."""
        return prints_of(self.config, self.root, dag.order(table(self.config), self.config.targets))

    def _write_record(self) -> None:
        text = json.dumps(self.record, indent=1, ensure_ascii=False)
        storage.publish(text.encode(), storage.join(self.root, "invocations", f"{self.id}.json"))

    def build(self, item: Planned, stopped: _Stop) -> None:
        """Build one step: lease, attempts, manifest, tracking, ledger."""
        name, output, digest = item.step.name, item.step.output, item.fingerprint.digest
        path = self.store.path(output, digest)
        position = f"[{len(self.summary.steps) + 1}/{sum(i.state != 'done' for i in self.planned)}]"
        log_path = storage.join(self.root, "logs", self.id, f"{output}.log")
        self.record["steps"][output] = {"state": "running", "log": log_path, "artifact": path}
        self._write_record()
        label = name if name != "encode_text" else output
        progress = StepProgress(label, position.replace("[", "\\["))
        outcome = "failed"
        begun = time.monotonic()
        try:
            with lease.hold(path, console.print), _logging_to(log_path):
                artifact = self.store.find(output, digest) if item.reason != "forced" else None
                if artifact:
                    log.info("%s: somebody else has built %s meanwhile", name, path)
                else:
                    log.info("%s begins (%s): %s, fingerprint %s", name, item.reason, path, digest)
                    artifact = self._build_under_lease(item, path, progress, stopped)
                    log.info(
                        "%s is done: %s rows, %.1f s", name, f"{artifact.manifest['rows']:,}", time.monotonic() - begun
                    )
            outcome = "done"
        except Interrupted:
            outcome = "interrupted"
            raise
        finally:
            progress.close(outcome)
            self.record["steps"][output]["state"] = outcome
        self.artifacts[output] = artifact
        self.summary.steps.append(self._line(artifact, begun))

    def _line(self, artifact: Artifact, begun: float) -> Built:
        manifest = artifact.manifest
        return Built(
            name=manifest["step"],
            output=artifact.name,
            state="built",
            path=artifact.path,
            seconds=time.monotonic() - begun,
            training_seconds=manifest["metrics"].get("training_seconds", 0.0),
            device_hours=manifest["device_seconds"] / 3600,
            attempts=manifest["attempts"],
            interruptions=int(manifest["metrics"].get("interruptions", 0)),
            preemptions=int(manifest["metrics"].get("preemptions", 0)),
            steps_again=int(manifest["metrics"].get("steps_again", 0)),
        )

    def _build_under_lease(self, item: Planned, path: str, progress: StepProgress, stopped: _Stop) -> Artifact:
        step, fingerprint = item.step, item.fingerprint
        self._check_unchanged(item)
        if item.reason == "forced":
            self.store.discard(step.output, fingerprint.digest)
        begun = time.monotonic()
        self.memory.lap()
        with self.tracking.step(step.name, step.output, fingerprint.digest) as tracked:
            build = Build(
                config=self.config.with_absolute_paths(),
                step=step,
                path=path,
                inputs=self._inputs(item),
                cluster=self.cluster,
                forgotten=frozenset(names_of(requests(self.root))),
                lease=lambda devices, kind: self.ledger.lease(step.name, fingerprint.digest, devices, kind),
                report=_Reporter(progress, tracked, self.summary.warnings),
                stop_signal=stopped,
            )
            facts = self._attempt(step.call, build)
            spent = ledger.totals(self.root).steps.get((step.name, fingerprint.digest))
            artifact = self.store.commit(
                step.output,
                fingerprint,
                {
                    "files": facts.files,
                    "rows": facts.rows,
                    "metrics": facts.metrics,
                    "notes": facts.notes,
                    "timed": facts.timed,
                    "call": facts.call,
                    "workers": facts.workers,
                    "driver": {**vars(ProcessId.own()), "version": __version__},
                    "seconds": round(time.monotonic() - begun, 3),
                    "device_seconds": round(spent.device_seconds, 3) if spent else 0.0,
                    "devices": spent.kind if spent else self.cluster.kind,
                    "attempts": spent.attempts if spent else 1,
                    "failed_attempts": spent.failed_attempts if spent else 0,
                    "peak_bytes": self.memory.lap_bytes,
                    "created": datetime.now(UTC).isoformat(timespec="seconds"),
                },
            )
            tracked.finish(artifact)
        return artifact

    def _check_unchanged(self, item: Planned) -> None:
        """Refuse to build from files that have changed since the plan: the fingerprint would tell of the old ones."""
        read = reading(self.config, self.root, [item.step])
        now = replace(item.fingerprint, settings={key: read(key) for key in item.step.reads})
        if now != item.fingerprint:
            changes = "; ".join(differences(item.fingerprint.as_dict(), now))
            raise UsageError(f"{changes}, since this run began; start it again")

    def _inputs(self, item: Planned) -> dict[str, Artifact]:
        """The finished artifacts that a step reads, also those of steps that the flags leave out."""
        found = {name: self.store.find(name, digest) for name, digest in item.fingerprint.parents.items()}
        missing = [name for name, artifact in found.items() if artifact is None]
        assert not missing, f"{item.step.name} was planned without {missing}"
        return {name: artifact for name, artifact in found.items() if artifact is not None}

    def _attempt(self, call: str, build: Build) -> Facts:
        """Call the step's function; failures of the infrastructure are tried again, with a growing pause.

        Nodes that were taken away with notice do not count: the step goes on at once on those that are left.
        """
        module, function = call.split(":")
        failures = 0
        while True:
            try:
                facts: Facts = getattr(importlib.import_module(f"pipeline.steps.{module}"), function)(build)
                return facts
            except Preempted as error:
                log.warning("%s was preempted: %s", call, error)
                build.interruptions.preemptions += 1
                build.interruptions.write(build.building)
                console.print(f"{function}: {error}; going on elsewhere", style="yellow", markup=False)
            except (InfrastructureError, OSError) as error:
                failures += 1
                log.exception("attempt %d of %s failed", failures, call)
                if failures > self.config.cluster.retries:
                    raise RetriesExhausted(
                        f"{function} failed {failures} times; the last error was: {error}"
                    ) from error
                pause = 2.0 ** (failures - 1)
                console.print(f"{function}: {error}; trying again in {pause:.0f} s", style="yellow", markup=False)
                time.sleep(pause)
            build.raise_if_stopped()


@dataclass
class _Reporter:
    """Progress goes to the screen, measurements and pictures to MLflow, and all of it is told to the step's log."""

    screen: StepProgress
    tracked: Any
    warnings: list[str]
    logged: float = field(default_factory=time.monotonic)  # when progress was logged last

    def progress(self, done: int, total: int, unit: str) -> None:
        self.screen.update(done, total, unit)
        if done >= total or time.monotonic() - self.logged > LOG_EVERY_S:
            self.logged = time.monotonic()
            log.info("%s of %s %s", f"{done:,}", f"{total:,}", unit)

    def advance(self, count: int, total: int, unit: str) -> None:
        self.progress(self.screen.done + count, total, unit)

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.tracked.metrics(values, step)
        log.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def image(self, name: str, png: bytes, step: int) -> None:
        self.tracked.image(name, png, step)
        log.info("step %d: picture %s", step, name)

    def warning(self, text: str) -> None:
        log.warning(text)
        self.warnings.append(text)


@contextlib.contextmanager
def _logging_to(path: str) -> Iterator[None]:
    """Send the driver's log records to a step's file: at once on a local root, at the end on a remote one."""
    local = Path(path) if not storage.is_remote(path) else Path(f"/tmp/{uuid.uuid4().hex}.log")
    local.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(local)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("pipeline")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        logger.info("stopped on request: %s", error or "at once, without a save")
        raise
    except Exception:
        logger.exception("the step ended with an error")
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
        if storage.is_remote(path):
            storage.publish(local, path)
            local.unlink()
