"""One step is built: under its claim, from whole inputs, in as many attempts as it takes, up to its manifest."""

import logging
import time
from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from datasets.files.storage import MEND, CorruptFile
from pipeline.cluster.metrics import Projection, exported
from pipeline.errors import STOPPED, UsageError
from pipeline.hours.spent import by_step
from pipeline.plan import dag
from pipeline.plan.dag import Planned, differences
from pipeline.plan.wanted import reading
from pipeline.run import attempts, neighbours
from pipeline.run.account import Account
from pipeline.run.last_screen import Built
from pipeline.run.progress import StepProgress
from pipeline.run.session import Session
from pipeline.run.step_log import StepReporter, logging_to
from pipeline.settings.config import Config
from pipeline.steps.build import Build, Facts
from pipeline.store import claims, deleting
from pipeline.store.artifacts import Artifact, Look, Store, lacking
from pipeline.store.claims import Claim
from pipeline.store.process import ProcessId
from pipeline.store.provenance import provenance
from pipeline.store.removal_list import refused
from pipeline.terminal import console

log = logging.getLogger(__name__)


def build(session: Session, item: Planned, position: str) -> None:
    """Build one step: claim, attempts, manifest, tracking, ledger. `position` among all steps is for the screen."""
    name, output, digest = item.step.name, item.step.output, item.fingerprint.digest
    path = session.store.path(output, digest)
    log_path = session.record.begin(output, name, path)
    progress = StepProgress(dag.label(item.step, session.planned), position.replace("[", "\\["))
    outcome = "failed"
    begun = time.monotonic()
    try:
        what = claims.artifact(output, digest)
        with (
            claims.hold(session.root, what, neighbours.tell) as claim,
            logging_to(log_path, session.summary.warnings.append) as lines,
        ):
            artifact = None if item.again else session.store.find(output, digest)
            if artifact:
                log.info("%s: somebody else has built %s meanwhile", name, path)
            else:
                log.info("%s begins (%s): %s, fingerprint %s", name, item.reason, path, digest)
                artifact = _build_under_claim(session, item, claim, lines, progress)
                log.info(
                    "%s is done: %s rows, %.1f s", name, f"{artifact.manifest['rows']:,}", time.monotonic() - begun
                )
        outcome = "done"
    except STOPPED:
        outcome = "interrupted"
        raise
    finally:
        progress.close(outcome)
        session.record.end_step(output, outcome)
    session.artifacts[output] = artifact
    session.summary.steps.append(_line(artifact, begun))


def came_out_the_same(session: Session, item: Planned) -> bool:
    """Whether a finished step need not be done again after all: its inputs, built anew, are what they were."""
    if not item.again or item.reason == "forced" or item.artifact is None:
        return False
    now = {name: artifact.manifest["content"] for name, artifact in _inputs(session.store, item).items()}
    planned = {i.step.output: i.artifact.manifest["content"] for i in session.planned if i.artifact}
    if now != (item.artifact.manifest.get("inputs") or {name: planned.get(name, now[name]) for name in now}):
        return False
    console.print(f"{item.step.output} stays: what it is made from came out the same", markup=False)
    return True


def _line(artifact: Artifact, begun: float) -> Built:
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
    session: Session, item: Planned, claim: Claim, lines: Collection[str], progress: StepProgress
) -> Artifact:
    from pipeline.run import telling

    step, fingerprint = item.step, item.fingerprint
    path = session.store.path(step.output, fingerprint.digest)
    _check_unchanged(session.config, session.root, item)
    inputs = _inputs(session.store, item)  # before anything is deleted: where they are damaged, what there is stays
    if item.again or item.reason == "forced":
        neighbours.check_unread(session.store, step.output, fingerprint.digest, session.id)
        deleting.discard(path, claim.fence)
    if others := deleting.go_on(path, inputs, claim.fence):
        console.print(f"{step.output} begins anew: {', '.join(others)} came out differently", markup=False)
    begun = time.monotonic()
    session.memory.lap()
    account = session.books.open(item)
    told = session.tracking, item, dag.label(step, session.planned), account.about.build, lines
    with (
        telling.step_run(*told, session.cluster.room.kind(), session.books.leases) as tracked,
        exported(session.id, step.output) as figures,
    ):
        build = Build(
            config=session.config.with_absolute_paths(),
            step=step,
            path=path,
            claim=claim,
            inputs=inputs,
            cluster=session.cluster,
            forgotten=refused(session.root),
            lease=account.lease,
            report=_reporter(session, step.output, progress, tracked, account, figures),
            stopped=session.stopped,
            log=session.record.told["steps"][step.output]["log"],
        )
        tracked.reads(build.inputs)
        artifact = attempts.until_done(
            step.call, build, lambda facts: _commit(session, item, build, facts, begun), session.config.cluster.retries
        )
        deleting.tidy(artifact, claim.fence)
        tracked.finish(artifact)
        if "README.md" in artifact.files:
            tracked.release(artifact, artifact.read("README.md").decode())
        tracked.end = artifact
    return artifact


def _reporter(
    session: Session, output: str, progress: StepProgress, tracked: Any, account: Account, figures: Projection
) -> StepReporter:
    def hours() -> float:
        return account.of_build() / 3600

    def sign(done: int, total: int, unit: str) -> None:
        session.record.progress(output, done, total, unit, hours())

    return StepReporter(progress, tracked, session.summary.warnings, hours=hours, sign=sign, exported=figures)


def _commit(session: Session, item: Planned, build: Build, facts: Facts, begun: float) -> Artifact:
    step, fingerprint = item.step, item.fingerprint
    ours = [lease for lease in session.books.leases() if lease.may_be_of(step.output)]
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
        **provenance(session.command),
        "seconds": round(time.monotonic() - begun, 3),
        "device_seconds": round(spent.device_seconds, 3) if spent else 0.0,
        "devices": spent.kind if spent else session.cluster.room.kind(),
        "attempts": spent.attempts if spent else 1,
        "failed_attempts": spent.failed_attempts if spent else 0,
        "peak_bytes": session.memory.lap_bytes(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return session.store.commit(step.output, fingerprint, told, build.claim)


def _check_unchanged(config: Config, root: str, item: Planned) -> None:
    """Refuse to build from files that have changed since the plan: the fingerprint would tell of the old ones."""
    read = reading(config, Look(root), [item.step])
    now = replace(item.fingerprint, settings={key: read(key) for key in item.step.reads})
    if now != item.fingerprint:
        changes = "; ".join(differences(item.fingerprint.as_dict(), now))
        raise UsageError(f"{changes}, since this run began; start it again")


def _inputs(store: Store, item: Planned) -> dict[str, Artifact]:
    """The finished artifacts that a step reads, also those of steps that the flags leave out."""
    found = {name: store.find(name, digest) for name, digest in item.fingerprint.parents.items()}
    missing = [name for name, artifact in found.items() if artifact is None]
    assert not missing, f"{item.step.name} was planned without {missing}"
    inputs = {name: artifact for name, artifact in found.items() if artifact is not None}
    for artifact in inputs.values():
        if told := lacking(artifact.path, artifact.files):
            raise CorruptFile(f"{told}; {MEND}")
    return inputs
