"""Ray's many wrappings of an error, undone: what a worker raised, or what of the infrastructure failed."""

import ray.exceptions
from ray.train.v2._internal.exceptions import (
    RayTrainError,
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError

from datasets.files.errors import StorageError
from pipeline.cluster.board import Raised
from pipeline.errors import ClaimLost, InfrastructureError, Preempted


def cause(error: BaseException) -> BaseException:
    """The error that a worker raised, out of Ray's wrappings; failures of Ray itself as `InfrastructureError`."""
    import torch  # takes seconds, of which a run without failures has no need

    # one rank's end makes others fail to reach it
    first = (ClaimLost, Preempted, ValueError, StorageError, torch.OutOfMemoryError, InfrastructureError, BaseException)
    if isinstance(error, PreemptionError):
        return Preempted("a node was taken away before the training had saved its state")
    if isinstance(error, TrainingFailedError):
        causes = [cause(failure) for failure in (getattr(error, "worker_failures", None) or {}).values()]
        for kind in first:
            if found := [cause for cause in causes if isinstance(cause, kind)]:
                return found[0]
        return InfrastructureError(f"the training job failed: {error}")
    if isinstance(error, UserExceptionWithTraceback):  # of a training worker
        return cause(error._base_exc)
    if isinstance(error, WorkerHealthCheckFailedError):  # a rank's process or node is gone
        return cause(error.health_check_failure)
    if isinstance(error, ray.exceptions.RayTaskError):
        return cause(error.cause)
    if isinstance(error, Raised):  # by a worker of Ray Data
        return cause(error.error)
    if getattr(error, "preempted", False):  # an actor's death
        return Preempted("a node was taken away")
    if isinstance(error, (ray.exceptions.RayError, RayTrainError)):
        return InfrastructureError(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    if isinstance(error, torch.AcceleratorError):  # not that its memory is full, which the config must cure
        return InfrastructureError(f"a device failed: {str(error).splitlines()[0]}")
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error)):
        return InfrastructureError("a training rank no longer reaches another")
    return error
