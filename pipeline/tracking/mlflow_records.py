"""What is recorded in MLflow, as plain records, and putting them there. Putting one there twice changes nothing.

A record is JSON: its `kind`, the `run` that it belongs to (a key of our own, since MLflow may not have been asked for
an id yet), and what `Recorder` takes for that kind. Times are Unix times in ms.
"""

import base64
import io
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from datasets.files import storage
from pipeline.store import ledger
from pipeline.store.process import ProcessId
from pipeline.tracking import outbox, projection
from pipeline.tracking.card import RUN
from pipeline.tracking.mlflow_store import MlflowStore, NeedsMending, connect, require_active
from pipeline.tracking.outbox import NotTaken, Record
from pipeline.tracking.projection import KEY

if TYPE_CHECKING:
    from mlflow.entities import Run

log = logging.getLogger(__name__)

MetricRow = tuple[str, float, int, int]  # name, value, step, time
PROCESS = "wst.process"
CONTENT = "wst.content"  # the hash of an artifact's content
END_REASON = "wst.end_reason"  # of a run that did not come to its end
# Kinds of records for which it does not matter how late they come. Of a run's start, tags and end the last one counts,
# so that they wait for each other; and without its start a run has nothing.
_MAY_WAIT = {"end_lost", "config", "inputs", "metrics", "hours", "image", "release"}
_NEVER = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}  # MLflow's codes for what no later try can mend


class Recorder:
    """Puts records into a store; connects to it at the first one. What runs have cost, the root's ledger tells."""

    def __init__(self, store: MlflowStore, experiment: str, root: str | None = None):
        self.refused = 0  # records that MLflow will never take, such as those of a run that somebody deleted
        self._store = store
        self._experiment = experiment
        self._client: Any = None
        self._experiment_id = ""
        self._ids: dict[str, str] = {}
        self._furthest: dict[str, dict[str, int]] = {}  # run -> step of each metric's last point when it went on
        self._had: dict[tuple[str, str], set[int]] = {}  # run and metric -> steps that have a point, where asked
        self._root = root

    def __call__(self, records: Sequence[Record]) -> None:
        """Put records there in their order; measurements of a run that follow each other go together.

        Raises:
            NotTaken: MLflow is there, but has not taken some. Without those all others go on: a store of files may be
                away, or refuse this user, where that of the figures is not.
        """
        from mlflow.exceptions import MlflowException

        if self._client is None:
            try:
                self._client, self._experiment_id = connect(self._store, self._experiment)
            except MlflowException as error:
                _raise_if_mendable(error)
                raise
        aside: dict[tuple[str, str | None], list[int]] = {}  # kind and run -> places; what follows waits for its turn
        why = Exception()
        for group, places in _grouped(records):
            if group in aside:
                aside[group] += places
                continue
            try:
                self._put(*group, _together([records[place] for place in places]))
            except Exception as error:
                if self._is_refused(error):
                    self.refused += len(places)
                    log.warning("MLflow refuses a record (%s) of run %s: %s", *group, error)
                elif group[0] not in _MAY_WAIT or not self._is_there():
                    _raise_if_mendable(error)
                    raise
                else:
                    aside[group], why = places, error
        if aside:
            kinds = ", ".join(sorted({kind for kind, _ in aside}))
            raise NotTaken(sorted(chain.from_iterable(aside.values())), f"{kinds}: {outbox.in_short(why)}") from why

    def _is_refused(self, error: Exception) -> bool:
        """Whether a record will never be taken: by MLflow, or as it is one of another version of this program."""
        from mlflow.exceptions import MlflowException

        if isinstance(error, MlflowException) and error.error_code in _NEVER:
            require_active(self._client.get_experiment(self._experiment_id), self._store)
            return True
        return isinstance(error, KeyError | TypeError)

    def _is_there(self) -> bool:
        """Whether MLflow answers the simplest question."""
        try:
            return self._client.get_experiment(self._experiment_id) is not None
        except Exception as error:
            log.info("MLflow does not answer: %s", error)
            return False

    def _put(self, kind: str, run: str | None, record: Record) -> None:
        if kind == "end_lost":
            self._end_lost()
            return
        if run is None:
            raise KeyError("run")
        if kind == "start":
            self._start(run, record)
            return
        run_id = self._id(run)
        if kind == "config":
            self._config(run_id, record["text"], record["params"])
        elif kind == "metrics":
            self._metrics(run_id, self._new(run_id, record["rows"]))
        elif kind == "hours":
            self._hours([run_id])
        elif kind == "image":
            self._image(run_id, record)
        elif kind == "tags":
            links = record.get("links", {})
            self._tags(run_id, {name: self._linked(text, links) for name, text in record["tags"].items()})
        elif kind == "inputs":
            self._inputs(run_id, record["datasets"])
        elif kind == "release":
            self._release(run_id, record)
        elif kind == "end":
            self._client.set_terminated(run_id, record["status"], end_time=record["time"])
        else:
            raise KeyError(kind)

    def _start(self, run: str, record: Record) -> None:
        tags = {**record["tags"], KEY: run}
        if record["parent"]:
            tags["mlflow.parentRunId"] = self._id(record["parent"])
        if found := self._find(run):  # a step that goes on: in its own run, below who does it now
            self._client.update_run(found, status="RUNNING")
            before = self._client.get_run(found).data
            self._furthest[found] = {metric.key: metric.step for metric in before.to_proto().metrics}
            self._had = {key: steps for key, steps in self._had.items() if key[0] != found}  # there are more since
            if END_REASON in before.tags:  # it has not ended, after all
                self._client.delete_tag(found, END_REASON)
            self._tags(found, tags)
        else:
            made = self._client.create_run(self._experiment_id, record["time"], tags, record["name"])
            self._ids[run] = made.info.run_id

    def _id(self, run: str) -> str:
        """MLflow's id of a run; where there is none, an error that no later try can mend."""
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

        found = self._ids.get(run) or self._find(run)
        if found is None:
            raise MlflowException(f"there is no run {run}", RESOURCE_DOES_NOT_EXIST)
        return found

    def _find(self, run: str) -> str | None:
        for found in self._client.search_runs([self._experiment_id], f"tags.`{KEY}` = '{run}'"):
            self._ids[run] = found.info.run_id
        return self._ids.get(run)

    def _config(self, run_id: str, text: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        # Parameters are for comparing runs; MLflow cuts them at 6,000 characters, the file is whole.
        self._client.log_batch(run_id, params=[Param(legal_name(key), value) for key, value in params.items()])
        if text:
            self._client.log_text(run_id, text, "config.yaml")

    def _metrics(self, run_id: str, rows: Sequence[MetricRow]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(legal_name(name), value, time, step) for name, value, step, time in rows]
        self._client.log_batch(run_id, metrics=metrics)

    def _new(self, run_id: str, rows: Sequence[MetricRow]) -> list[MetricRow]:
        """Those of training steps that have no point yet: a build that goes on does some again that the process before
        it had recorded, and nobody but MLflow knows which."""
        furthest = self._furthest.get(run_id, {})
        return [row for row in rows if row[2] > furthest.get(legal_name(row[0]), 0) or not self._has(run_id, row)]

    def _has(self, run_id: str, row: MetricRow) -> bool:
        name, _, step, _ = row
        if step == 0:  # no training step: the newest counts
            return False
        key = run_id, legal_name(name)
        if key not in self._had:
            self._had[key] = {point.step for point in self._client.get_metric_history(*key)}
        return step in self._had[key]

    def _image(self, run_id: str, record: Record) -> None:
        """Add a picture, unless it is there: MLflow would give it another name each time."""
        key, step, time = legal_name(record["name"]), record["step"], record["time"]
        start = f"images/{key.replace('/', '~')}+step+{step}+timestamp+{time}+"
        there = (file.path for file in self._client.list_artifacts(run_id, "images"))
        if not any(path.startswith(start) and "+compressed" in path for path in there):  # which it writes last
            picture = Image.open(io.BytesIO(base64.b64decode(record["png"])))
            self._client.log_image(run_id, picture, key=key, step=step, timestamp=time)

    def _tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def _linked(self, text: str, links: Mapping[str, str]) -> str:
        """A description with MLflow's pages of steps' runs where it names their artifacts; `links` has our keys."""

        def page(match: re.Match[str]) -> str:
            key = links.get(match[2])
            found = key and (self._ids.get(key) or self._find(key))
            return f"[{match[1]}](#/experiments/{self._experiment_id}/runs/{found})" if found else match[1]

        return re.sub(rf"\[([^]]*)\]\({RUN}([^)]*)\)", page, text)

    def _inputs(self, run_id: str, datasets: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        tags = [InputTag("mlflow.data.context", "read")]
        inputs = [DatasetInput(Dataset(**dataset), tags) for dataset in datasets]
        try:
            self._client.log_inputs(run_id, datasets=inputs)
        except MlflowException as error:
            if error.error_code != "BAD_REQUEST":
                raise
            log.info("another run has just made one of the datasets, which is there now: %s", error)
            self._client.log_inputs(run_id, datasets=inputs)

    def _release(self, run_id: str, record: Record) -> None:
        """Register a release as a version of the one model, unless it is one already.

        MLflow itself calls the newest `latest`, in `models:/<name>/latest`: nobody can give that alias.
        """
        from mlflow.exceptions import MlflowException

        name = record["model"]
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        known = self._client.search_model_versions(f"name='{name}'")
        if all(found.tags.get(CONTENT) != record["content"] for found in known):
            about = {"tags": {CONTENT: record["content"]}, "description": record["card"]}
            self._client.create_model_version(name, record["source"], run_id, **about)

    def _end_lost(self) -> None:
        """End the runs of this host's dead processes, which MLflow would show as running for ever."""
        for run in self._client.search_runs([self._experiment_id], "attributes.status = 'RUNNING'"):
            process = run.data.tags.get(PROCESS)
            if process and ProcessId.of(json.loads(process)).is_dead():
                self._client.set_tag(run.info.run_id, END_REASON, "process died")
                self._client.set_terminated(run.info.run_id, "KILLED")
                self._hours([run.info.run_id])

    def rebuild(self) -> int:
        """Make the hours of every run what the ledger says; returns how many runs there are."""
        self._client, self._experiment_id = connect(self._store, self._experiment)
        runs: list[str] = []
        token: str | None = ""
        while token is not None:
            page = self._client.search_runs([self._experiment_id], max_results=1000, page_token=token or None)
            runs += [run.info.run_id for run in page]
            token = page.token or None
        self._hours(runs)
        return len(runs)

    def _hours(self, run_ids: Sequence[str]) -> None:
        """What runs have cost by now, each where that is not what MLflow has."""
        if self._root is None:
            return
        leases, _ = ledger.read(self._root)
        for run_id in run_ids:
            run = self._client.get_run(run_id)
            now = projection.hours(run.data.tags, self._tags_above(run), leases)
            gone = {name: 0.0 for name in run.data.metrics if name in projection.NAMES and name not in now}
            changed = {name: value for name, value in (now | gone).items() if run.data.metrics.get(name) != value}
            at = time.time_ns() // 1_000_000
            self._metrics(run_id, [(name, value, 0, at) for name, value in changed.items()])

    def _tags_above(self, run: "Run") -> Mapping[str, str]:
        """The tags of a run's parent; none where it has none, or none any more: somebody has deleted it for good."""
        from mlflow.exceptions import MlflowException

        parent = run.data.tags.get("mlflow.parentRunId")
        try:
            tags: dict[str, str] = self._client.get_run(parent).data.tags if parent else {}
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return {}
        return tags


def _raise_if_mendable(error: Exception) -> None:
    """Say what a person has to do about an error of MLflow's, where they can."""
    if re.search(r"error code 40[13]\b|PERMISSION_DENIED|UNAUTHENTICATED", str(error)):
        raise NeedsMending(
            "the server refuses this user; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN"
        ) from error


def _grouped(records: Sequence[Record]) -> Iterator[tuple[tuple[str, str | None], list[int]]]:
    """Kind and run of records, and their places: of measurements as many as follow each other, else of one."""

    def about(place: int) -> tuple[str, str | None]:
        return str(records[place].get("kind")), records[place].get("run")

    for group, found in groupby(range(len(records)), about):
        places = list(found)
        yield from [(group, places)] if group[0] == "metrics" else [(group, [place]) for place in places]


def _together(measurements: Sequence[Record]) -> Record:
    """Measurements of one run as one record; any other record alone as it is."""
    first, *others = measurements
    return {**first, "rows": [row for record in measurements for row in record["rows"]]} if others else first


def drop_pictures(folder: Path) -> int:
    """Delete the pictures that a root's MLflow folder holds, or has yet to send, and reports, which have some in them;
    returns how many those were.

    Raises:
        BlockingIOError: a run that has not ended keeps some.
    """
    unsent = outbox.drop(folder / "unsent", "image")
    kept = ("images/*", "report.html", "report.json")
    shown = [str(file) for pattern in kept for file in folder.glob(f"artifacts/*/artifacts/{pattern}")]
    for path in shown:
        storage.remove(path)
    return unsent + len(shown)


def legal_name(name: str) -> str:
    """A name that MLflow accepts for metrics, parameters and pictures: an underscore for what it forbids."""
    return re.sub(r"[^\w./ :-]", "_", name)
