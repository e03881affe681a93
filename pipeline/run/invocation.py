"""A run: build what the targets need and is missing, in order, each step under a claim, a ledger and a tracker."""

import contextlib
import logging
import os
import sys
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from datasets.files import notices, retrying, storage
from datasets.files.notices import Notice, Retry
from datasets.files.storage import MEND, CorruptFile
from datasets.planning import preview
from pipeline.cluster.metrics import Projection, exported
from pipeline.environment import private_ray, quiet_environment
from pipeline.errors import STOPPED, BudgetExceeded, UsageError
from pipeline.hours.spent import by_step
from pipeline.hours.table import beside_paper
from pipeline.plan import budget, dag, obstacles, rivals, training_memory, weights
from pipeline.plan.dag import Planned, differences
from pipeline.plan.table import table
from pipeline.plan.wanted import names_of_inputs, prints_of, reading
from pipeline.run import attempts, neighbours
from pipeline.run.account import Account, Books
from pipeline.run.last_screen import Built, Summary
from pipeline.run.memory import PeakMemory
from pipeline.run.progress import StepProgress
from pipeline.run.record import Record
from pipeline.run.step_log import StepReporter, logging_to
from pipeline.run.stopping import Stop, signals
from pipeline.run.writable import check_writable
from pipeline.settings.config import Config
from pipeline.steps.build import Build, Facts
from pipeline.store import claims, deleting, earlier
from pipeline.store.artifacts import Artifact, Fingerprint, Look, Store, lacking
from pipeline.store.claims import Claim
from pipeline.store.ledger import About
from pipeline.store.process import ProcessId
from pipeline.store.provenance import provenance
from pipeline.store.redact import redact, redact_path
from pipeline.store.removal_list import check_carried_out, refused
from pipeline.terminal import console
from settings import FILES

log = logging.getLogger(__name__)


def run(config: Config, conf: str, look: Look, planned: list[Planned], command: str) -> Summary:
    """Build every planned step that is not done; returns what the last screen shows. `look` is what the plan saw."""
    root = look.root
    training_memory.check(planned, config)
    counts = obstacles.ahead(config, planned)
    if found := obstacles.every(config, planned, counts):
        raise UsageError(found[0])
    weights.check(config, planned)
    for remark in rivals.remarks(config, planned):
        console.print(remark, style="yellow", markup=False)
    if counts and (beyond := preview.beyond_budget(counts)):
        raise BudgetExceeded(beyond)
    check_carried_out(root)
    check_writable(root, "root")
    earlier.keep(root, names_of_inputs(config, look, [item.step for item in planned]))
    quiet_environment()
    if config.cluster.address is None:
        private_ray()
    started = time.monotonic()
    summary = Summary(predicted_hours=budget.predicted(planned, config, look.finished(), counts))
    with (
        contextlib.redirect_stdout(sys.stderr),  # Ray tells there of dead workers, but stdout belongs to --json
        retrying.patient(config.cluster.patience_s),
        signals() as stopped,
        notices.heard_by(partial(_hear, summary)),
        PeakMemory() as memory,
        _Session(config, conf, look, planned, command, memory, summary, stopped) as session,
    ):
        stopped.watch = session.books.over_budget
        todo = [item for item in planned if item.state != "done"]
        for place, item in enumerate(todo):
            stopped.raise_if_asked()
            if session.came_out_the_same(item):
                continue
            session.check_batches(todo[place:])
            session.build(item, f"[{place + 1}/{len(todo)}]", stopped)
        summary.take(session.artifacts)
        summary.paper = beside_paper(root, session.artifacts.values())
    summary.seconds = time.monotonic() - started
    summary.peak_bytes = memory.peak_bytes
    return summary


def _hear(summary: Summary, notice: Notice) -> None:
    """Log what the storage had to get over, and count it for the last screen."""
    log.warning("%s", notice)
    if isinstance(notice, Retry):
        summary.storage_tries += 1
        summary.storage_reason = notice.reason


@contextlib.contextmanager
def _less_than(error: BaseException | None) -> Iterator[None]:
    """What fails at the end of a run is told, and raised where nothing else has ended it."""
    try:
        yield
    except Exception as failure:
        if error is None:
            raise
        console.print(f"at the end of the run: {failure}", style="yellow", markup=False)


@dataclass
class _Session:
    """One invocation that does work: Ray, MLflow, the ledger, logs, and the record for `status`."""

    config: Config
    conf: str
    look: Look
    planned: list[Planned]
    command: str
    memory: PeakMemory
    summary: Summary
    stopped: Stop = field(default_factory=Stop)

    @property
    def root(self) -> str:
        """Where it all lies."""
        return self.look.root

    def __enter__(self) -> "_Session":
        with self.stopped.at_once():  # these take seconds
            from pipeline.cluster.ray_cluster import Cluster
            from pipeline.tracking.mlflow_runs import Tracking
            from pipeline.tracking.mlflow_store import locate_store

        self.id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:4]
        self.store = Store(self.root)
        self.summary.root = self.root
        self.artifacts: dict[str, Artifact] = {i.step.output: i.artifact for i in self.planned if i.artifact}
        console.print(f"run {self.id} of conf={self.conf} in {self.root}", markup=False)
        warn = partial(console.print, style="yellow", markup=False)
        with contextlib.ExitStack() as exits:
            exits.enter_context(claims.at_work(self.root, self.id, reads=self._reads()))
            check_carried_out(self.root)  # again: whoever writes a request now sees that a run is at work
            self.tracking = Tracking(
                locate_store(self.root, self.config.tracking.uri),
                self.config.tracking.experiment,
                conf=self.conf,
                targets=self.config.targets,
                invocation=self.id,
                command=self.command,
                root=self.root,
                fingerprints={item.step.output: item.fingerprint.digest for item in self.planned},
                config=self.config.model_dump(mode="json"),
                say=warn,
            )
            exits.push(self._warn)
            exits.enter_context(self.tracking)
            with self.stopped.at_once():
                self.cluster = Cluster(self.config.cluster, self.config.workers, warn)
            exits.callback(self.cluster.close)
            if self.config.cluster.address:
                console.print(f"on {self.cluster}", markup=False)
            self.books = self._open_books()
            obstacles.check_precision(self.config, self.planned, self.cluster.room.kind())
            self.summary.devices = self.cluster.room.kind()
            self.record = self._recorded()
            exits.push(self._tell)
            exits.push(self._end)
            neighbours.check_standing(self.store, self.artifacts.values())
            self.exits = exits.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """End all that was begun, whatever of it fails; the error that ended the run is the one that is told."""
        with _less_than(error):
            self.exits.__exit__(kind, error, trace)

    def _end(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with _less_than(error):
            self.record.end(error)

    def _warn(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Tell at the end what was got over, where no last screen does."""
        self.summary.warnings += self.tracking.warnings
        for warning in self.summary.warnings if error else ():
            console.print(f"warning: {warning}", style="yellow", markup=False)

    def _open_books(self) -> Books:
        cluster, keys = self.cluster, [(item.step.name, item.fingerprint.digest) for item in self.planned]
        about = About(where=cluster.where, price=self.config.cluster.price_per_hour)
        return Books(self.root, self.id, about, keys, self.config.budget.hours, cluster.devices)

    def _tell(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Describe the run in MLflow, which must not change how it ends."""
        from pipeline.run import telling

        try:
            leases = self.books.of_run()
            telling.of_run(self.tracking, self.summary, self.record.told, self.artifacts, leases, error)
        except Exception as failure:
            log.exception("the run could not be described")
            self.summary.warnings.append(f"MLflow has no description of this run: {failure}")

    def _reads(self) -> list[str]:
        """What nobody may delete from now on: its record, which says the same, comes when Ray and MLflow are there."""
        return [self.store.path(name, print_.digest) for name, print_ in self._wanted().items()] + self._paths()

    def _paths(self) -> list[str]:
        """The files that the config names; gc knows nothing of links."""
        named = [storage.absolute(path) for path in self.config.paths(FILES).values()]
        real = [os.path.realpath(path) for path in named if not storage.is_remote(path)]
        return sorted(map(redact_path, {*named, *real}))

    def _recorded(self) -> Record:
        told = {
            "id": self.id,
            "conf": self.conf,
            **provenance(self.command),
            "checkout": str(Path.cwd()),
            "fingerprints": {name: print_.digest for name, print_ in self._wanted().items()},
            "paths": self._paths(),
            "config": redact(self.config.model_dump(mode="json")),
        }
        return Record(self.root, told)

    def _wanted(self) -> dict[str, Fingerprint]:
        """All that this config asks for, also what the flags leave out."""
        return prints_of(self.config, self.look, dag.order(table(self.config), self.config.targets))

    def came_out_the_same(self, item: Planned) -> bool:
        """Whether a finished step need not be done again after all: its inputs, built anew, are what they were."""
        if not item.again or item.reason == "forced" or item.artifact is None:
            return False
        now = {name: artifact.manifest["content"] for name, artifact in self._inputs(item).items()}
        planned = {i.step.output: i.artifact.manifest["content"] for i in self.planned if i.artifact}
        if now != (item.artifact.manifest.get("inputs") or {name: planned.get(name, now[name]) for name in now}):
            return False
        console.print(f"{item.step.output} stays: what it is made from came out the same", markup=False)
        return True

    def check_batches(self, ahead: list[Planned]) -> None:
        """Refuse batches larger than the data, as far as these are made, of all trainings that are to come."""
        if told := obstacles.too_large_batches(self.config, ahead, self.artifacts):
            raise UsageError(told)

    def build(self, item: Planned, position: str, stopped: Stop) -> None:
        """Build one step: claim, attempts, manifest, tracking, ledger. `position` among all steps is for the screen."""
        name, output, digest = item.step.name, item.step.output, item.fingerprint.digest
        path = self.store.path(output, digest)
        log_path = self.record.begin(output, name, path)
        progress = StepProgress(dag.label(item.step, self.planned), position.replace("[", "\\["))
        outcome = "failed"
        begun = time.monotonic()
        try:
            what = claims.artifact(output, digest)
            with (
                claims.hold(self.root, what, neighbours.tell) as claim,
                logging_to(log_path, self.summary.warnings.append) as lines,
            ):
                artifact = None if item.again else self.store.find(output, digest)
                if artifact:
                    log.info("%s: somebody else has built %s meanwhile", name, path)
                else:
                    log.info("%s begins (%s): %s, fingerprint %s", name, item.reason, path, digest)
                    artifact = self._build_under_claim(item, claim, lines, progress, stopped)
                    log.info(
                        "%s is done: %s rows, %.1f s", name, f"{artifact.manifest['rows']:,}", time.monotonic() - begun
                    )
            outcome = "done"
        except STOPPED:
            outcome = "interrupted"
            raise
        finally:
            progress.close(outcome)
            self.record.end_step(output, outcome)
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

    def _build_under_claim(
        self, item: Planned, claim: Claim, lines: Collection[str], progress: StepProgress, stopped: Stop
    ) -> Artifact:
        from pipeline.run import telling

        step, fingerprint = item.step, item.fingerprint
        path = self.store.path(step.output, fingerprint.digest)
        self._check_unchanged(item)
        inputs = self._inputs(item)  # before anything is deleted: where they are damaged, what there is stays
        if item.again or item.reason == "forced":
            neighbours.check_unread(self.store, step.output, fingerprint.digest, self.id)
            deleting.discard(path, claim.fence)
        if others := deleting.go_on(path, inputs, claim.fence):
            console.print(f"{step.output} begins anew: {', '.join(others)} came out differently", markup=False)
        begun = time.monotonic()
        self.memory.lap()
        account = self.books.open(item)
        told = self.tracking, item, dag.label(step, self.planned), account.about.build, lines
        with (
            telling.step_run(*told, self.cluster.room.kind(), self.books.leases) as tracked,
            exported(self.id, step.output) as figures,
        ):
            build = Build(
                config=self.config.with_absolute_paths(),
                step=step,
                path=path,
                claim=claim,
                inputs=inputs,
                cluster=self.cluster,
                forgotten=refused(self.root),
                lease=account.lease,
                report=self._reporter(step.output, progress, tracked, account, figures),
                stopped=stopped,
                log=self.record.told["steps"][step.output]["log"],
            )
            tracked.reads(build.inputs)
            artifact = attempts.until_done(
                step.call, build, lambda facts: self._commit(item, build, facts, begun), self.config.cluster.retries
            )
            deleting.tidy(artifact, claim.fence)
            tracked.finish(artifact)
            if "README.md" in artifact.files:
                tracked.release(artifact, artifact.read("README.md").decode())
            tracked.end = artifact
        return artifact

    def _reporter(
        self, output: str, progress: StepProgress, tracked: Any, account: Account, figures: Projection
    ) -> StepReporter:
        def hours() -> float:
            return account.of_build() / 3600

        def sign(done: int, total: int, unit: str) -> None:
            self.record.progress(output, done, total, unit, hours())

        return StepReporter(progress, tracked, self.summary.warnings, hours=hours, sign=sign, exported=figures)

    def _commit(self, item: Planned, build: Build, facts: Facts, begun: float) -> Artifact:
        step, fingerprint = item.step, item.fingerprint
        ours = [lease for lease in self.books.leases() if lease.may_be_of(step.output)]
        spent = by_step(ours).get((step.name, fingerprint.digest))
        told = {
            "files": facts.files,
            "shards": facts.shards,
            "rows": facts.rows,
            "metrics": facts.metrics,
            "notes": facts.notes,
            "timed": facts.timed,
            "call": facts.call,
            "workers": facts.workers,
            "inputs": {name: artifact.manifest["content"] for name, artifact in build.inputs.items()},
            "driver": vars(ProcessId.own()),
            **provenance(self.command),
            "seconds": round(time.monotonic() - begun, 3),
            "device_seconds": round(spent.device_seconds, 3) if spent else 0.0,
            "devices": spent.kind if spent else self.cluster.room.kind(),
            "attempts": spent.attempts if spent else 1,
            "failed_attempts": spent.failed_attempts if spent else 0,
            "peak_bytes": self.memory.lap_bytes(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return self.store.commit(step.output, fingerprint, told, build.claim)

    def _check_unchanged(self, item: Planned) -> None:
        """Refuse to build from files that have changed since the plan: the fingerprint would tell of the old ones."""
        read = reading(self.config, Look(self.root), [item.step])
        now = replace(item.fingerprint, settings={key: read(key) for key in item.step.reads})
        if now != item.fingerprint:
            changes = "; ".join(differences(item.fingerprint.as_dict(), now))
            raise UsageError(f"{changes}, since this run began; start it again")

    def _inputs(self, item: Planned) -> dict[str, Artifact]:
        """The finished artifacts that a step reads, also those of steps that the flags leave out."""
        found = {name: self.store.find(name, digest) for name, digest in item.fingerprint.parents.items()}
        missing = [name for name, artifact in found.items() if artifact is None]
        assert not missing, f"{item.step.name} was planned without {missing}"
        inputs = {name: artifact for name, artifact in found.items() if artifact is not None}
        for artifact in inputs.values():
            if told := lacking(artifact.path, artifact.files):
                raise CorruptFile(f"{told}; {MEND}")
        return inputs
