"""Ray's wrappings undone: of several ranks that failed, the one that the others failed for is told."""

import pytest
import torch
from ray.train.v2.api.exceptions import TrainingFailedError

from datasets.files.errors import StoreRefuses
from pipeline.cluster.failures import cause
from pipeline.errors import ClaimLost, InfrastructureError, Preempted, UsageError


class Failed(TrainingFailedError):
    """A job whose ranks failed in these ways."""

    def __init__(self, *failures: Exception):
        Exception.__init__(self, "failed")
        self.worker_failures = dict(enumerate(failures))


ALONE = torch.distributed.DistNetworkError("connection reset")  # a rank that no longer reaches another


@pytest.mark.parametrize(
    "first",
    [
        ClaimLost("gone"),
        Preempted("a node was taken away"),
        UsageError("a batch is too large"),
        StoreRefuses("the disk is full"),
        torch.OutOfMemoryError("out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_ended_one_rank_is_told_before_what_that_did_to_the_others(first):
    assert cause(Failed(ALONE, first, ALONE)) is first
    assert cause(Failed(first, ALONE)) is first


def test_where_no_rank_knows_more_the_lost_connection_is_told():
    assert isinstance(cause(Failed(ALONE, ALONE)), InfrastructureError)
