"""What Ray answers. Every worker asks through this module, so it imports no more than that takes."""

from typing import Any

import ray
import ray.exceptions


def get(reference: Any) -> Any:
    """A task's result, or the error that it raised."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        from pipeline.cluster.failures import cause  # imports torch and Ray's libraries, which takes seconds

        raise cause(error) from error
