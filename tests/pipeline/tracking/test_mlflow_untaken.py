"""What MLflow does not take, for now or for good: it stops no run, and waits or is counted."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient, MlflowException

from pipeline.store.artifacts import Artifact
from pipeline.tracking.mlflow_records import Recorder
from pipeline.tracking.mlflow_runs import send_unsent
from pipeline.tracking.mlflow_store import MlflowStore, connect, locate_store
from pipeline.tracking.outbox import NotTaken
from tests.pipeline.tracking.tracked import (
    CHILD,
    MANIFEST,
    PARENT,
    runs_of,
    small_png,
    tracking_of,
)


def test_a_broken_store_does_not_stop_the_run(store: MlflowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.mlflow_runs.END_PATIENCE_S", 0.5)
    store.database.write_bytes(b"this is no database")
    with tracking_of(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        run.metrics({"loss": 1.0}, step=1)
    (warning,) = tracking.warnings
    assert "did not take 10 records" in warning
    assert "not a database" in warning
    (kept,) = store.unsent.rglob("*.jsonl")
    assert str(kept) in warning


def test_a_folder_that_cannot_be_made_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "mlflow").write_text("a file is in the way of the folder")
    unusable = locate_store(str(tmp_path), None)
    with tracking_of(unusable) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        run.metrics({"loss": 1.0}, step=1)
        run.finish(Artifact("stage_c", "/somewhere", MANIFEST))
    (warning,) = tracking.warnings
    assert "MLflow gets nothing of this run" in warning


def test_what_mlflow_never_takes_is_dropped_counted_and_holds_nothing_up(store: MlflowStore) -> None:
    with tracking_of(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        assert tracking.flush(60)
        client, experiment = connect(store, "wuerstchen")
        (child,) = client.search_runs([experiment], "tags.`wst.step` = 'train_c'")
        client.delete_run(child.info.run_id)
        run.metrics({"loss": 1.0}, step=1)
    assert runs_of(store)[PARENT].info.status == "FINISHED"
    (warning,) = tracking.warnings
    assert "refused 2 records for good" in warning  # the point, and the end of the run


def test_what_a_moved_root_could_not_send_is_sent_from_its_new_place(tmp_path: Path) -> None:
    """Also what a version has left that called the folder by the database's path."""
    store = locate_store(str(tmp_path / "before"), None)
    store.database.parent.mkdir(parents=True)
    store.database.write_bytes(b"damaged")
    with tracking_of(store):
        pass
    (kept,) = store.unsent.iterdir()
    kept.rename(store.unsent / hashlib.sha256(f"{store.uri} wuerstchen".encode()).hexdigest()[:12])
    store.database.unlink()
    assert "has taken what earlier runs could not send" in (send_unsent(store, "wuerstchen") or "")
    assert set(runs_of(store)) == {PARENT}
    store.database.write_bytes(b"damaged")
    with tracking_of(store):
        pass
    store.database.unlink()
    (tmp_path / "before").rename(tmp_path / "after")
    moved = locate_store(str(tmp_path / "after"), None)
    assert "has taken what earlier runs could not send" in (send_unsent(moved, "wuerstchen") or "")
    assert set(runs_of(moved)) == {PARENT}


def test_a_store_of_files_that_refuses_holds_up_no_figure(store: MlflowStore) -> None:
    """As that of a server whose bucket this user may not write to; the files follow once they may."""
    assert store.artifacts
    store.artifacts.write_text("a file is in the way of the folder")
    with tracking_of(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        for step in (1, 2):
            run.metrics({"loss": 1.0 / step}, step)
            run.image("panel", small_png(), step)
    (warning,) = tracking.warnings
    assert re.search(r"did not take 3 records \((config, )?image: (Not a directory|File exists)\)", warning)
    assert {name: run.info.status for name, run in runs_of(store).items()} == {PARENT: "FINISHED", CHILD: "FINISHED"}
    assert runs_of(store)[CHILD].data.metrics == {"loss": 0.5}
    assert runs_of(store)[PARENT].data.params["conf"]
    store.artifacts.unlink()
    assert "has taken what earlier runs could not send" in (send_unsent(store, "wuerstchen") or "")
    client, _ = connect(store, "wuerstchen")
    assert [file.path for file in client.list_artifacts(runs_of(store)[PARENT].info.run_id)] == ["config.yaml"]
    assert len(client.list_artifacts(runs_of(store)[CHILD].info.run_id, "images")) == 4
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
    image |= {"name": "panel", "png": base64.b64encode(small_png()).decode(), "step": 1}
    end["status"] = "FINISHED"
    recorder([start])
    monkeypatch.setattr(MlflowClient, "log_image", busy)
    with pytest.raises(NotTaken, match="image: database is locked") as aside:
        recorder([image, tags, metrics, image])
    assert aside.value.places == [0, 3]
    monkeypatch.setattr(MlflowClient, "set_terminated", busy)
    with pytest.raises(MlflowException, match="locked"):
        recorder([end, start])
    (run,) = runs_of(store).values()
    assert (run.info.status, run.data.metrics, run.data.tags["a"]) == ("RUNNING", {"loss": 1.0}, "b")


def test_records_of_another_version_are_dropped_counted_and_hold_nothing_up(store: MlflowStore) -> None:
    with tracking_of(store) as tracking:
        tracking.record("tags", run=tracking._parent)
        tracking.record("dreams", run=tracking._parent)
        tracking.record("end")
    assert runs_of(store)[PARENT].info.status == "FINISHED"
    (warning,) = tracking.warnings
    assert "refused 3 records for good" in warning


def test_the_records_of_a_deleted_experiment_wait_until_it_is_back(
    store: MlflowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tracking.mlflow_runs.END_PATIENCE_S", 20)
    client, experiment = connect(store, "wuerstchen")
    client.delete_experiment(experiment)
    with tracking_of(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        run.metrics({"loss": 1.0}, step=1)
    (warning,) = tracking.warnings
    assert f"mlflow experiments restore --experiment-id {experiment}" in warning
    assert "or choose another with tracking.experiment=" in warning
    client.restore_experiment(experiment)
    assert "has taken what earlier runs could not send" in (send_unsent(store, "wuerstchen", "/nowhere") or "")
    assert runs_of(store)[CHILD].data.metrics == {"loss": 1.0}


def test_an_experiment_that_is_deleted_meanwhile_loses_nothing(
    store: MlflowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tracking.mlflow_runs.END_PATIENCE_S", 20)
    with tracking_of(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        assert tracking.flush(60)
        client, experiment = connect(store, "wuerstchen")
        client.delete_experiment(experiment)
        run.metrics({"loss": 1.0}, step=1)
    assert "restore --experiment-id" in tracking.warnings[0]
    client.restore_experiment(experiment)
    send_unsent(store, "wuerstchen", "/nowhere")
    assert runs_of(store)[CHILD].data.metrics == {"loss": 1.0}
