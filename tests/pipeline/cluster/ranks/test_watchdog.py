"""Stalls of a training: found and named within the configured time, by real ranks over gloo."""

import time
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.cluster import ray_cluster
from pipeline.cluster.ranks.checkpoints import Followed
from pipeline.cluster.ranks.watchdog import EXIT_STALLED, Pulses, Watchdog
from stages.draws import Draws
from stages.settings.training import TrainingConfig
from stages.state_dicts import Serialized
from stages.training import activity
from stages.training.activity import Activity
from stages.training.callbacks import Callbacks
from stages.training.loop import train
from tests.ranks import FORKED, start

STALL_S = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_who_is_behind_is_named_first() -> None:
    pulses = Pulses(Clock())
    for rank in range(11):
        assert pulses.beat(rank, 7, activity.BACKWARD, 9.0, 10.0) is None
    assert pulses.beat(4, 6, activity.READING, 9.9, 10.0) is None
    found = pulses.beat(4, 6, activity.READING, 10.1, 10.0)
    assert found == (
        "nothing went on for 10 s (cluster.stall_s): rank 4 after step 6: waiting for the batch; "
        "rank 0, 1, 2, 3, 5, 6, 7, 8 and 2 more after step 7: backward pass, and exchanging gradients"
    )
    assert pulses.beat(0, 8, activity.READING, 0.0, 10.0) == found  # all are told, and end
    assert pulses.stall == found


def test_ranks_that_wait_for_the_storage_do_not_stall() -> None:
    """Its patience (`cluster.patience_s`) may be as long as a stall, and ends by itself."""
    clock = Clock()
    pulses = Pulses(clock)
    for seconds in range(0, 100, 5):
        pulses.storage_fails()
        clock.now += 5
        assert pulses.beat(0, 3, activity.READING, seconds, 10.0) is None
        assert pulses.beat(1, 3, activity.BACKWARD, seconds, 10.0) is None
    clock.now += 6
    assert "rank 0 after step 3: waiting for the batch" in str(pulses.beat(0, 3, activity.READING, 106.0, 10.0))


def test_a_state_may_take_long_to_be_saved_as_long_as_that_gets_further() -> None:
    clock = Clock()
    pulses = Pulses(clock)
    for seconds in range(0, 100, 5):  # a piece arrives every five seconds
        clock.now += 5
        assert pulses.beat(0, 3, activity.SAVING, 4.0, 10.0) is None
        assert pulses.beat(1, 3, activity.COMPARING, seconds, 10.0) is None
    clock.now += 5
    assert pulses.beat(0, 3, activity.SAVING, 9.0, 10.0) is None
    clock.now += 2
    assert "rank 0 after step 3: saving the state" in str(pulses.beat(0, 3, activity.SAVING, 11.0, 10.0))


def test_each_piece_that_is_saved_is_a_sign_of_life() -> None:
    doing = Activity()
    doing.begin(3, activity.SAVING)
    for piece in Followed(Serialized({"a": torch.zeros(3)}).fill({"a": torch.zeros(3)}), doing.saves_more):
        assert len(piece)
        time.sleep(0.05)
        assert doing.now()[2] >= 0.05
    time.sleep(0.05)
    assert 0.05 <= doing.now()[2] < doing.seconds_in_all()[activity.SAVING] - 0.05  # of one piece, of all
    doing.begin(4, activity.READING)
    doing.saves_more()  # behind the steps
    time.sleep(0.05)
    assert doing.now()[2] >= 0.05


def test_a_rank_that_fell_silent_is_named() -> None:
    clock = Clock()
    pulses = Pulses(clock)
    assert pulses.beat(0, 3, activity.BACKWARD, 0.1, 10.0) is None
    clock.now += 11
    assert "rank 0 after step 3: backward pass, and exchanging gradients, and silent since" in str(
        pulses.beat(1, 3, activity.COMPARING, 1.0, 10.0)
    )


def test_a_rank_of_an_earlier_attempt_is_told_to_end_and_stalls_nobody() -> None:
    board = ray_cluster.Board()
    board.begin_job(1)
    assert board.beat(1, 5, 3, activity.FORWARD, 0.1, 10.0) is None
    board.begin_job(2)
    assert board.beat(1, 5, 3, activity.FORWARD, 99.0, 10.0) == "this attempt is over"  # its node was frozen
    assert board.beat(2, 0, 3, activity.FORWARD, 0.1, 10.0) is None
    assert board.stall() is None
    anew = ray_cluster.Board()  # as Ray starts it again elsewhere
    assert anew.beat(2, 0, 4, activity.FORWARD, 0.1, 10.0) is None
    assert "rank 0 after step 4" in str(anew.beat(2, 0, 4, activity.FORWARD, 11.0, 10.0))


def test_a_rank_that_rests_stalls_nobody() -> None:
    clock = Clock()
    pulses = Pulses(clock)
    pulses.beat(0, 12, activity.SAVING, 0.1, 10.0)
    pulses.rest(0)
    clock.now += 11
    assert pulses.beat(1, 0, "starting", 0.1, 10.0) is None


def test_the_watchdog_ends_with_its_training() -> None:
    pulses, ended = Pulses(), []
    with Watchdog(pulses, 0, Activity(), stall_s=0.05, end=ended.append) as dog:
        time.sleep(0.3)
    assert set(ended) == {EXIT_STALLED}
    assert "rank 0 after step 0: starting" in str(pulses.stall)
    assert not dog._thread.is_alive()


class Straggling(nn.Module):
    """Its second rank never comes to the exchange of gradients after step 3."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.rank = rank

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        if self.rank == 1 and draws.step == 3:
            time.sleep(3600)
        return self.net(batch["x"]).square().mean(), {}


class _Manager(BaseManager):
    pass


_Manager.register("pulses", Pulses)


def _rank(rank: int, folder: Path, pulses: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    callbacks = Callbacks()
    recipe = TrainingConfig.model_validate(
        {
            "phases": [{"steps": 50, "batch_size": 4, "size": 64}],
            "learning_rate": 0.01,
            "warmup_steps": 0,
            "precision": "fp32",
            "log_every": 10,
            "checkpoint_every": 10,
        }
    )
    with Watchdog(pulses, rank, callbacks.doing, STALL_S):
        train(
            Straggling(rank),
            lambda step: {"x": np.ones((2, 4), np.float32)},
            recipe,
            callbacks,
            seed=0,
            device=torch.device("cpu"),
            rank=rank,
            world=2,
        )


@pytest.mark.xdist_group("ranks")
def test_a_straggler_is_found_and_all_ranks_end(tmp_path: Path) -> None:
    with _Manager(ctx=FORKED) as manager:
        pulses = manager.pulses()
        ranks = start(_rank, (tmp_path, pulses), 2)
        for process in ranks.processes:
            process.join()
        stall = pulses.beat(9, 0, "asking", 0.0, STALL_S)
    codes = {process.exitcode for process in ranks.processes}
    assert EXIT_STALLED in codes
    assert codes <= {EXIT_STALLED, 1}  # the other may hear first that its connection is gone
    assert "rank 1 after step 3: forward pass" in stall
    assert "rank 0 after step 3: backward pass, and exchanging gradients" in stall
