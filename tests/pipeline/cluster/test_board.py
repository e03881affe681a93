"""The board: what the storage of a worker has to get over is heard by the driver."""

import pickle
import time
from types import SimpleNamespace
from typing import Any

import pytest

from datasets.files import notices
from datasets.files.notices import Notice, PassedOver, Retry
from pipeline.cluster.board import Board, BoardClient, HeardActor, heard
from pipeline.cluster.messages import Warned
from pipeline.run.invocation import _hear
from pipeline.run.last_screen import Summary, show_summary
from pipeline.steps.build import Build

RETRY = Retry("s3://bucket/x", "SLOW_DOWN", 0.2)


def remote(board: Board) -> Any:
    """The board as a worker sees it."""
    return SimpleNamespace(post=SimpleNamespace(remote=board.post))


class Worker:
    def __init__(self, start: int) -> None:
        notices.tell(RETRY)
        self.start = start

    def __call__(self, batch: int) -> int:
        notices.tell(PassedOver("/cache/x", "not kept"))
        return self.start + batch


def test_work_and_actors_are_heard_and_only_they():
    board = Board()

    def add(first: int, second: int) -> int:
        notices.tell(RETRY)
        return first + second

    assert heard(remote(board), (), add, 1, 2) == 3
    notices.tell(RETRY)  # by nobody's work
    assert board.exchange(False) == [RETRY]
    actor = HeardActor(remote(board), (), Worker, 1)
    assert actor({"shard": [pickle.dumps(2)]}) == {"done": [True]}
    assert board.exchange(False) == [RETRY, PassedOver("/cache/x", "not kept")]


def test_what_the_storage_has_to_get_over_is_no_stall_of_a_rank():
    stalls = []
    for notice in (RETRY, PassedOver("/cache/x", "not kept")):
        board = Board()
        board.begin_job(1)
        BoardClient(remote(board), 1).post(notice)
        stalls.append(board.beat(1, 0, 3, "waiting for the batch", 11.0, 10.0))
    assert stalls[0] is None
    assert stalls[1] is not None


def test_a_rank_of_an_earlier_job_is_heard_no_more():
    board = Board()
    ranks = [BoardClient(remote(board), job) for job in (1, 2)]
    others = BoardClient(remote(board))
    board.begin_job(1)
    for client in (ranks[0], others):
        client.post(Warned("a"))
    board.begin_job(2)
    for client, text in ((ranks[0], "late"), (ranks[1], "b"), (others, "c")):
        client.post(Warned(text))
    assert board.exchange(False) == [Warned("a"), Warned("a"), Warned("b"), Warned("c")]


@pytest.mark.parametrize(("job", "stalled"), [(2, False), (1, True)])
def test_a_rank_at_rest_is_not_waited_for_and_none_of_an_earlier_job_rests_for_it(job, stalled):
    board = Board()
    board.begin_job(2)
    board.beat(2, 1, 3, "saving", 0.0, 60.0)
    board.rest(job, 1)
    time.sleep(0.01)  # it is silent for longer than the stall of the next
    assert ("rank 1" in (board.beat(2, 0, 3, "waiting", 0.0, 0.001) or "")) is stalled


def test_work_that_fails_is_heard_no_more():
    board = Board()

    def fail() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        heard(remote(board), (), fail)
    notices.tell(RETRY)
    assert board.exchange(False) == []


def test_the_driver_tells_them_on_and_counts_the_retries(capsys, caplog):
    build = object.__new__(Build)
    messages = [RETRY, RETRY, RETRY, PassedOver("/cache/x", "not kept")]
    object.__setattr__(build, "cluster", SimpleNamespace(exchange=lambda stop: messages))
    object.__setattr__(build, "stopped", lambda: None)
    object.__setattr__(build, "claim", SimpleNamespace(raise_if_lost=lambda: None))
    summary = Summary()

    def hear(notice: Notice) -> None:
        _hear(summary, notice)

    with notices.heard_by(hear):
        build.tick()
    assert (summary.storage_tries, summary.storage_reason) == (3, "SLOW_DOWN")
    assert caplog.text.count("s3://bucket/x: SLOW_DOWN; trying again") == 3
    assert "passed over /cache/x: not kept" in caplog.text
    show_summary(summary)
    assert "storage     3 requests were made again (the last: SLOW_DOWN)\n" in capsys.readouterr().err
