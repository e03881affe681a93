"""Runs by their records: found by the end of their ID, whatever else lies beside them."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from datasets.files import notices
from pipeline.errors import UsageError
from pipeline.plan.recorded import record, records
from pipeline.store.readers import asked_for
from tests.experiment import BEFORE, RUN, Experiment

STEP = {"state": "running", "step": "train_c", "log": "l/r/x", "artifact": "a/b/c"}
PROGRESS = {"done": 1, "total": 2, "first": 0, "at": 1.0, "since": 0.0, "unit": "steps"}


def test_a_run_is_found_by_the_end_of_its_id(tmp_path: Path) -> None:
    of = Experiment(tmp_path)
    of.record()
    of.record(BEFORE)
    assert record(of.root, RUN)["id"] == record(of.root, "a1b2")["id"] == RUN
    with pytest.raises(
        UsageError, match=rf"run=00: .* has no run of that ID; the last runs: {RUN} \(stage_c\), {BEFORE}"
    ):
        record(of.root, "00")
    of.record(f"20260102-000000-{RUN[-4:]}")
    with pytest.raises(UsageError, match="run=a1b2: 2 of root"):
        record(of.root, "a1b2")
    with pytest.raises(UsageError, match="no run of that ID"):
        record(of.root, "")


@pytest.mark.parametrize("run", ["../stage_c", "*", f"{RUN}.json"])
def test_no_other_file_is_taken_for_a_run(tmp_path: Path, run: str) -> None:
    of = Experiment(tmp_path)
    of.record()
    (tmp_path / "stage_c.json").write_text("{}")
    with pytest.raises(UsageError, match="no run of that ID"):
        record(of.root, run)


def test_old_records_tell_of_what_they_built(tmp_path: Path) -> None:
    of = Experiment(tmp_path)
    made = of.add("metadata", "fetch")
    of.record(fingerprints={})
    assert asked_for(record(of.root, RUN)) == {"metadata": made.manifest["fingerprint"]}


@pytest.mark.parametrize(
    "wrong",
    [
        {"conf": ["stage_c"]},
        {"command": 5},
        {"fingerprints": ["stage_c"]},
        {"fingerprints": {"stage_c": 5}},
        {"outcome": None},
        {"process": 7},
        {"config": 5},
        {"started": "yesterday"},
        {"started": "2026-01-01T00:00:00"},
        {"steps": {"stage_c": {**STEP, "state": 5}}},
        {"steps": {"stage_c": {**STEP, "log": None}}},
        {"steps": {"stage_c": {**STEP, "progress": {**PROGRESS, "total": None}}}},
        {"steps": {"stage_c": {**STEP, "progress": "far"}}},
    ],
    ids=str,
)
def test_a_record_that_says_something_else_is_passed_over_by_whoever_reads_it(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    of, told = Experiment(tmp_path), list[notices.Notice]()
    of.record(BEFORE)
    of.record(**wrong)
    with notices.heard_by(told.append):
        assert [one["id"] for one in records(of.root)] == [BEFORE]
    assert f"{RUN}.json" in str(told)


def test_an_id_that_is_a_number_is_an_id_all_the_same(tmp_path: Path) -> None:
    of = Experiment(tmp_path)
    of.record(id=20260101)
    assert record(of.root, "20260101")["id"] == "20260101"


def test_somebodys_copy_of_a_record_is_no_other_run(tmp_path: Path) -> None:
    of = Experiment(tmp_path)
    of.record()
    shutil.copy(tmp_path / f"invocations/{RUN}.json", tmp_path / f"invocations/{RUN} (copy).json")
    assert len(records(of.root)) == 1
    assert record(of.root, "a1b2")["id"] == RUN
