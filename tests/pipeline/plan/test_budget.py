"""What a plan would take: the paper's hours, of its schedule and speed; each rate says where it is from."""

from typing import Any

import pytest

from pipeline.plan import budget, cost
from pipeline.plan.wanted import planned_steps
from pipeline.settings import compose
from pipeline.settings.selection import Selection
from pipeline.store.artifacts import Artifact, Look
from pipeline.terminal import COLUMNS
from pipeline.verbs.plan import show_budget

PAPER = ["scale=paper", "cluster=a100x64", "workers=64", "data.metadata=x.parquet", "cluster.price_per_hour=2"]


def lines(words: list[str], made: list[Any] | None = None) -> list[budget.Line]:
    loaded = compose.load("stage_c", words)
    planned = planned_steps(loaded, Look("/nowhere"), Selection())
    return budget.lines(planned, cost.estimates(planned, loaded), loaded, made or [])


def test_the_papers_training_of_stage_c_takes_the_papers_hours():
    found = [line for line in lines(PAPER) if line.step == "train_c"]
    assert len(found) == 4
    images = sum(line.images or 0 for line in found)
    hours = sum(line.hours or 0 for line in found)
    assert hours * 1_420_000_000 / images == pytest.approx(24_602, rel=0.01)  # the table's samples, at its speed
    assert {line.parameters for line in found} == {993_243_680}
    assert {line.basis for line in found} == {"conf"}
    assert sum(line.wall_h or 0 for line in found) == pytest.approx(hours / 64)
    assert sum(line.kg or 0 for line in found) == pytest.approx(hours * 0.25 * 0.37)
    assert sum(line.cost or 0 for line in found) == pytest.approx(2 * hours)


def test_a_training_of_fewer_ranks_takes_as_many_device_hours_and_more_of_a_clock():
    (few,), (every,) = (
        [line for line in lines([*PAPER, word]) if line.step == "train_a"]
        for word in ("stage_a.train.ranks=8", "stage_a.train.ranks=null")
    )
    assert few.hours == every.hours == pytest.approx(8 * (few.wall_h or 0)) == pytest.approx(64 * (every.wall_h or 0))
    assert (few.rank_bytes or 0) > (every.rank_bytes or 0)


def test_the_whole_budget_is_on_one_screen(capsys):
    found = lines(PAPER)
    show_budget(found)
    said = capsys.readouterr().out.splitlines()
    assert max(map(len, said)) <= COLUMNS
    assert len(said) == 1 + 1 + len(found) + 1 + 1  # an empty line, the columns, the lines, the total, the rates
    assert budget.total(found).hours == pytest.approx(sum(line.hours or 0 for line in found))


def test_what_this_root_has_trained_says_how_fast_it_is():
    told = {"step": "train_c", "metrics": {"model_flops": 3.6e15}, "device_seconds": 36.0, "devices": "cuda:H200"}
    own: Any = Artifact("stage_c", "", told)
    found = [line for line in lines(PAPER, [own]) if line.step == "train_c"]
    assert {line.basis for line in found} == {"root, cuda:H200"}
    flops = sum((line.flops or 0) * (line.images or 0) for line in found)
    assert sum(line.hours or 0 for line in found) == pytest.approx(flops / 1e14 / 3600)
    cpu: Any = Artifact("stage_c", "", {**told, "devices": "cpu"})  # of another kind than cluster.device
    assert {line.basis for line in lines(PAPER, [cpu]) if line.step == "train_c"} == {"conf"}


@pytest.mark.parametrize(("words", "told"), [(["scale=micro"], False), ([*PAPER, "targets=[latents_a]"], True)])
def test_what_an_a100_would_take_is_no_prediction_for_any_machine(words, told):
    assert (budget.BY_A100 not in {line.basis for line in lines(words)}) is told
    loaded = compose.load("stage_c", words)
    predicted = budget.predicted(planned_steps(loaded, Look("/nowhere"), Selection()), loaded, [])
    assert (predicted is not None) is told
    assert predicted == (pytest.approx(budget.total(lines(words)).hours) if told else None)
