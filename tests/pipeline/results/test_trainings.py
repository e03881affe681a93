"""What a training came to, and what it left out."""

from pathlib import Path

from pipeline.results.document import document
from pipeline.results.subject import of_artifacts
from pipeline.results.trainings import left_out
from tests.experiment import SKIPPED, Experiment


def test_bad_steps_are_told_in_words() -> None:
    assert left_out({"stage_c/bad_steps": 0.0, "stage_c/images_left_out": 0.0, "other": 1.0}) == {}
    assert left_out({"compressor/bad_steps": 1.0, "compressor/images_left_out": 4096.0, "stage_b/bad_steps": 2.0}) == {
        "compressor": "1 bad step, 4,096 pictures",
        "stage_b": "2 bad steps",  # built before its pictures were counted
    }


def test_what_was_left_out_counts_as_not_seen(tmp_path: Path) -> None:
    of = Experiment(tmp_path)
    of.data(SKIPPED)
    told, _ = document(of_artifacts(of.artifacts))
    rows = {row["name"]: row for row in told["trainings"]}
    assert (rows["stage_c"]["left_out"], rows["stage_c"]["pictures_seen"]) == ("2 bad steps, 4 pictures", 4.0)
    assert (rows["stage_c"]["final"]["bad_steps"], rows["stage_c"]["final"]["images_left_out"]) == (2.0, 4.0)
    assert rows["stage_a"]["left_out"] is None
