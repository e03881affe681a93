"""Tracking against real MLflow on sqlite; and its UI."""

import base64
import contextlib
import hashlib
import io
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Dataset, DatasetInput
from PIL import Image
from sqlalchemy import event
from sqlalchemy.orm import Session

from pipeline.errors import Interrupted, UsageError
from pipeline.hours.spent import totals
from pipeline.store.artifacts import Artifact
from pipeline.store.ledger import About, Writer
from pipeline.tracking.mlflow_records import Recorder
from pipeline.tracking.mlflow_runs import Tracking, git_tags, rebuild_hours, send_unsent
from pipeline.tracking.mlflow_store import MlflowStore, connect, locate_store
from pipeline.tracking.outbox import NotTaken
from pipeline.verbs.ui import serve_ui

PARENT, CHILD = "learning_rate=2e-4 · stage_c micro · 21-1", "train_c · abc"
CONFIG = {
    "seed": 0,
    "stage_c": {"train": {"lr": 1e-4, "phases": [{"steps": 10}]}},
    "data": {"metadata": "s3://reader:canary-1@bucket/laion?secret_key=canary-2", "hub_token": "canary-3"},
}
PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
MANIFEST = {
    "rows": 64,
    "bytes": 1000,
    "seconds": 7.5,
    "peak_bytes": 2**30,
    "attempts": 2,
    "failed_attempts": 1,
    "device_seconds": 7200.0,
    "devices": "cpu",
    "content": "c0ffee",
    "metrics": {"loss": 0.25},
}


def _tracking(store: MlflowStore) -> Tracking:
    return Tracking(
        store,
        "wuerstchen",
        conf="stage_c",
        targets=["stage_c", "samples"],
        invocation="20261121-1",
        command="python -m pipeline run conf=stage_c scale=micro root=/r stage_c.train.learning_rate=2e-4",
        root=str(store.database.parent.parent),
        fingerprints={"stage_c": "abc", "samples": "def"},
        config=CONFIG,
    )


def _png() -> bytes:
    png = io.BytesIO()
    Image.fromarray(PIXELS).save(png, "PNG")
    return png.getvalue()


def _runs(store: MlflowStore) -> dict[str, Any]:
    """Every run of the experiment by its name."""
    client, experiment = connect(store, "wuerstchen")
    return {run.info.run_name: run for run in client.search_runs([experiment])}


def _points(store: MlflowStore, name: str) -> list[tuple[int, float]]:
    """Step and value of each point of a curve of train_c, over all its runs."""
    client, experiment = connect(store, "wuerstchen")
    runs = client.search_runs([experiment], "tags.`wst.step` = 'train_c'")
    return sorted((p.step, p.value) for run in runs for p in client.get_metric_history(run.info.run_id, name))


def test_each_step_is_a_child_of_the_invocation(store: MlflowStore) -> None:
    with _tracking(store) as tracking:
        with tracking.step("train_c", "stage_c", "abc"):
            assert tracking.flush(60)
            assert {run.info.status for run in _runs(store).values()} == {"RUNNING"}
        for output in ("samples", "samples_held_out"):  # of one fingerprint
            with tracking.step("sample", output, "def", label=output):
                pass
    runs = _runs(store)
    assert sorted(runs) == [PARENT, "samples · def", "samples_held_out · def", CHILD]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    tags = runs[PARENT].data.tags
    assert tags["wst.targets"] == "stage_c samples"
    assert tags["wst.version.torch"] == version("torch")
    assert (tags["wst.fingerprint.stage_c"], tags["wst.fingerprint.samples"]) == ("abc", "def")
    child = runs[CHILD].data.tags
    assert child["mlflow.parentRunId"] == runs[PARENT].info.run_id
    assert (child["wst.step"], child["wst.fingerprint"]) == ("train_c", "abc")
    assert tracking.warnings == []


def test_the_config_and_what_is_told_are_kept_without_secrets(store: MlflowStore) -> None:
    told = "s3://canary-5@b/x%3Fsig=canary-6&a=1 and HTTPS://U:canary-7@H?X-AMZ-SIGNATURE=canary-8"
    with _tracking(store) as tracking:
        tracking.describe(told, {})
        with tracking.step("train_c", told, "abc") as run:
            run.reads({"images": Artifact("images", told, MANIFEST)})
            run.describe(told)
    run = _runs(store)[PARENT]
    assert run.data.params == {"conf": "stage_c", "scale": "micro", "stage_c.train.learning_rate": "2e-4"}
    assert store.artifacts
    (file,) = store.artifacts.rglob("config.yaml")
    assert "hub_token: '***'" in file.read_text()
    assert "s3://***@bucket/laion?***" in file.read_text()
    kept = b"".join(path.read_bytes() for path in store.database.parent.rglob("*") if path.is_file())
    assert b"canary" not in kept
    assert b"s3://***@b/x%3Fsig=***&a=1 and HTTPS://***@H?***" in kept
    assert tracking.warnings == []


def test_metrics_have_steps_and_legal_names(store: MlflowStore) -> None:
    with _tracking(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        for step in range(1200):  # more than MLflow takes in one batch
            run.metrics({"loss": 1 / (step + 1), "mfu(%)": 50.0}, step)
        for step in range(1190, 1210):  # a worker that was restarted does some steps again
            run.metrics({"loss": 1 / (step + 1)}, step)
    points = _points(store, "loss")
    assert [step for step, _ in points] == list(range(1210))
    assert points[3] == (3, 0.25)
    assert len(_points(store, "mfu___")) == 1200
    assert tracking.warnings == []


def test_pictures_of_one_name_are_a_series(store: MlflowStore) -> None:
    with _tracking(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        run.image("samples/panel", _png(), step=10)
        run.image("samples/panel", _png(), step=20)
    assert store.artifacts
    files = sorted(store.artifacts.rglob("images/*.png"))
    assert ["+step+10+" in files[0].name, "+step+20+" in files[1].name, len(files)] == [True, True, 2]
    np.testing.assert_array_equal(np.asarray(Image.open(files[0])), PIXELS)
    assert tracking.warnings == []


def test_a_finished_artifact_shows_its_manifest(store: MlflowStore) -> None:
    with _tracking(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        run.metrics({"loss": 1.0}, step=9)
        run.finish(Artifact("stage_c", "/root/artifacts/stage_c/abc", MANIFEST))
    data = _runs(store)[CHILD].data
    assert data.metrics == {"loss": 1.0}  # of the curve; what the manifest repeats of it is no chart of its own
    assert (data.tags["wst.rows"], data.tags["wst.attempts"]) == ("64", "2")
    assert (data.tags["wst.artifact"], data.tags["wst.content"]) == ("/root/artifacts/stage_c/abc", "c0ffee")
    assert tracking.warnings == []


@pytest.mark.parametrize("described", [False, True])
def test_a_run_that_fails_before_it_is_described_says_why(store: MlflowStore, described: bool) -> None:
    def fail() -> None:
        with _tracking(store) as tracking:
            if described:
                tracking.describe("**its card**", {})
            raise UsageError("Ray did not start:\n  the machine is busy; token=canary-4")

    with pytest.raises(UsageError):
        fail()
    note = _runs(store)[PARENT].data.tags["mlflow.note.content"]
    assert note == ("**its card**" if described else "**Ray did not start: the machine is busy; token=***")


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("no"), "FAILED"), (Interrupted(signal.SIGINT), "KILLED"), (KeyboardInterrupt(), "KILLED")],
)
def test_how_a_run_ended_is_recorded(store: MlflowStore, error: BaseException, status: str) -> None:
    def fail() -> None:
        with _tracking(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
            run.metrics({"loss": 1.0}, step=1)
            raise error

    with pytest.raises(type(error)):
        fail()
    runs = _runs(store)
    assert {run.info.status for run in runs.values()} == {status}
    reason = "stopped on request" if status == "KILLED" else None
    assert {run.data.tags.get("wst.end_reason") for run in runs.values()} == {reason}
    assert runs[CHILD].data.metrics == {"loss": 1.0}


def test_a_broken_store_does_not_stop_the_run(store: MlflowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.mlflow_runs.END_PATIENCE_S", 0.5)
    store.database.write_bytes(b"this is no database")
    with _tracking(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        run.metrics({"loss": 1.0}, step=1)
    (warning,) = tracking.warnings
    assert "did not take 10 records" in warning
    assert "not a database" in warning
    (kept,) = store.unsent.rglob("*.jsonl")
    assert str(kept) in warning


def test_a_folder_that_cannot_be_made_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "mlflow").write_text("a file is in the way of the folder")
    unusable = locate_store(str(tmp_path), None)
    with _tracking(unusable) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        run.metrics({"loss": 1.0}, step=1)
        run.finish(Artifact("stage_c", "/somewhere", MANIFEST))
    (warning,) = tracking.warnings
    assert "MLflow gets nothing of this run" in warning


def test_what_mlflow_never_takes_is_dropped_counted_and_holds_nothing_up(store: MlflowStore) -> None:
    with _tracking(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        assert tracking.flush(60)
        client, experiment = connect(store, "wuerstchen")
        (child,) = client.search_runs([experiment], "tags.`wst.step` = 'train_c'")
        client.delete_run(child.info.run_id)
        run.metrics({"loss": 1.0}, step=1)
    assert _runs(store)[PARENT].info.status == "FINISHED"
    (warning,) = tracking.warnings
    assert "refused 2 records for good" in warning  # the point, and the end of the run


def test_what_a_moved_root_could_not_send_is_sent_from_its_new_place(tmp_path: Path) -> None:
    """Also what a version has left that called the folder by the database's path."""
    store = locate_store(str(tmp_path / "before"), None)
    store.database.parent.mkdir(parents=True)
    store.database.write_bytes(b"damaged")
    with _tracking(store):
        pass
    (kept,) = store.unsent.iterdir()
    kept.rename(store.unsent / hashlib.sha256(f"{store.uri} wuerstchen".encode()).hexdigest()[:12])
    store.database.unlink()
    assert "has taken what earlier runs could not send" in (send_unsent(store, "wuerstchen") or "")
    assert set(_runs(store)) == {PARENT}
    store.database.write_bytes(b"damaged")
    with _tracking(store):
        pass
    store.database.unlink()
    (tmp_path / "before").rename(tmp_path / "after")
    moved = locate_store(str(tmp_path / "after"), None)
    assert "has taken what earlier runs could not send" in (send_unsent(moved, "wuerstchen") or "")
    assert set(_runs(moved)) == {PARENT}


def test_a_store_of_files_that_refuses_holds_up_no_figure(store: MlflowStore) -> None:
    """As that of a server whose bucket this user may not write to; the files follow once they may."""
    assert store.artifacts
    store.artifacts.write_text("a file is in the way of the folder")
    with _tracking(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        for step in (1, 2):
            run.metrics({"loss": 1.0 / step}, step)
            run.image("panel", _png(), step)
    (warning,) = tracking.warnings
    assert re.search(r"did not take 3 records \((config, )?image: (Not a directory|File exists)\)", warning)
    assert {name: run.info.status for name, run in _runs(store).items()} == {PARENT: "FINISHED", CHILD: "FINISHED"}
    assert _runs(store)[CHILD].data.metrics == {"loss": 0.5}
    assert _runs(store)[PARENT].data.params["conf"]
    store.artifacts.unlink()
    assert "has taken what earlier runs could not send" in (send_unsent(store, "wuerstchen") or "")
    client, _ = connect(store, "wuerstchen")
    assert [file.path for file in client.list_artifacts(_runs(store)[PARENT].info.run_id)] == ["config.yaml"]
    assert len(client.list_artifacts(_runs(store)[CHILD].info.run_id, "images")) == 4
    assert not list(store.unsent.rglob("*.jsonl"))


def test_only_what_may_come_late_is_set_aside(store: MlflowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's end that came after that of a later command would be the one that is seen."""

    def busy(*_: Any, **__: Any) -> None:
        raise MlflowException("database is locked")

    recorder = Recorder(store, "wuerstchen")
    start = {"kind": "start", "run": "a", "parent": "", "name": "a", "tags": {}, "time": 1}
    rows = [("loss", 1.0, 1, 1)]
    records = [{"kind": kind, "run": "a"} for kind in ("image", "tags", "end", "metrics")]
    image, tags, end, metrics = (record | {"rows": rows, "tags": {"a": "b"}, "time": 2} for record in records)
    image |= {"name": "panel", "png": base64.b64encode(_png()).decode(), "step": 1}
    end["status"] = "FINISHED"
    recorder([start])
    monkeypatch.setattr(MlflowClient, "log_image", busy)
    with pytest.raises(NotTaken, match="image: database is locked") as aside:
        recorder([image, tags, metrics, image])
    assert aside.value.places == [0, 3]
    monkeypatch.setattr(MlflowClient, "set_terminated", busy)
    with pytest.raises(MlflowException, match="locked"):
        recorder([end, start])
    (run,) = _runs(store).values()
    assert (run.info.status, run.data.metrics, run.data.tags["a"]) == ("RUNNING", {"loss": 1.0}, "b")


def test_records_of_another_version_are_dropped_counted_and_hold_nothing_up(store: MlflowStore) -> None:
    with _tracking(store) as tracking:
        tracking.record("tags", run=tracking._parent)
        tracking.record("dreams", run=tracking._parent)
        tracking.record("end")
    assert _runs(store)[PARENT].info.status == "FINISHED"
    (warning,) = tracking.warnings
    assert "refused 3 records for good" in warning


def test_a_build_that_goes_on_does_so_in_its_own_run(store: MlflowStore) -> None:
    def stopped() -> None:
        with _tracking(store) as tracking, tracking.step("train_c", "stage_c", "abc", build="b1") as run:
            run.metrics({"stage_c/loss": 3.0, "hours/so_far": 0.1}, 1)
            run.metrics({"stage_c/loss": 2.0, "hours/so_far": 0.3}, 3)
            raise Interrupted(signal.SIGINT)

    with pytest.raises(Interrupted):
        stopped()
    with _tracking(store) as tracking, tracking.step("train_c", "stage_c", "abc", build="b1") as run:
        run.metrics({"stage_c/loss": 2.5, "hours/so_far": 0.4}, 2)  # which the one before did not come to record
        run.metrics({"stage_c/loss": 2.0, "hours/so_far": 0.5}, 3)  # done again
        run.metrics({"stage_c/loss": 1.0, "hours/so_far": 0.6}, 4)
    client, experiment = connect(store, "wuerstchen")
    (child,) = client.search_runs([experiment], "tags.`wst.step` = 'train_c'")
    curves = {"stage_c/loss": {1: 3.0, 2: 2.5, 3: 2.0, 4: 1.0}, "hours/so_far": {1: 0.1, 2: 0.4, 3: 0.3, 4: 0.6}}
    for name, curve in curves.items():
        points = client.get_metric_history(child.info.run_id, name)
        assert sorted((point.step, point.value) for point in points) == list(curve.items())
    assert (child.info.status, child.data.tags.get("wst.end_reason")) == ("FINISHED", None)
    newest = client.search_runs([experiment], "tags.`wst.kind` = 'pipeline'", order_by=["start_time DESC"])[0]
    assert child.data.tags["mlflow.parentRunId"] == newest.info.run_id
    assert tracking.warnings == []


def test_a_step_shows_what_it_reads_and_a_command_what_was_typed(store: MlflowStore) -> None:
    settings = {"stage_c": {"train": {"lr": 1e-4}, "text": "clip_h", "token": "canary-4"}}
    with _tracking(store) as tracking, tracking.step("train_c", "stage_c", "abc", settings=settings) as run:
        run.reads({"latents_c": Artifact("latents_c", "/root/latents_c", MANIFEST)})
        run.reads({"stage_b": Artifact("stage_b", "/root/stage_b", MANIFEST)})  # a model
        run.describe("what became of it")
        tracking.describe(
            "**it went well** [train_c](run:stage_c), [sample](run:samples)", {"retrieval_top1 of 64": 1.0}
        )
    runs = _runs(store)
    child, parent = runs[CHILD], runs[PARENT]
    assert child.data.params == {"stage_c.train.lr": "0.0001", "stage_c.text": "clip_h", "stage_c.token": "***"}
    (read,) = child.inputs.dataset_inputs
    assert (read.dataset.name, read.dataset.digest) == ("latents_c", "c0ffee")
    assert child.data.tags["mlflow.note.content"] == "what became of it"
    assert (parent.data.tags["mlflow.note.content"], parent.data.metrics["retrieval_top1 of 64"]) == (
        f"**it went well** [train_c](#/experiments/{child.info.experiment_id}/runs/{child.info.run_id}), sample",
        1.0,
    )
    assert tracking.warnings == []


def test_two_runs_that_make_one_dataset_at_once_both_have_read_it(store: MlflowStore) -> None:
    client, experiment = connect(store, "wuerstchen")
    other = client.create_run(experiment).info.run_id
    dataset = Dataset("latents_c", "c0ffee", "artifact", "/root/latents_c")
    with _tracking(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        assert tracking.flush(60)  # nothing but the dataset is written from here on

        def between(*_: object) -> None:
            client.log_inputs(other, [DatasetInput(dataset, [])])

        event.listen(Session, "before_flush", between, once=True)  # after the look whether the dataset is there
        run.reads({"latents_c": Artifact("latents_c", "/root/latents_c", MANIFEST)})
        assert tracking.flush(60)
    assert tracking.warnings == []
    read = [client.get_run(run_id).inputs.dataset_inputs for run_id in (other, _runs(store)[CHILD].info.run_id)]
    assert [(found.dataset.name, found.dataset.digest) for (found,) in read] == [("latents_c", "c0ffee")] * 2


def test_a_release_is_a_version_of_the_one_model_and_only_once(store: MlflowStore) -> None:
    for content in ("one", "two", "two"):
        with _tracking(store) as tracking, tracking.step("export", "release", "abc") as run:
            run.release(
                Artifact("release", "/root/release", {**MANIFEST, "content": content}),
                "---\nlicense: x\n---\n\n# The card\n\nIt draws.\n\n## Use\n",
            )
        assert tracking.warnings == []
    client, _ = connect(store, "wuerstchen")
    versions = client.search_model_versions("name='wuerstchen'")
    assert sorted((version.tags["wst.content"], version.description) for version in versions) == [
        ("one", "It draws.\n\n## Use\n"),
        ("two", "It draws.\n\n## Use\n"),
    ]
    (newest,) = client.get_latest_versions("wuerstchen")
    assert newest.tags["wst.content"] == "two"


def test_a_step_is_one_point_though_its_record_was_on_its_way_when_its_process_was_killed(store: MlflowStore) -> None:
    """All that the dead one had recorded is sent again first: its start, what MLflow has, and what it has not yet."""
    recorder = Recorder(store, "wuerstchen")
    start: dict[str, Any] = {"kind": "start", "run": "a", "name": "a", "parent": "", "tags": {}, "time": 1}

    def steps(first: int, last: int, time: int) -> dict[str, Any]:
        return {"kind": "metrics", "run": "a", "rows": [("loss", 1.0, step, time) for step in range(first, last)]}

    recorder([start, steps(1, 5, 1)])
    after = Recorder(store, "wuerstchen")
    after([start, steps(1, 8, 1), start, steps(5, 10, 2)])
    client, _ = connect(store, "wuerstchen")
    points = client.get_metric_history(next(iter(_runs(store).values())).info.run_id, "loss")
    assert sorted((point.step, point.timestamp) for point in points) == [*((n, 1) for n in range(1, 8)), (8, 2), (9, 2)]


def test_the_hours_are_those_of_the_ledger_and_can_be_made_anew(store: MlflowStore) -> None:
    root = str(store.database.parent.parent)
    with (
        _tracking(store) as tracking,
        tracking.step("train_c", "stage_c", "abc", build="b1"),
        Writer(root, "20261121-1").lease("train_c", "abc", 4, "cpu", About(build="b1")),
    ):
        pass
    total = totals(root).steps["train_c", "abc"].device_seconds / 3600
    assert total > 0
    assert [_runs(store)[name].data.metrics["hours/total"] for name in (PARENT, CHILD)] == [total, total]
    client, _ = connect(store, "wuerstchen")
    client.log_metric(_runs(store)[CHILD].info.run_id, "hours/total", 99.0)
    client.log_metric(_runs(store)[CHILD].info.run_id, "hours/saving", 99.0)
    assert rebuild_hours(store, "wuerstchen", root) == 2
    metrics = _runs(store)[CHILD].data.metrics
    assert (metrics["hours/total"], metrics["hours/saving"]) == (total, 0.0)
    with sqlite3.connect(store.database) as database:  # as `mlflow gc` deletes a run for good; its children stay
        for table in ("tags", "params", "metrics", "latest_metrics", "runs"):
            database.execute(f"delete from {table} where run_uuid = ?", [_runs(store)[PARENT].info.run_id])
    assert rebuild_hours(store, "wuerstchen", root) == 1


def test_the_records_of_a_deleted_experiment_wait_until_it_is_back(
    store: MlflowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tracking.mlflow_runs.END_PATIENCE_S", 20)
    client, experiment = connect(store, "wuerstchen")
    client.delete_experiment(experiment)
    with _tracking(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        run.metrics({"loss": 1.0}, step=1)
    (warning,) = tracking.warnings
    assert f"mlflow experiments restore --experiment-id {experiment}" in warning
    assert "or choose another with tracking.experiment=" in warning
    client.restore_experiment(experiment)
    assert "has taken what earlier runs could not send" in (send_unsent(store, "wuerstchen", "/nowhere") or "")
    assert _runs(store)[CHILD].data.metrics == {"loss": 1.0}


def test_an_experiment_that_is_deleted_meanwhile_loses_nothing(
    store: MlflowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tracking.mlflow_runs.END_PATIENCE_S", 20)
    with _tracking(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        assert tracking.flush(60)
        client, experiment = connect(store, "wuerstchen")
        client.delete_experiment(experiment)
        run.metrics({"loss": 1.0}, step=1)
    assert "restore --experiment-id" in tracking.warnings[0]
    client.restore_experiment(experiment)
    send_unsent(store, "wuerstchen", "/nowhere")
    assert _runs(store)[CHILD].data.metrics == {"loss": 1.0}


def _python(program: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_runs_of_a_killed_process_are_ended_by_the_next(store: MlflowStore) -> None:
    program = """
        import sys
        from pipeline.tracking.mlflow_store import locate_store
        from pipeline.tracking.mlflow_runs import Tracking
        tracking = Tracking(locate_store(sys.argv[1], None), "wuerstchen", conf="lost", targets=[],
                            invocation="1", fingerprints={}, config={})
        with tracking, tracking.step("train_c", "stage_c", "abc"):
            tracking.flush(60)
            print("ready", flush=True)
            sys.stdin.read()
    """
    process = _python(program, str(store.database.parent.parent))
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    with _tracking(store) as tracking:
        assert tracking.flush(60)
        assert {run.info.status for run in _runs(store).values()} == {"RUNNING"}  # alive: left alone
    process.kill()
    process.communicate()
    with _tracking(store):
        pass
    runs = _runs(store)
    for name in ("lost · 1", CHILD):
        assert runs[name].info.status == "KILLED"
        assert runs[name].data.tags["wst.end_reason"] == "process died"
    assert runs[PARENT].info.status == "FINISHED"


def test_processes_may_create_the_store_together(tmp_path: Path) -> None:
    """MLflow alone fails here: each process runs the migrations and meets the others' half-made tables."""
    program = """
        import os, sys
        import mlflow.store.tracking.sqlalchemy_store
        from pipeline.tracking.mlflow_store import connect, locate_store
        children = []
        for _ in range(2):
            if (pid := os.fork()) == 0:
                connect(locate_store(sys.argv[1], None), "wuerstchen")
                os._exit(0)
            children.append(pid)
        sys.exit(sum(os.waitpid(pid, 0)[1] != 0 for pid in children))
    """
    assert _python(program, str(tmp_path)).wait() == 0
    client, experiment = connect(locate_store(str(tmp_path), None), "wuerstchen")
    assert client.get_experiment(experiment).artifact_location == f"{tmp_path}/mlflow/artifacts"


def _free_port() -> int:
    """A port below those that the system gives out, so that nobody gets it between two uses."""
    for port in range(20000 + os.getpid() % 10000, 32768):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    pytest.fail("no free port")


def test_the_ui_answers_once_and_ends_with_its_verb(store: MlflowStore) -> None:
    with _tracking(store):
        pass
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", _free_port()))
        port = probe.getsockname()[1]
        probe.listen()
        with pytest.raises(UsageError, match=f"port={port}: cannot be used"), serve_ui(store, port):
            pytest.fail("yielded a URL of somebody else's server")
    root = store.database.parent.parent
    verb = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "ui", f"root={root}", f"port={port}"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        assert verb.stderr is not None
        said = verb.stderr.readline()
        assert f"{url}/#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART" in said
        with serve_ui(store, 1) as open_already:  # whoever asks for another port gets the open one
            assert open_already == url
        with urllib.request.urlopen(url, timeout=30) as page:
            assert b"MLflow" in page.read()
        verb.terminate()
        assert verb.wait(60) == 0
    finally:
        verb.kill()
        verb.wait()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=30)


def test_the_ui_of_an_empty_root_is_refused(tmp_path: Path) -> None:
    empty = locate_store(str(tmp_path), None)
    with pytest.raises(UsageError, match=r"no MLflow store .*run something first"), serve_ui(empty, 5000):
        pytest.fail("served nothing")
    assert list(tmp_path.iterdir()) == []


def test_git_tags_tell_commit_branch_and_changes(tmp_path: Path) -> None:
    assert git_tags(tmp_path) == {}

    def git(*words: str) -> str:
        identity = ["-c", "user.name=Nobody", "-c", "user.email=nobody@example.invalid"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--initial-branch=topic")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--message=first")
    clean = git_tags(tmp_path)
    assert clean["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
    assert (clean["mlflow.source.git.branch"], clean["mlflow.source.git.dirty"]) == ("topic", "false")
    (tmp_path / "a-log").write_text("untracked")
    assert git_tags(tmp_path) == clean
    (tmp_path / "file").write_text("two")
    assert git_tags(tmp_path)["mlflow.source.git.dirty"] == "true"
