"""What plan says of ranks that read the same shards."""

import pytest

from pipeline.plan import lanes
from pipeline.plan.dag import Planned
from pipeline.plan.wanted import planned_steps
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.settings.selection import Selection
from pipeline.store.artifacts import Look


def planned(config: Config, tmp_path: object) -> list[Planned]:
    return planned_steps(config, Look(str(tmp_path)), Selection())


def remarks(tmp_path: object, *words: str) -> list[str]:
    config = compose.load("stage_c", list(words))
    return list(lanes.remarks(planned(config, tmp_path), config))


@pytest.mark.parametrize("words", [("scale=micro",), ("scale=micro", "workers=1")])
def test_one_worker_reads_everything_once(tmp_path, words):
    assert remarks(tmp_path, *words) == []


def test_workers_without_lanes_are_told_of_them(tmp_path):
    found = remarks(tmp_path, "scale=micro", "workers=2")
    assert (
        "train_c: 2 workers read 2 times the data in each pass, since samples come in 1 lane; "
        "stage_c.train.lanes=64 gives each its own"
    ) in found
    assert {sentence.partition(":")[0] for sentence in found} == {"train_a", "train_b", "train_c"}


def test_lanes_that_do_not_divide_all_batches_are_told_of(tmp_path):
    config = compose.load("stage_c", ["scale=micro", "workers=2", "stage_c.train.lanes=7"])
    (batch,) = {phase.batch_size for phase in config.trainings()["stage_c.train"].phases}
    assert batch % 7
    (found,) = [one for one in lanes.remarks(planned(config, tmp_path), config) if one.startswith("train_c")]
    assert found.endswith("7 are asked for (stage_c.train.lanes), but no more divide all batches")


def test_a_world_that_shares_lanes_is_told_of_one_that_does_not(tmp_path):
    found = [one for one in remarks(tmp_path, "scale=micro", "stage_c.train.lanes=2", "workers=4") if "train_c" in one]
    assert found == [
        "train_c: 4 workers read 2 times the data in each pass, since samples come in 2 lanes; "
        "stage_c.train.lanes=64 gives each its own, or workers=2"
    ]


def test_what_is_read_is_that_of_the_ranks_of_each_training(tmp_path):
    words = ["scale=micro", "workers=4", "stage_c.train.lanes=2", "stage_a.train.ranks=1"]
    found = {one.partition(":")[0] for one in remarks(tmp_path, *words, "stage_c.train.ranks=2")}
    assert found == {"train_b"}
    shared = remarks(tmp_path, "scale=micro", "workers=8", "stage_c.train.lanes=2", "stage_c.train.ranks=4")
    (found,) = [one for one in shared if "train_c" in one]
    assert found.endswith("stage_c.train.lanes=64 gives each its own, or stage_c.train.ranks=2")
