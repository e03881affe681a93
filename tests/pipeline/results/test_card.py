"""What a card says is what is known: each stage's own devices, what was trained on, and no more of memory than was
measured."""

from pathlib import Path
from typing import Any

from pipeline.results import card
from pipeline.results.document import document
from pipeline.results.subject import of_artifacts
from tests.experiment import SKIPPED, Experiment, experiment


def told(of: Experiment, name: str = "scores") -> dict[str, Any]:
    return document(of_artifacts({name: of.artifacts[name]}))[0]


def test_each_training_has_its_own_device_and_pictures(tmp_path: Path) -> None:
    found = told(experiment(tmp_path))
    hours = card.cost(found)
    assert hours[0].startswith("train_a: ")
    assert hours[0].endswith("(on cpu).")
    assert hours[1].endswith("(on cuda:NVIDIA A100).")
    assert "cpu-hours" in hours[2]
    assert "A100-hours" in hours[2]
    assert card.trained_on(found) == [
        "Pictures that were trained on: Stage A 14, Stage C 8.",
        "2 pictures were held out of all trainings.",
    ]


def test_what_a_training_left_out_is_told(tmp_path: Path) -> None:
    of = Experiment(tmp_path)
    of.data(SKIPPED)
    said = card.trained_on(told(of, "stage_c"))
    assert said[1] == "Left out of the training of Stage C: 2 bad steps, 4 pictures."


def test_memory_is_claimed_where_it_was_measured_alone(tmp_path: Path) -> None:
    of = experiment(tmp_path)
    said = card.limitations(told(of), random_text=True, existing=False)
    assert said[0].startswith("Its text tower has random weights")
    assert said[1] == "Stage C has seen 8 pictures and no other, in 4 steps."
    assert said[2].startswith("It knows them by heart")
    assert "Of 3 captions of pictures that no training saw, 1 picture is" in said[3]
    unscored = card.limitations(told(of, "stage_c"), random_text=False, existing=False)
    assert unscored == ["Stage C has seen 8 pictures and no other, in 4 steps."]
    assert card.limitations(told(of, "stage_c"), random_text=False, existing=True) == []


def test_scores_have_their_n_and_what_chance_gives(tmp_path: Path) -> None:
    found = {(name, of): (value, n) for name, value, n, of in card.scores(told(experiment(tmp_path)))}
    assert found["retrieval_top1", "training"] == (1.0, 3)
    assert found["psnr: share of wins over baseline", "held_out"] == (2 / 3, 3)
    assert found["psnr: share of wins same model, other seed", "held_out"] == (0.5, 3)
    assert found["kd:1a2b3c4d", "held_out"] == (0.02, 3)
    assert found["kd:1a2b3c4d same model, other seed", "held_out"] == (0.0175, 3)
    assert ("fd:1a2b3c4d", "held_out") not in found  # of too few
    assert found["fd:1a2b3c4d", "coco"] == (9.125, 3)
    assert all(n == 3 for _, n in found.values())


def test_the_lineage_has_commit_and_content(tmp_path: Path) -> None:
    of = experiment(tmp_path)
    (line,) = [line for line in card.lineage(told(of)) if line.startswith("Stage C")]
    assert of.artifacts["stage_c"].manifest["content"] in line
    assert "with changes" in line
