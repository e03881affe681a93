"""Tracking against real MLflow on sqlite; and its UI."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.entities import Dataset, DatasetInput
from PIL import Image
from sqlalchemy import event
from sqlalchemy.orm import Session

from pipeline.errors import Interrupted, UsageError
from pipeline.hours.spent import totals
from pipeline.store.artifacts import Artifact
from pipeline.store.ledger import About, Writer
from pipeline.tracking.mlflow_records import Recorder
from pipeline.tracking.mlflow_runs import git_tags, rebuild_hours
from pipeline.tracking.mlflow_store import MlflowStore, connect, locate_store
from tests.pipeline.tracking.tracked import CHILD, MANIFEST, PARENT, PIXELS, points_of, runs_of, small_png, tracking_of


def test_each_step_is_a_child_of_the_invocation(store: MlflowStore) -> None:
    with tracking_of(store) as tracking:
        with tracking.step("train_c", "stage_c", "abc"):
            assert tracking.flush(60)
            assert {run.info.status for run in runs_of(store).values()} == {"RUNNING"}
        for output in ("samples", "samples_held_out"):  # of one fingerprint
            with tracking.step("sample", output, "def", label=output):
                pass
    runs = runs_of(store)
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
    with tracking_of(store) as tracking:
        tracking.describe(told, {})
        with tracking.step("train_c", told, "abc") as run:
            run.reads({"images": Artifact("images", told, MANIFEST)})
            run.describe(told)
    run = runs_of(store)[PARENT]
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
    with tracking_of(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        for step in range(1200):  # more than MLflow takes in one batch
            run.metrics({"loss": 1 / (step + 1), "mfu(%)": 50.0}, step)
        for step in range(1190, 1210):  # a worker that was restarted does some steps again
            run.metrics({"loss": 1 / (step + 1)}, step)
    points = points_of(store, "loss")
    assert [step for step, _ in points] == list(range(1210))
    assert points[3] == (3, 0.25)
    assert len(points_of(store, "mfu___")) == 1200
    assert tracking.warnings == []


def test_pictures_of_one_name_are_a_series(store: MlflowStore) -> None:
    with tracking_of(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        run.image("samples/panel", small_png(), step=10)
        run.image("samples/panel", small_png(), step=20)
    assert store.artifacts
    files = sorted(store.artifacts.rglob("images/*.png"))
    assert ["+step+10+" in files[0].name, "+step+20+" in files[1].name, len(files)] == [True, True, 2]
    np.testing.assert_array_equal(np.asarray(Image.open(files[0])), PIXELS)
    assert tracking.warnings == []


def test_a_finished_artifact_shows_its_manifest(store: MlflowStore) -> None:
    with tracking_of(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        run.metrics({"loss": 1.0}, step=9)
        run.finish(Artifact("stage_c", "/root/artifacts/stage_c/abc", MANIFEST))
    data = runs_of(store)[CHILD].data
    assert data.metrics == {"loss": 1.0}  # of the curve; what the manifest repeats of it is no chart of its own
    assert (data.tags["wst.rows"], data.tags["wst.attempts"]) == ("64", "2")
    assert (data.tags["wst.artifact"], data.tags["wst.content"]) == ("/root/artifacts/stage_c/abc", "c0ffee")
    assert tracking.warnings == []


@pytest.mark.parametrize("described", [False, True])
def test_a_run_that_fails_before_it_is_described_says_why(store: MlflowStore, described: bool) -> None:
    def fail() -> None:
        with tracking_of(store) as tracking:
            if described:
                tracking.describe("**its card**", {})
            raise UsageError("Ray did not start:\n  the machine is busy; token=canary-4")

    with pytest.raises(UsageError):
        fail()
    note = runs_of(store)[PARENT].data.tags["mlflow.note.content"]
    assert note == ("**its card**" if described else "**Ray did not start: the machine is busy; token=***")


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("no"), "FAILED"), (Interrupted(signal.SIGINT), "KILLED"), (KeyboardInterrupt(), "KILLED")],
)
def test_how_a_run_ended_is_recorded(store: MlflowStore, error: BaseException, status: str) -> None:
    def fail() -> None:
        with tracking_of(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
            run.metrics({"loss": 1.0}, step=1)
            raise error

    with pytest.raises(type(error)):
        fail()
    runs = runs_of(store)
    assert {run.info.status for run in runs.values()} == {status}
    reason = "stopped on request" if status == "KILLED" else None
    assert {run.data.tags.get("wst.end_reason") for run in runs.values()} == {reason}
    assert runs[CHILD].data.metrics == {"loss": 1.0}


def test_a_build_that_goes_on_does_so_in_its_own_run(store: MlflowStore) -> None:
    def stopped() -> None:
        with tracking_of(store) as tracking, tracking.step("train_c", "stage_c", "abc", build="b1") as run:
            run.metrics({"stage_c/loss": 3.0, "hours/so_far": 0.1}, 1)
            run.metrics({"stage_c/loss": 2.0, "hours/so_far": 0.3}, 3)
            raise Interrupted(signal.SIGINT)

    with pytest.raises(Interrupted):
        stopped()
    with tracking_of(store) as tracking, tracking.step("train_c", "stage_c", "abc", build="b1") as run:
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
    with tracking_of(store) as tracking, tracking.step("train_c", "stage_c", "abc", settings=settings) as run:
        run.reads({"latents_c": Artifact("latents_c", "/root/latents_c", MANIFEST)})
        run.reads({"stage_b": Artifact("stage_b", "/root/stage_b", MANIFEST)})  # a model
        run.describe("what became of it")
        tracking.describe(
            "**it went well** [train_c](run:stage_c), [sample](run:samples)", {"retrieval_top1 of 64": 1.0}
        )
    runs = runs_of(store)
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
    with tracking_of(store) as tracking, tracking.step("train_c", "stage_c", "abc") as run:
        assert tracking.flush(60)  # nothing but the dataset is written from here on

        def between(*_: object) -> None:
            client.log_inputs(other, [DatasetInput(dataset, [])])

        event.listen(Session, "before_flush", between, once=True)  # after the look whether the dataset is there
        run.reads({"latents_c": Artifact("latents_c", "/root/latents_c", MANIFEST)})
        assert tracking.flush(60)
    assert tracking.warnings == []
    read = [client.get_run(run_id).inputs.dataset_inputs for run_id in (other, runs_of(store)[CHILD].info.run_id)]
    assert [(found.dataset.name, found.dataset.digest) for (found,) in read] == [("latents_c", "c0ffee")] * 2


def test_a_release_is_a_version_of_the_one_model_and_only_once(store: MlflowStore) -> None:
    for content in ("one", "two", "two"):
        with tracking_of(store) as tracking, tracking.step("export", "release", "abc") as run:
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
    points = client.get_metric_history(next(iter(runs_of(store).values())).info.run_id, "loss")
    assert sorted((point.step, point.timestamp) for point in points) == [*((n, 1) for n in range(1, 8)), (8, 2), (9, 2)]


def test_the_hours_are_those_of_the_ledger_and_can_be_made_anew(store: MlflowStore) -> None:
    root = str(store.database.parent.parent)
    with (
        tracking_of(store) as tracking,
        tracking.step("train_c", "stage_c", "abc", build="b1"),
        Writer(root, "20261121-1").lease("train_c", "abc", 4, "cpu", About(build="b1")),
    ):
        pass
    total = totals(root).steps["train_c", "abc"].device_seconds / 3600
    assert total > 0
    assert [runs_of(store)[name].data.metrics["hours/total"] for name in (PARENT, CHILD)] == [total, total]
    client, _ = connect(store, "wuerstchen")
    client.log_metric(runs_of(store)[CHILD].info.run_id, "hours/total", 99.0)
    client.log_metric(runs_of(store)[CHILD].info.run_id, "hours/saving", 99.0)
    assert rebuild_hours(store, "wuerstchen", root) == 2
    metrics = runs_of(store)[CHILD].data.metrics
    assert (metrics["hours/total"], metrics["hours/saving"]) == (total, 0.0)
    with sqlite3.connect(store.database) as database:  # as `mlflow gc` deletes a run for good; its children stay
        for table in ("tags", "params", "metrics", "latest_metrics", "runs"):
            database.execute(f"delete from {table} where run_uuid = ?", [runs_of(store)[PARENT].info.run_id])
    assert rebuild_hours(store, "wuerstchen", root) == 1


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
    with tracking_of(store) as tracking:
        assert tracking.flush(60)
        assert {run.info.status for run in runs_of(store).values()} == {"RUNNING"}  # alive: left alone
    process.kill()
    process.communicate()
    with tracking_of(store):
        pass
    runs = runs_of(store)
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
