"""MLflow runs: what a reviewer of experiments sees of a pipeline run.

One parent run for each invocation that does work, one child run for each step that it builds; a step's retries stay in
its child, and so does what later invocations do to go on with its build: one curve, one cost. Only the driver records;
workers hand it their numbers. MLflow is a view: a run never waits for it, and what it could not take is sent by the
next run. What runs have cost is the ledger's (`projection`).
"""

import base64
import contextlib
import hashlib
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from datasets.files.errors import StorageError
from pipeline.errors import STOPPED, UsageError
from pipeline.store.artifacts import Artifact
from pipeline.store.deleting import is_model
from pipeline.store.process import ProcessId, user_name
from pipeline.store.provenance import commit, versions
from pipeline.store.redact import redact
from pipeline.tracking import names
from pipeline.tracking.mlflow_records import END_REASON, PROCESS, Recorder
from pipeline.tracking.mlflow_store import MlflowStore
from pipeline.tracking.outbox import Outbox, in_short, left_behind

MODEL = "wuerstchen"  # of which each release is a version
DIGEST = 32  # digits of a dataset's content that MLflow takes
LONGEST_CARD = 4000  # characters of a model card that MLflow takes as a description
HEAD_OF_A_CARD = re.compile(r"\A---\n.*?\n---\n+(?:# [^\n]*\n+)?", re.DOTALL)
NOTE = "mlflow.note.content"  # the description of a run
END_PATIENCE_S = 30.0  # how long a run waits at its end for records on their way


class Tracking:
    """The MLflow runs of one invocation, as a context.

    Args:
        store: from `locate_store`.
        experiment: name of the MLflow experiment, created where it is missing.
        conf, targets, command, invocation: what was asked for, as it was typed, and the id of this invocation.
        root: whose ledger tells what runs have cost; None: nobody does.
        fingerprints: artifact -> fingerprint of everything that the targets need.
        config: the resolved config; secrets are taken out before it is stored.
        say: is told at once, from another thread, when MLflow does not take what it is given.
    """

    def __init__(
        self,
        store: MlflowStore,
        experiment: str,
        *,
        conf: str,
        targets: Sequence[str],
        invocation: str,
        command: str = "",
        root: str | None = None,
        fingerprints: Mapping[str, str],
        config: Mapping[str, Any],
        say: Callable[[str], None] = lambda sentence: None,
    ):
        self.warnings: list[str] = []  # what could not be recorded, once the context has been left
        self._store = store
        self._name = names.of_command(conf, command, invocation)
        self._typed = names.typed(command) | {"conf": conf}
        self._invocation = invocation
        self._config = redact(config)
        self._tags = {
            "wst.kind": "pipeline",
            "wst.conf": conf,
            "wst.targets": " ".join(targets),
            "wst.invocation": invocation,
            **{f"wst.fingerprint.{name}": digest for name, digest in fingerprints.items()},
            **git_tags(Path(__file__).parent),
            **{f"wst.version.{name}": version for name, version in versions().items()},
        }
        self._recorder = Recorder(store, experiment, root)
        self._unsent = _unsent(store, experiment)
        self._say = say
        self._outbox: Outbox | None = None
        self._parent = ""
        self._described = False  # what ends a run before it is begun, as a Ray that does not start, describes nothing
        self._runs: dict[str, str] = {}  # artifact -> our key of the run of the step that makes it

    def __enter__(self) -> "Tracking":
        try:
            name = f"{self._invocation}-{uuid.uuid4().hex[:8]}"
            self._outbox = Outbox(self._unsent, name, self._recorder, self._complain)
        except OSError as error:
            self.warnings.append(f"MLflow gets nothing of this run: {error}")
        self.record("end_lost")
        self._parent = self._start(self._name, "", self._tags)
        text = yaml.safe_dump(self._config, sort_keys=False, allow_unicode=True)
        self.record("config", run=self._parent, text=text, params=self._typed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.record("hours", run=self._parent)
        if error is not None and not self._described:
            said = " ".join(str(error).split()) or type(error).__name__
            self.record("tags", run=self._parent, tags={NOTE: f"**{said}**"})
        self._end(self._parent, error)
        if self._outbox:
            left = self._outbox.close(END_PATIENCE_S)
            self.warnings += self._complaints(self._outbox, left)

    @contextlib.contextmanager
    def step(
        self,
        name: str,
        output: str,
        fingerprint: str,
        *,
        label: str | None = None,
        build: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Iterator["StepRun"]:
        """The child run of a step that builds the artifact `output`, around all its attempts.

        A `build` that another invocation has begun goes on in the run that it had then. `label` tells steps of one name
        apart; `settings` are what the step reads.
        """
        tags = {"wst.kind": "step", "wst.step": name, "wst.output": output, "wst.fingerprint": fingerprint}
        key = self._start(names.of_step(label or name, fingerprint), self._parent, tags, build)
        self.record("config", run=key, text="", params=names.plain(redact(settings or {})))
        self._runs[output] = key
        run = StepRun(self, key)
        caught: BaseException | None = None
        try:
            yield run
        except BaseException as error:
            caught = error
            raise
        finally:
            self.record("hours", run=run.key)
            self._end(run.key, caught)

    def describe(self, card: str, verdict: Mapping[str, float]) -> None:
        """What is to be seen first of this invocation: its card (Markdown), and few figures."""
        self._described = True
        self.record("tags", run=self._parent, tags={NOTE: card}, links=self._runs)
        self.record("metrics", run=self._parent, rows=[(name, value, 0, _now()) for name, value in verdict.items()])

    def flush(self, patience_s: float) -> bool:
        """Wait until MLflow has all that was recorded so far; False where it does not in that time."""
        return self._outbox is not None and self._outbox.flush(patience_s)

    def _complain(self, reason: str) -> None:
        self._say(
            f"MLflow at {self._store.uri} does not take what it is given ({reason}); the run goes on, and its records "
            f"wait in {self._unsent}"
        )

    def _complaints(self, outbox: Outbox, left: int) -> Iterator[str]:
        where = f"MLflow at {self._store.uri}"
        if left:
            yield (
                f"{where} did not take {left} records ({outbox.last_error or 'no answer in time'}); "
                f"they wait in {outbox.path}, and the next run with this root, tracking.uri and experiment sends them"
            )
            if outbox.unkept:
                yield f"up to {outbox.unkept} of them are lost: {outbox.path} could not take them ({outbox.why_unkept})"
        elif outbox.failures:
            yield f"{where} failed {outbox.failures} times ({outbox.last_error}); everything has arrived since"
        if self._recorder.refused:
            yield f"{where} refused {self._recorder.refused} records for good; the log says which"

    def record(self, kind: str, **content: Any) -> None:
        """Give MLflow a record, see `Recorder`, without secrets; returns at once."""
        self._send(kind, redact(content))

    def _send(self, kind: str, content: Mapping[str, Any]) -> None:
        if self._outbox:
            self._outbox.add({"kind": kind, **content})

    def _start(self, name: str, parent: str, tags: Mapping[str, str], key: str | None = None) -> str:
        """Begin a run; returns our key of it."""
        common = {
            "mlflow.user": user_name(),
            "mlflow.source.name": "python -m pipeline",
            "mlflow.source.type": "LOCAL",
            PROCESS: json.dumps(vars(ProcessId.own())),
        }
        key = key or uuid.uuid4().hex
        self.record("start", run=key, parent=parent, name=name, tags={**common, **tags}, time=_now())
        return key

    def _end(self, run: str, error: BaseException | None) -> None:
        status = _status(error)
        if status == "KILLED":
            self.record("tags", run=run, tags={END_REASON: "stopped on request"})
        self.record("end", run=run, status=status, time=_now())


class StepRun:
    """A step's child run."""

    def __init__(self, tracking: Tracking, key: str):
        self.key = key
        self.end: Artifact | BaseException | None = None  # what became of the step
        self._tracking = tracking
        self._last: dict[str, int] = {}  # name -> step of its newest point

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Take measurements at a training step; steps that a later attempt does again keep their first points."""
        new = {name: value for name, value in values.items() if step > self._last.get(name, -1)}
        self._last.update(dict.fromkeys(new, step))
        if new:
            shown = new | names.seen_first(new)
            rows = [(name, value, step, _now()) for name, value in shown.items()]
            self._tracking.record("metrics", run=self.key, rows=rows)

    def image(self, name: str, png: bytes, step: int) -> None:
        """Show a picture; pictures of one name form a series over steps."""
        content = base64.b64encode(png).decode()
        told = {"run": self.key, "name": names.of_picture(name), "png": content, "step": step, "time": _now()}
        self._tracking._send("image", told)  # as it is: in a picture nothing is a word

    def finish(self, artifact: Artifact) -> None:
        """Record what the finished artifact's manifest says, and the figures of a step that measures."""
        manifest = artifact.manifest
        if not self._last:  # no training, whose curves tell more
            self.metrics(manifest["metrics"], step=0)
        tags = {
            "wst.artifact": artifact.path,
            "wst.content": manifest["content"],
            "wst.devices": manifest["devices"],
            **{f"wst.{name}": str(manifest[name]) for name in ("rows", "bytes", "seconds", "peak_bytes", "attempts")},
        }
        self._tracking.record("tags", run=self.key, tags=tags)

    def reads(self, inputs: Mapping[str, Artifact]) -> None:
        """Record the data that the step reads; models among its inputs are told by their fingerprints."""
        datasets = [
            {
                "name": name,
                "digest": artifact.manifest["content"][:DIGEST],
                "source_type": "local" if "://" not in artifact.path else artifact.path.partition("://")[0],
                "source": json.dumps({"uri": artifact.path}),
                "profile": json.dumps({"rows": artifact.manifest["rows"], "bytes": artifact.manifest["bytes"]}),
            }
            for name, artifact in inputs.items()
            if not is_model(name)
        ]
        if datasets:
            self._tracking.record("inputs", run=self.key, datasets=datasets)

    def release(self, artifact: Artifact, card: str) -> None:
        """Register a release as a version of the model, described by its card from the first sentence on.

        What stands above it is the head, which the Hub reads, and the title, which MLflow would show in its place."""
        text = HEAD_OF_A_CARD.sub("", card)[:LONGEST_CARD]
        about = {"source": artifact.path, "content": artifact.manifest["content"], "card": text}
        self._tracking.record("release", run=self.key, model=MODEL, **about)

    def describe(self, card: str) -> None:
        """What is to be seen first of this step, Markdown."""
        self._tracking.record("tags", run=self.key, tags={NOTE: card})


def rebuild_hours(store: MlflowStore, experiment: str, root: str) -> int:
    """Make the hours of every run of an experiment what the root's ledger says; returns how many runs there are.

    Raises:
        UsageError: MLflow does not take them.
        OSError: the ledger cannot be read, or the store's folder not be written.
    """
    try:
        return Recorder(store, experiment, root).rebuild()
    except (UsageError, StorageError, PermissionError):
        raise
    except Exception as error:  # whatever a server, a proxy or an old database says
        raise UsageError(
            f"MLflow at {store.uri} does not take the hours ({in_short(error)}); call this again once it does"
        ) from error


def send_unsent(store: MlflowStore, experiment: str, root: str | None = None) -> str | None:
    """Send what ended runs could not, without a run of one's own; returns what became of that, if there was any."""
    folder = _unsent(store, experiment)
    if not any(left_behind(folder)):
        return None
    try:
        outbox = Outbox(folder, f"nothing-to-do-{uuid.uuid4().hex[:8]}", Recorder(store, experiment, root))
        outbox.close(END_PATIENCE_S)
        reason = outbox.last_error or "another run is at work, or there was no answer in time"
    except OSError as error:
        reason = str(error)
    if any(left_behind(folder)):
        return f"MLflow at {store.uri} has not all that earlier runs recorded ({reason}); the rest waits in {folder}"
    return f"MLflow at {store.uri} has taken what earlier runs could not send"


def _unsent(store: MlflowStore, experiment: str) -> Path:
    """Folder for records that a store has not taken yet."""
    now, before = (
        store.unsent / hashlib.sha256(f"{name} {experiment}".encode()).hexdigest()[:12]
        for name in (store.name, store.uri)  # earlier versions went by the path of a database
    )
    if not now.exists():
        with contextlib.suppress(OSError):
            before.rename(now)
    return now


def git_tags(folder: Path) -> dict[str, str]:
    """Commit, branch, and whether tracked files were changed, under MLflow's names; {} outside a checkout."""
    found = commit(folder)
    if found is None:
        return {}
    named = {"commit": found["sha"], "branch": found["branch"], "dirty": str(found["changed"]).lower()}
    return {f"mlflow.source.git.{name}": value for name, value in named.items()}


def _now() -> int:
    """Unix time in ms."""
    return time.time_ns() // 1_000_000


def _status(error: BaseException | None) -> str:
    if error is None:
        return "FINISHED"
    return "KILLED" if isinstance(error, STOPPED) else "FAILED"
