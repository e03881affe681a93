"""Runs by their records: found by the end of their ID, and what their commands mean."""

from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.plan.dag import order
from pipeline.plan.recorded import config_of, fingerprints, record
from pipeline.plan.table import table
from pipeline.plan.wanted import prints_of
from pipeline.settings import compose
from pipeline.store.artifacts import Look
from tests.experiment import BEFORE, RUN, Experiment

WORDS = ["scale=micro", "stage_c.train.learning_rate=0.001"]


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


def test_a_command_gives_its_config_unless_it_means_another_today(tmp_path: Path) -> None:
    config = compose.load("stage_c", WORDS)
    steps = order(table(config), config.targets)
    prints = {name: one.digest for name, one in prints_of(config, Look(str(tmp_path)), steps).items()}
    of = Experiment(tmp_path)
    of.record(command=f"python -m pipeline run conf=stage_c root={tmp_path} {' '.join(WORDS)}", fingerprints=prints)
    found = config_of(record(of.root, RUN), of.root)
    assert found is not None
    assert found.stage_c.train is not None
    assert found.stage_c.train.learning_rate == 0.001
    of.record(command="python -m pipeline run conf=stage_c scale=micro", fingerprints=prints)
    assert config_of(record(of.root, RUN), of.root) is None
    of.record(command="python -m pipeline run conf=gone", fingerprints=prints)
    assert config_of(record(of.root, RUN), of.root) is None


def test_old_records_tell_of_what_they_built(tmp_path: Path) -> None:
    of = Experiment(tmp_path)
    made = of.add("metadata", "fetch")
    of.record(fingerprints={})
    assert fingerprints(record(of.root, RUN)) == {"metadata": made.manifest["fingerprint"]}
