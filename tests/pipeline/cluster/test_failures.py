"""Ray's wrappings undone: of several ranks that failed, the one that the others failed for is told."""

import pytest
import ray.exceptions
import torch
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import TrainingFailedError

from datasets.files.errors import StoreRefuses
from pipeline.cluster.board import Raised
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


def test_a_device_that_fails_is_tried_again_and_one_that_is_full_is_told():
    found = cause(torch.AcceleratorError("CUDA error: uncorrectable ECC error\nCompile with TORCH_USE_CUDA_DSA"))
    assert isinstance(found, InfrastructureError)
    assert str(found) == "a device failed: CUDA error: uncorrectable ECC error"
    full = torch.OutOfMemoryError("out of memory")
    assert cause(full) is full


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda error: ray.exceptions.RayTaskError("train", "traceback", error),
        lambda error: UserExceptionWithTraceback(error, "traceback"),
        lambda error: Failed(
            UserExceptionWithTraceback(ray.exceptions.RayTaskError("train", "traceback", error), "traceback")
        ),
        lambda error: WorkerHealthCheckFailedError("gone", error),
        lambda error: ray.exceptions.RayTaskError("map", "traceback", Raised(error, "what Ray adds")),
    ],
    ids=["task", "rank", "both", "health", "actor"],
)
def test_what_ray_wraps_is_taken_out(wrapped):
    error = UsageError("a batch is too large")
    assert cause(wrapped(error)) is error
    lost = cause(wrapped(ray.exceptions.ActorDiedError()))
    assert isinstance(lost, InfrastructureError)
    assert str(lost).startswith("ActorDiedError: ")
