"""Puts to object stores on the condition that nothing is there, which Arrow does not know (looked for in pyarrow 25).

S3's own condition (If-None-Match) goes through boto3 (`s3`). Stores that only fsspec knows are asked for an exclusive
creation. A store may take a condition and heed it not; so what was put is put once more: who heeds the condition
refuses that.
"""

import time

from datasets.files import s3

SETTLE_S = 2.0  # a request to a store that knows no conditions takes less


def put(data: bytes, uri: str) -> bool | None:
    """Put `data` at a URI where nothing is: whether it was put; None where the store may have overwritten something.

    Raises:
        ConnectionError: the store is away or busy.
        OSError: it refuses for another reason.
    """
    scheme = uri.partition("://")[0]
    if scheme == "gs":  # Google's store has such a condition, but Arrow's client does not
        return None
    once = s3.put_new if scheme == "s3" else _put_by_fsspec
    done = once(data, uri)
    if done and once(data, uri) is not False:
        return None
    return done


def settle() -> None:
    """Wait until whoever looked before our put has put theirs."""
    time.sleep(SETTLE_S)


def _put_by_fsspec(data: bytes, uri: str) -> bool | None:
    import fsspec

    filesystem, inner = fsspec.core.url_to_fs(uri)
    filesystem.makedirs(inner.rpartition("/")[0], exist_ok=True)
    try:
        filesystem.pipe_file(inner, data, mode="create")
    except FileExistsError:
        return False
    except (NotImplementedError, TypeError, ValueError):  # it knows no such mode
        return None
    return True
