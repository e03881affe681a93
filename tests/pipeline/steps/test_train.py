"""Trainings: what they catch up on, when they count as finished, and that a lost claim publishes nothing."""

import json
from dataclasses import replace

import pytest

from datasets.files import storage
from datasets.files.fence import unfenced
from pipeline.cluster.ranks.job import Job
from pipeline.cluster.ranks.rank import Rank
from pipeline.cluster.ranks.training_files import log_of, result
from pipeline.errors import ClaimLost
from pipeline.steps import train
from tests.pipeline.in_process import Root


def test_what_was_logged_after_the_driver_was_killed_is_caught_up_on_once(tmp_path):
    root = Root(tmp_path, "stage_c.train.log_every=1")
    build = root.build("stage_c")
    build.interruptions.reached["stage_c"] = 9
    for saved in (8, 10, 12):
        log = {step: {"stage_c/loss": step / 10} for step in (saved - 1, saved)}
        storage.publish(json.dumps(log).encode(), storage.join(log_of(build.building, "stage_c"), f"{saved}.json"))
    train._catch_up(build)
    train._catch_up(build)
    assert root.report.logged == [(step, {"stage_c/loss": step / 10}) for step in (10, 11, 12)]
    assert build.interruptions.resumed("stage_c", 12) == 0


def test_a_training_counts_as_finished_while_the_files_are_there_that_it_says_it_has_published(tmp_path):
    """A deletion may have been killed after some of them: it goes on from its last checkpoint."""
    root = Root(tmp_path)
    build = root.build("stage_c")
    assert train._published(build) is None
    files = {"stage_c.safetensors": vars(storage.publish(b"weights", f"{build.path}/stage_c.safetensors"))}
    told = {"files": files, "rows": 1, "pids": [1], "metrics": {}}
    storage.publish(json.dumps(told).encode(), f"{build.path}/building/result.json")
    assert train._published(build) == told == result(build.path)
    assert root.report.warnings == []
    storage.publish(b"cut", f"{build.path}/stage_c.safetensors")
    assert train._published(build) is None
    assert result(build.path) is None
    (warning,) = root.report.warnings
    assert "1 of 1 files in" in warning
    assert "are missing or cut short: stage_c.safetensors; it goes on from its last checkpoint" in warning


def test_a_rank_whose_run_has_lost_its_claim_publishes_nothing(tmp_path):
    def closed() -> None:
        raise ClaimLost("gone")

    one = object.__new__(Rank)
    one.job = Job(str(tmp_path), "", closed, "", seed=0, stall_s=60.0, flops={}, bytes={})
    one.rank, one.files, one.metrics, one.pids = 0, {}, {}, [1]
    with pytest.raises(ClaimLost):
        one.publish("stage_c.safetensors", lambda: b"weights")
    with pytest.raises(ClaimLost):
        one.finish(rows=1)
    assert storage.listing(str(tmp_path)) == []
    one.job = replace(one.job, fence=unfenced)
    one.publish("stage_c.safetensors", lambda: b"weights")
    one.finish(rows=1)
    assert storage.listing(str(tmp_path)) == ["building/result.json", "stage_c.safetensors"]
