"""What a run does around its steps: attempts, and refusals before anything exists."""

import contextlib
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ray.train.v2.api.exceptions import WorkerGroupError

from datasets.files import storage
from datasets.files.storage import CorruptFile
from pipeline.cluster.failures import cause
from pipeline.cluster.interruptions import Interruptions
from pipeline.errors import (
    ClaimLost,
    InfrastructureError,
    Interrupted,
    UsageError,
)
from pipeline.plan import obstacles
from pipeline.plan.dag import Planned
from pipeline.plan.wanted import planned_steps
from pipeline.run import building, invocation
from pipeline.run import step_log as step_log_module
from pipeline.run.last_screen import Summary
from pipeline.run.memory import PeakMemory
from pipeline.run.progress import StepProgress
from pipeline.run.record import Record
from pipeline.run.session import Session
from pipeline.run.step_log import StepReporter
from pipeline.run.stopping import Stop
from pipeline.run.writable import check_writable
from pipeline.settings import compose
from pipeline.settings.selection import Selection
from pipeline.store import claims
from pipeline.store.artifacts import Artifact, Look, Store
from pipeline.store.claims import Claim


@pytest.mark.parametrize("address", ["auto", "null"])
def test_a_ray_of_our_own_is_guarded_by_a_secret_and_another_keeps_its(address, tmp_path, monkeypatch):
    class BeginsNothing(Exception):
        pass

    def begins(*_: Any) -> None:
        raise BeginsNothing

    made: list[bool] = []
    monkeypatch.setattr(invocation, "private_ray", lambda: made.append(True))
    monkeypatch.setattr(invocation, "Session", begins)
    config = compose.load("stage_a", ["scale=micro", f"cluster.address={address}"])
    with pytest.raises(BeginsNothing):
        invocation.run(config, "stage_a", Look(str(tmp_path)), [], "run")
    assert made == [True] * (address == "null")


def test_what_a_run_wants_is_its_own_from_the_moment_that_it_is_at_work(tmp_path, monkeypatch):
    """Its record comes when Ray has started, which takes seconds in which somebody may delete."""

    class Begins(Exception):
        pass

    def at_work(root: str, run: str, reads: list[str]) -> None:
        raise Begins(*reads)

    monkeypatch.setattr(claims, "at_work", at_work)
    loaded, look = compose.load("stage_c", ["scale=micro"]), Look(str(tmp_path))
    planned = planned_steps(loaded, look, Selection())
    with pytest.raises(Begins) as caught:
        invocation.run(loaded, "stage_c", look, planned[-1:], "run")
    assert {look.path(item.step.output, item.fingerprint.digest) for item in planned} <= set(caught.value.args)


def test_a_loss_of_the_claim_comes_first_of_what_ranks_say():
    lost = ClaimLost("gone")
    failures = {0: InfrastructureError("another rank ended"), 1: lost, 2: ValueError("odd")}
    assert cause(WorkerGroupError("failed", failures)) is lost


def test_steps_done_again_are_counted_over_all_drivers_and_trainings(tmp_path):
    first = Interruptions.read(str(tmp_path))
    first.begun += 1
    assert first.resumed("compressor", 0) == 0
    first.reached |= {"compressor": 40}
    assert first.resumed("stage_b", 0) == 0
    first.reached |= {"stage_b": 17}
    first.write(str(tmp_path))

    second = Interruptions.read(str(tmp_path))
    second.begun += 1
    assert second.resumed("compressor", 40) == 0  # it was finished
    assert second.resumed("stage_b", 10) == 7
    assert second.resumed("stage_b", 10) == 0  # killed before it got anywhere
    assert second.metrics() == {"interruptions": 1, "preemptions": 0, "steps_again": 7}


LEAVES = """
import os, sys
import torch.distributed as dist
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=1, world_size=2)
os._exit(9)
"""


def test_a_rank_that_no_longer_reaches_another_is_tried_again(tmp_path):
    """Which of the two errors the driver hears of first is a matter of luck: the death, or what it does to others."""
    with subprocess.Popen([sys.executable, "-c", LEAVES, str(tmp_path / "meet")]):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=2)
        with pytest.raises(RuntimeError) as error:
            dist.all_reduce(torch.zeros(1))
        dist.destroy_process_group()
    assert isinstance(cause(error.value), InfrastructureError)
    assert not isinstance(cause(RuntimeError("a bug")), InfrastructureError)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (
            ["eval=pickscore", "eval.scorers.pickscore=none.safetensors", "eval.rivals.other=none"],
            "eval.scorers.pickscore",
        ),
        (
            ["stage_a.loss.perceptual=0.1", "stage_a.loss.perceptual_weights=none.pth"],
            "stage_a.loss.perceptual_weights",
        ),
    ],
)
def test_missing_weights_are_named_before_anything_is_created(tmp_path, words, key):
    loaded, look = compose.load("stage_c", ["scale=micro", *words]), Look(str(tmp_path / "root"))
    with pytest.raises(UsageError, match=f"{key}: there is nothing at"):
        invocation.run(loaded, "stage_c", look, planned_steps(loaded, look, Selection()), "")
    assert not (tmp_path / "root").exists()


def test_weights_that_change_while_a_run_is_at_work_are_not_built_from(tmp_path):
    """Each step looks again: hours may lie between the plan and a step, and the fingerprint tells of the old file."""
    file = tmp_path / "c.pt"
    file.write_bytes(b"planned")
    loaded = compose.load(
        "stage_c", ["scale=micro", f"stage_c.weights={file}", "stage_c.train=null", "targets=[stage_c]"]
    )
    (item,) = planned_steps(loaded, Look(str(tmp_path / "root")), Selection())
    building._check_unchanged(loaded, str(tmp_path / "root"), item)
    file.write_bytes(b"another")
    with pytest.raises(UsageError, match=r"stage_c.weights: content changed, .*, since this run began; start it again"):
        building._check_unchanged(loaded, str(tmp_path / "root"), item)


def test_a_batch_larger_than_what_is_left_to_train_on_is_refused_before_the_first_training(tmp_path, monkeypatch):
    """The config names 16 rows, of which 3 are held out: that is known hours before Stage C begins."""
    built: list[str] = []

    class Begun(Session):
        def __enter__(self) -> "Begun":
            self.artifacts, self.books = {}, SimpleNamespace(over_budget=lambda: False)  # type: ignore[assignment]
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def build(session: Session, item: Planned, position: str) -> None:
        name = item.step.output
        built.append(name)
        session.artifacts[name] = Artifact(name, "", {"rows": 3 if name == "held_out" else 16})

    monkeypatch.setattr(invocation, "private_ray", lambda: None)
    monkeypatch.setattr(invocation, "Session", Begun)
    monkeypatch.setattr(building, "build", build)
    words = ["scale=micro", "data.holdout=0.2", "stage_c.train.phases.0.batch_size=14"]
    loaded, look = compose.load("stage_c", words), Look(str(tmp_path))
    planned = planned_steps(loaded, look, Selection())
    with pytest.raises(UsageError, match=r"train_c: a batch of 14 .* at most 13 rows to train on; .*data.holdout"):
        invocation.run(loaded, "stage_c", look, planned, "run")
    assert {"metadata", "images", "held_out"} <= set(built)
    assert not any(name.startswith("stage_") for name in built)
    few = Artifact("images", "", {"rows": 13})
    again = [replace(item, artifact=few) if item.step.output == "images" else item for item in planned]
    assert not obstacles.too_large_batches(loaded, again, {"images": few})  # which are fetched anew, and may be more
    assert obstacles.too_large_batches(loaded, again[2:], {"images": few})
    built.clear()
    with pytest.raises(UsageError, match="at most 13 rows"):
        invocation.run(loaded, "stage_c", look, [item for item in planned if item.step.output != "stage_a"], "run")
    assert "stage_b" not in built


def step_log(folder: Path, build: Any) -> str:
    """The log of a step that `build(reporter)` is."""
    root = str(folder / "root")
    config = compose.load("stage_c", ["scale=micro", "targets=[metadata]"])
    planned = planned_steps(config, Look(root), Selection())
    session = Session(config, "stage_c", Look(root), planned, "", PeakMemory(), Summary(), Stop())
    session.id, session.store, session.record, session.artifacts = "1", Store(root), Record(root, {"id": "1"}), {}
    tracked = SimpleNamespace(metrics=lambda *_: None, image=lambda *_: None)

    def built(_: Session, item: Planned, claim: Claim, lines: Any, progress: StepProgress) -> Artifact:
        path = f"{root}/{claim.fence.what}"
        build(StepReporter(progress, tracked, session.summary.warnings))
        facts = {"step": "fetch", "rows": 1500, "metrics": {}, "device_seconds": 1.0, "attempts": 1}
        return Artifact("metadata", path, facts)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Interrupted, KeyError):
        patch.setattr(building, "_build_under_claim", built)
        building.build(session, planned[0], "[1/1]")
    return (folder / "root/logs/1/metadata.log").read_text()


def test_a_steps_log_tells_what_happened(tmp_path):
    def build(report: Any) -> None:
        for done in range(1, 1501):
            report.progress(done, 1500, "images")
        report.metrics({"stage_c/loss": 0.12345, "stage_c/learning_rate": 1e-4}, 40)
        report.warning("some were left out")

    lines = [line.split(" ", 2)[2] for line in step_log(tmp_path, build).splitlines()]
    assert re.fullmatch(r"INFO fetch begins \(never built here\): .*/metadata/\w+, fingerprint \w+", lines[0])
    assert lines[1:4] == [
        "INFO 1,500 of 1,500 images",
        "INFO step 40: stage_c/loss 0.1235, stage_c/learning_rate 0.0001",
        "WARNING some were left out",
    ]
    assert re.fullmatch(r"INFO fetch is done: 1,500 rows, \d+\.\d s", lines[4])
    assert len(lines) == 5


def test_a_long_steps_log_has_its_progress_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(step_log_module, "LOG_EVERY_S", -1.0)
    told = step_log(tmp_path, lambda report: [report.advance(100, 1500, "images") for _ in range(3)])
    assert [line[-19:] for line in told.splitlines()[1:4]] == [f"{n}00 of 1,500 images" for n in (1, 2, 3)]


def test_a_stop_on_request_is_one_line_of_the_log_and_an_error_has_its_trace(tmp_path):
    def stop(_: Any) -> None:
        raise Interrupted(signal.SIGINT)

    def fail(_: Any) -> None:
        raise KeyError("a bug")

    _, stopped = step_log(tmp_path / "stopped", stop).splitlines()
    assert stopped.endswith("INFO stopped on request: interrupted; the same command goes on from here")
    failed = step_log(tmp_path / "failed", fail)
    assert "ERROR the step ended with an error" in failed
    assert "KeyError: 'a bug'" in failed


def test_an_unwritable_root_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"root=.*cannot be written"):
        check_writable(str(tmp_path / "file" / "below"), "root")


@pytest.mark.parametrize("told", [True, False])
def test_a_step_stays_whose_inputs_were_built_anew_and_came_out_the_same(tmp_path, told):
    """Also one of which the flags leave out the inputs; manifests of before do not tell what they were made of."""
    loaded, root = compose.load("stage_c", ["scale=micro"]), str(tmp_path)
    store, planned = Store(root), planned_steps(loaded, Look(root), Selection(until="download"))

    def commit(item: Planned, content: bytes, inputs: dict[str, str]) -> Artifact:
        entry = storage.publish(content, f"{store.path(item.step.output, item.fingerprint.digest)}/file")
        facts = {"files": {"file": entry}, "timed": [], "rows": 1, "created": "2026-01-01", "seconds": 0.0}
        return store.commit(item.step.output, item.fingerprint, facts | ({"inputs": inputs} if told else {}))

    metadata = commit(planned[0], b"rows", {})
    commit(planned[1], b"pictures", {"metadata": metadata.manifest["content"]})
    again = planned_steps(loaded, Look(root), Selection(until="download", force=("fetch",)))
    assert again[1].state == "stale"
    session = Session(loaded, "stage_c", Look(root), again, "", PeakMemory(), Summary(), Stop())
    session.store = store
    assert building.came_out_the_same(session, again[1])
    assert not building.came_out_the_same(session, again[0]), "it is forced"
    commit(planned[0], b"other rows", {})
    assert not building.came_out_the_same(session, again[1])


def test_a_step_that_is_forced_stays_as_it_is_while_its_inputs_are_damaged(tmp_path):
    loaded, root = compose.load("stage_c", ["scale=micro"]), str(tmp_path)
    store, made = Store(root), {}
    for item in planned_steps(loaded, Look(root), Selection(until="download")):
        path = store.path(item.step.output, item.fingerprint.digest)
        facts = {"files": {"file": storage.publish(b"x", f"{path}/file")}, "timed": [], "rows": 1, "created": "2026"}
        made[item.step.output] = store.commit(item.step.output, item.fingerprint, facts)
    Path(made["metadata"].path, "file").unlink()
    planned = planned_steps(loaded, Look(root), Selection(only="download", force=("download",)))
    session = Session(loaded, "stage_c", Look(root), planned, "", PeakMemory(), Summary(), Stop())
    session.store = store
    with pytest.raises(
        CorruptFile, match=r"missing or cut short: file; `python -m pipeline data repair`, with the conf"
    ):
        building._build_under_claim(session, planned[0], Any, [], Any)
    assert Path(made["images"].path, "file").exists()


def ended(failing: list[str], error: Exception | None) -> tuple[list[str], BaseException | None]:
    """What of a session is ended, and what comes out, where some of it fails and the run itself ended so."""
    done: list[str] = []

    def end(name: str) -> None:
        done.append(name)
        if name in failing:
            raise OSError(f"{name} failed")

    session = object.__new__(Session)
    session.summary, session.exits = Summary(), contextlib.ExitStack()
    session.tracking = SimpleNamespace(warnings=["MLflow took nothing"])
    session.exits.push(session._warn)
    for name in ("MLflow", "Ray"):
        session.exits.callback(end, name)
    session.exits.push(session._end)
    session.record = SimpleNamespace(end=lambda _: end("record"))  # type: ignore[assignment]
    try:
        session.__exit__(type(error) if error else None, error, None)
    except OSError as raised:
        return done, raised
    assert session.summary.warnings == ["MLflow took nothing"]
    return done, None


@pytest.mark.parametrize("failing", [[], ["record"], ["Ray"], ["record", "Ray", "MLflow"]])
def test_the_end_of_a_run_ends_all_and_hides_no_error(failing, capsys):
    done, raised = ended(failing, ValueError("what went wrong"))
    assert sorted(done) == ["MLflow", "Ray", "record"]
    assert raised is None  # the run's own error goes on its way
    told = capsys.readouterr().err
    assert ("at the end of the run: " in told) == bool(failing)
    assert "warning: MLflow took nothing" in told  # no last screen tells it


def test_a_second_ctrl_c_at_the_end_of_a_run_ends_all_the_same():
    done: list[str] = []

    def impatient(_: object) -> None:
        raise KeyboardInterrupt

    session = object.__new__(Session)
    session.exits, session.record = contextlib.ExitStack(), SimpleNamespace(end=impatient)  # type: ignore[assignment]
    session.exits.callback(done.append, "Ray")
    session.exits.push(session._end)
    with pytest.raises(KeyboardInterrupt):
        session.__exit__(Interrupted, Interrupted(signal.SIGINT), None)
    assert done == ["Ray"]


def test_a_run_whose_end_fails_is_not_done():
    done, raised = ended(["record"], None)
    assert sorted(done) == ["MLflow", "Ray", "record"]
    assert str(raised) == "record failed"
