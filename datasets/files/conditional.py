"""Puts to object stores on the condition that nothing is there, which Arrow does not know (looked for in pyarrow 25).

S3's own condition (If-None-Match) goes through boto3, with the credentials and the endpoint of the environment as Arrow
takes them. Stores that only fsspec knows are asked for an exclusive creation. A store may take a condition and heed it
not; so what was put is put once more: who heeds the condition refuses that.
"""

import os
import time
from functools import lru_cache
from typing import Any

from datasets.files.filesystems import CONNECT_S, SILENCE_S

SETTLE_S = 2.0  # a request to a store that knows no conditions takes less
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
RETRIES = 5  # of two at once, a store may ask both to come again


def put(data: bytes, uri: str) -> bool | None:
    """Put `data` at a URI where nothing is: whether it was put; None where the store may have overwritten something.

    Raises:
        ConnectionError: the store is away or busy.
        OSError: it refuses for another reason.
    """
    scheme = uri.partition("://")[0]
    if scheme == "gs":  # Google's store has such a condition, but Arrow's client does not
        return None
    once = _put_s3 if scheme == "s3" else _put_by_fsspec
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


def _put_s3(data: bytes, uri: str) -> bool | None:
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    for _ in range(RETRIES):
        try:
            _client(*map(os.environ.get, ENDPOINTS)).put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except ClientError as error:
            code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status == 409:  # another one is being put
                continue
            if status == 412:
                return False
            if status == 501 or code == "NotImplemented":
                return None
            kind = ConnectionError if status == 429 or status >= 500 else OSError
            raise kind(f"{uri} cannot be put: {code}, {error.response['Error'].get('Message', '')}") from error
        except BotoCoreError as error:
            raise ConnectionError(f"{uri} cannot be put: {error}") from error
        else:
            return True
    raise ConnectionError(f"{uri} cannot be put: the store asked to come again {RETRIES} times")


@lru_cache
def _client(*_: str | None) -> Any:
    """A client for S3, made once for the endpoints that the environment names: it is slow to make."""
    import boto3
    from botocore.config import Config

    once = Config(connect_timeout=CONNECT_S, read_timeout=SILENCE_S, retries={"total_max_attempts": 1})
    return boto3.client("s3", config=once)
