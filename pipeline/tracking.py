"""MLflow runs: what a reviewer of experiments sees of a pipeline run.

One parent run for each invocation that does work, one child run for each step that it builds; a step's
retries stay in its child, so the list of runs reads like the DAG. Only the driver writes; workers hand it
their numbers. MLflow is a view: where it fails the run goes on; failures are counted and shown at the end.
"""

import contextlib
import getpass
import io
import json
import logging
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from PIL import Image

from pipeline.artifacts import Artifact
from pipeline.dag import flatten
from pipeline.errors import Interrupted
from pipeline.mlflow_store import MlflowStore, connect
from pipeline.process import ProcessId
from pipeline.redact import redact

log = logging.getLogger(__name__)

MetricRow = tuple[str, float, int, int]  # name, value, step, Unix time in ms
BUFFERED_ROWS = 500
BUFFERED_S = 5.0


class Tracking:
    """The MLflow runs of one invocation, as a context; it creates the store: enter it before workers start.

    Args:
        store: from `locate_store`.
        experiment: name of the MLflow experiment, created where it is missing.
        conf, targets, invocation: what was asked for, and the id of this invocation.
        fingerprints: artifact -> fingerprint of everything that the targets need.
        config: the resolved config; secrets are taken out before it is stored.
    """

    def __init__(
        self,
        store: MlflowStore,
        experiment: str,
        *,
        conf: str,
        targets: Sequence[str],
        invocation: str,
        fingerprints: Mapping[str, str],
        config: Mapping[str, Any],
    ):
        self.run_id: str | None = None
        self._store = store
        self._experiment = experiment
        self._name = conf
        self._config = redact(config)
        self._tags = {
            "wst.kind": "pipeline",
            "wst.conf": conf,
            "wst.targets": " ".join(targets),
            "wst.invocation": invocation,
            **{f"wst.fingerprint.{name}": digest for name, digest in fingerprints.items()},
            **git_tags(Path(__file__).parent),
        }
        self._client: Any = None
        self._experiment_id = ""
        self._failures: Counter[str] = Counter()

    @property
    def warnings(self) -> list[str]:
        """What could not be recorded, one sentence for each kind of failure."""
        return [
            f"MLflow at {self._store.uri} failed {count} times to {action}; the run itself is not affected"
            for action, count in self._failures.items()
        ]

    def __enter__(self) -> "Tracking":
        with self._tolerating("open the store"):
            self._client, self._experiment_id = connect(self._store, self._experiment)
            self._end_lost_runs()
        self.run_id = self._start(self._name, self._tags)
        if self.run_id is not None:
            with self._tolerating("record the config"):
                self._record_config(self.run_id)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(self.run_id, error)

    @contextlib.contextmanager
    def step(self, name: str, output: str, fingerprint: str) -> Iterator["StepRun"]:
        """The child run of a step that builds the artifact `output`, around all its attempts."""
        tags = {
            "mlflow.parentRunId": self.run_id or "",
            "wst.kind": "step",
            "wst.step": name,
            "wst.output": output,
            "wst.fingerprint": fingerprint,
        }
        run = StepRun(self, self._start(f"{name} ({output})", tags))
        caught: BaseException | None = None
        try:
            yield run
        except BaseException as error:
            caught = error
            raise
        finally:
            run.flush()
            self._end(run.run_id, caught)

    def log_metrics(self, run_id: str | None, rows: Sequence[MetricRow]) -> None:
        """Add points to a run's curves; the same row twice is one point. Nothing happens without a run."""
        if run_id is None or not rows:
            return
        with self._tolerating("record metrics"):
            from mlflow.entities import Metric

            metrics = [Metric(legal_name(name), value, time_ms, step) for name, value, step, time_ms in rows]
            self._client.log_batch(run_id, metrics=metrics)

    def log_image(self, run_id: str | None, name: str, png: bytes, step: int) -> None:
        """Add a picture to a run; pictures of one name form a series over steps."""
        if run_id is None:
            return
        with self._tolerating("record a picture"):
            self._client.log_image(run_id, Image.open(io.BytesIO(png)), key=legal_name(name), step=step)

    def set_tags(self, run_id: str | None, tags: Mapping[str, str]) -> None:
        """Put tags on a run."""
        if run_id is None:
            return
        with self._tolerating("record tags"):
            from mlflow.entities import RunTag

            self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def _start(self, name: str, tags: Mapping[str, str]) -> str | None:
        if self._client is None:
            return None
        run_id: str | None = None
        with self._tolerating("start a run"):
            common = {
                "mlflow.user": getpass.getuser(),
                "mlflow.source.name": "python -m pipeline",
                "mlflow.source.type": "LOCAL",
                "wst.process": json.dumps(vars(ProcessId.own())),
            }
            run = self._client.create_run(self._experiment_id, tags={**common, **tags}, run_name=name)
            run_id = run.info.run_id
        return run_id

    def _end(self, run_id: str | None, error: BaseException | None) -> None:
        if run_id is None:
            return
        with self._tolerating("end a run"):
            self._client.set_terminated(run_id, _status(error))

    def _record_config(self, run_id: str) -> None:
        from mlflow.entities import Param

        text = yaml.safe_dump(self._config, sort_keys=False, allow_unicode=True)
        self._client.log_text(run_id, text, "config.yaml")
        values = {key: json.dumps(value, ensure_ascii=False) for key, value in flatten(self._config).items()}
        # Parameters are for comparing runs; MLflow cuts them at 6,000 characters, the file above is whole.
        self._client.log_batch(run_id, params=[Param(legal_name(key), value) for key, value in values.items()])

    def _end_lost_runs(self) -> None:
        """End the runs of this host's dead processes, which MLflow would show as running for ever."""
        for run in self._client.search_runs([self._experiment_id], "attributes.status = 'RUNNING'"):
            process = run.data.tags.get("wst.process")
            if process and ProcessId(**json.loads(process)).is_dead():
                self._client.set_tag(run.info.run_id, "wst.end_reason", "process died")
                self._client.set_terminated(run.info.run_id, "KILLED")

    @contextlib.contextmanager
    def _tolerating(self, action: str) -> Iterator[None]:
        """The one place where failures of MLflow end: counted, logged, and left behind."""
        try:
            yield
        except Exception as error:
            self._failures[action] += 1
            log.warning("MLflow failed to %s: %s", action, error)


class StepRun:
    """A step's child run; metrics are written in batches, a hundred times cheaper than one by one."""

    def __init__(self, tracking: Tracking, run_id: str | None):
        self.run_id = run_id
        self._tracking = tracking
        self._rows: list[MetricRow] = []
        self._flushed = time.monotonic()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Take measurements at a training step; they appear within seconds."""
        now = time.time_ns() // 1_000_000
        self._rows += [(name, value, step, now) for name, value in values.items()]
        if len(self._rows) >= BUFFERED_ROWS or time.monotonic() - self._flushed > BUFFERED_S:
            self.flush()

    def image(self, name: str, png: bytes, step: int) -> None:
        """Show a picture."""
        self._tracking.log_image(self.run_id, name, png, step)

    def finish(self, artifact: Artifact) -> None:
        """Record what the finished artifact's manifest says: hours, attempts, sizes, final metrics."""
        manifest = artifact.manifest
        hours = "gpu_hours" if manifest["devices"].startswith("cuda") else "cpu_hours"
        values = {name: manifest[name] for name in ("rows", "bytes", "seconds", "peak_bytes")}
        values |= {name: manifest[name] for name in ("attempts", "failed_attempts")}
        values |= {f"{hours}/allocated": manifest["device_seconds"] / 3600}
        values |= {f"final/{name}": value for name, value in manifest["metrics"].items()}
        self.metrics(values, step=0)
        tags = {
            "wst.artifact": artifact.path,
            "wst.content": manifest["content"],
            "wst.devices": manifest["devices"],
        }
        self._tracking.set_tags(self.run_id, tags)

    def flush(self) -> None:
        """Write what is buffered."""
        self._tracking.log_metrics(self.run_id, self._rows)
        self._rows = []
        self._flushed = time.monotonic()


def legal_name(name: str) -> str:
    """A name that MLflow accepts for metrics, parameters and pictures: an underscore for what it forbids."""
    return re.sub(r"[^\w./ :-]", "_", name)


def git_tags(folder: Path) -> dict[str, str]:
    """Commit, branch, and whether tracked files were changed, under MLflow's names; {} outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "mlflow.source.git.commit": git("rev-parse", "HEAD"),
            "mlflow.source.git.branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "mlflow.source.git.dirty": "true" if git("status", "--porcelain", "-uno") else "false",
        }
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        return {}


def _status(error: BaseException | None) -> str:
    if error is None:
        return "FINISHED"
    return "KILLED" if isinstance(error, Interrupted | KeyboardInterrupt) else "FAILED"
