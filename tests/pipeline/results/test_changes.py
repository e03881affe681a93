"""The config beside that of the run before: whole where records have it, else by what was built."""

from pathlib import Path

from pipeline.plan.recorded import record, records
from pipeline.results import changes
from pipeline.results.subject import of_prints
from tests.experiment import RUN, Experiment

SAME, OTHER = "20251231-000000-9f9f", "20251230-000000-8e8e"


def section(of: Experiment) -> dict:
    ours = record(of.root, RUN)
    earlier = tuple(one for one in reversed(records(of.root)) if one["id"] < ours["id"])
    found = changes.section(of_prints(of.root, "stage_c", {}, record=ours, earlier=earlier))
    assert found is not None
    return found


def test_runs_of_the_same_config_are_passed_over_and_counted(tmp_path: Path) -> None:
    of = Experiment(tmp_path)
    of.record(OTHER, config={"seed": 1, "gone": True})
    of.record(SAME, config={"seed": 0, "new": {"key": None}})
    of.record(config={"seed": 0, "new": {"key": None}})
    found = section(of)
    assert (found["before"]["id"], found["same"], found["whole"]) == (OTHER, 1, True)
    assert found["changes"] == [
        {"key": "gone", "before": True, "now": "not there"},
        {"key": "new.key", "before": "not there", "now": None},
        {"key": "seed", "before": 1, "now": 0},
    ]


def test_of_old_records_what_both_have_built_is_compared(tmp_path: Path) -> None:
    """Their artifacts' settings: of what only one of them knows, nothing is said."""
    of = Experiment(tmp_path)
    of.add("metadata", "fetch", settings={"seed": 0, "data": {"limit": 8}})
    of.record(SAME)
    of.add("metadata", "fetch", settings={"seed": 0, "data": {"limit": 16}})
    of.add("images", "download", ("metadata",), settings={"size": 128})
    of.record()
    found = section(of)
    assert found["changes"] == [{"key": "data.limit", "before": 8, "now": 16}]
    assert not found["whole"]


def test_the_first_run_has_none_before(tmp_path: Path) -> None:
    of = Experiment(tmp_path)
    of.record()
    assert changes.section(of_prints(of.root, "stage_c", {}, record=record(of.root, RUN))) is None
