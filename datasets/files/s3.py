"""What Arrow's client of S3 does not do, by boto3: reads and puts of one request, large ones in parts, conditions.

Arrow asks how large an object is before it reads it, and takes all of it over one connection. Here the first request
brings the beginning, and with it the size; what is left of a large object comes in parts, several at a time. Errors
are worded as Arrow words them, so that `errors` knows them whoever asked.
"""

import errno
import io
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from datasets.files import notices
from datasets.files.filesystems import ahead, s3_client
from datasets.files.retrying import persistently

PART = 8 << 20  # bytes of a request; a store takes as long for some 2 MB more as it takes to answer at all
PARALLEL = 8  # parts of one object at a time
MOST_PARTS = 10_000  # of an object that is put in parts
GONE = frozenset({"NoSuchKey", "404"})
EMPTY, CHANGED, THERE, MEANWHILE = 416, 412, 412, 409  # HTTP statuses, of a range and of conditions
AT_ONCE = 1000  # objects that S3 lists, or deletes, in one request
PASSING = frozenset({"InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout"})  # of one object of many
PUTS = 5  # of two at once, a store may ask both to come again


class _Changed(Exception):
    """An object was written anew while it was read."""


def read(uri: str) -> bytes:
    """The whole content of an object, as it was at one moment; each request is made again while it fails as may pass.

    Raises:
        StorageError: as those of `persistently`.
    """
    while True:
        try:
            return _read(uri)
        except _Changed:
            notices.tell(notices.Retry(uri, "it was written anew while it was read", 0.0))


def _read(uri: str) -> bytes:
    first, size, tag = persistently(uri, lambda: _beginning(uri))
    if len(first) == size:
        return first
    whole = io.BytesIO(bytes(size))  # whose bytes are handed on without a copy
    with whole.getbuffer() as view, ThreadPoolExecutor(PARALLEL) as pool:
        view[: len(first)] = first
        starts = range(len(first), size, PART)
        for _ in pool.map(lambda start: _fill(view[start : start + PART], uri, start, tag), starts):
            pass
    return whole.getvalue()


def _beginning(uri: str) -> tuple[bytes, int, str]:
    """The first part of an object, the size of all of it in bytes, and its tag."""
    with _telling(uri, "GetObject"):
        answer = _range(uri, 0, PART)
        if answer is None:
            return b"", 0, ""
        content = answer["Body"].read()
    size = re.search(r"/(\d+)$", answer.get("ContentRange", ""))
    return content, int(size[1]) if size else len(content), answer["ETag"]


def part(uri: str, start: int, size: int) -> bytes:
    """So many bytes of an object from `start` on; fewer, or none, where it ends before."""

    def request() -> bytes:
        with _telling(uri, "GetObject"):
            answer = _range(uri, start, size)
            content: bytes = answer["Body"].read() if answer else b""
            return content

    return persistently(uri, request)


def _range(uri: str, start: int, size: int, **conditions: str) -> Any:
    """The answer of a store that is asked for so many bytes from `start` on; None where an object has none there."""
    try:
        return s3_client().get_object(**_place(uri), Range=f"bytes={start}-{start + size - 1}", **conditions)
    except _client_error() as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == EMPTY:
            return None
        raise


def _fill(part: memoryview, uri: str, start: int, tag: str) -> None:
    """Read as many bytes from `start` on as `part` takes, of what has this tag."""

    def request() -> None:
        with _telling(uri, "GetObject"):
            answer, filled = _range(uri, start, len(part), IfMatch=tag), 0
            if answer is None:  # there were bytes when it was asked how large it is
                raise _Changed
            body = answer["Body"]
            while count := body.readinto(part[filled:]):
                filled += count
        if filled < len(part):
            raise ConnectionError(f"{len(part) - filled} bytes of a part did not come")

    persistently(uri, request)


def put(data: bytes, uri: str) -> None:
    """Put an object in one request. Arrow's client would do so by a few threads of its own, however many ask."""

    def request() -> None:
        with _telling(uri, "PutObject"):
            s3_client().put_object(**_place(uri), Body=data)

    persistently(uri, request)


def put_large(pieces: Iterable[bytes | memoryview], size: int, uri: str) -> None:
    """Put an object of so many bytes in parts, several at a time, each made again while it fails as may pass.

    It is there with the last request. What ends it before, a Ctrl-C too, leaves what was there: streams of Arrow put
    in its place what they have got by then.
    """
    place, client, tags = _place(uri), s3_client(), list[str]()
    upload = persistently(uri, lambda: _begun(uri))
    try:
        parts = enumerate(_in_parts(pieces, size), start=1)
        calls = (partial(_put_part, uri, upload, number, data) for number, data in parts)
        tags += ahead(calls, most=PARALLEL)
        _finish(uri, upload, tags, size)
    except BaseException:
        with suppress(Exception):  # the bucket's own rules sweep what stays of uploads that never end
            client.abort_multipart_upload(**place, UploadId=upload)
        raise


def _begun(uri: str) -> str:
    with _telling(uri, "CreateMultipartUpload"):
        return str(s3_client().create_multipart_upload(**_place(uri))["UploadId"])


def _in_parts(pieces: Iterable[bytes | memoryview], size: int) -> Iterator[bytearray]:
    """The same bytes in pieces of one size, no more of them than S3 takes."""
    whole, part = max(PART, -(-size // MOST_PARTS)), bytearray()
    for piece in pieces:
        rest = memoryview(piece).cast("B")
        while len(rest):
            taken = rest[: whole - len(part)]
            part += taken
            rest = rest[len(taken) :]
            if len(part) == whole:
                yield part
                part = bytearray()
    if part:
        yield part


def _put_part(uri: str, upload: str, number: int, data: bytearray) -> str:
    """Put a part; its tag."""

    def request() -> str:
        with _telling(uri, "UploadPart"):
            answer = s3_client().upload_part(**_place(uri), UploadId=upload, PartNumber=number, Body=data)
            return str(answer["ETag"])

    return persistently(uri, request)


def _finish(uri: str, upload: str, tags: list[str], size: int) -> None:
    """Make one object of the parts."""
    place, tries = _place(uri), 0
    parts = [{"ETag": tag, "PartNumber": number} for number, tag in enumerate(tags, start=1)]

    def request() -> None:
        nonlocal tries
        tries += 1
        with _telling(uri, "CompleteMultipartUpload"):
            try:
                s3_client().complete_multipart_upload(**place, UploadId=upload, MultipartUpload={"Parts": parts})
            except _client_error() as error:
                gone = error.response["Error"]["Code"] == "NoSuchUpload"
                if not (gone and tries > 1 and s3_client().head_object(**place)["ContentLength"] == size):
                    raise  # else the answer to a try before was lost

    persistently(uri, request)


def put_new(data: bytes, uri: str) -> bool | None:
    """Put an object where nothing is: whether it was put; None where the store says that it knows no conditions.

    Raises:
        ConnectionError: the store is away or busy.
        OSError: it refuses for another reason.
    """
    for _ in range(PUTS):
        with _telling(uri, "PutObject"):
            try:
                s3_client().put_object(**_place(uri), Body=data, IfNoneMatch="*")
            except _client_error() as error:
                code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status == MEANWHILE:  # another one is being put
                    continue
                if status == THERE:
                    return False
                if status == 501 or code == "NotImplemented":
                    return None
                raise
        return True
    raise ConnectionError(f"AWS Error CONFLICT during PutObject operation: asked to come again {PUTS} times")


def tag(uri: str) -> str:
    """What the store says of an object's content, its ETag."""

    def request() -> str:
        with _telling(uri, "HeadObject"):
            return str(s3_client().head_object(**_place(uri))["ETag"]).strip('"')

    return persistently(uri, request)


def delete(uri: str) -> None:
    """Delete an object, in one request; nothing happens where there is none. Arrow would ask and tidy four times."""

    def request() -> None:
        with _telling(uri, "DeleteObject"):
            s3_client().delete_object(**_place(uri))

    persistently(uri, request)


def delete_below(uri: str) -> None:
    """Delete all objects below a name: of each thousand one request asks for their names, and one deletes them."""
    bucket = _place(uri)["Bucket"]
    while keys := persistently(uri, lambda: _some_below(uri)):
        persistently(uri, partial(_delete_keys, uri, bucket, keys))
        if len(keys) < AT_ONCE:
            return


def delete_all(uris: Iterable[str]) -> None:
    """Delete objects, a thousand a request; nothing happens where there is none."""
    keys: dict[str, list[str]] = {}
    for place in map(_place, uris):
        keys.setdefault(place["Bucket"], []).append(place["Key"])
    for bucket, found in keys.items():
        for start in range(0, len(found), AT_ONCE):
            uri, some = f"s3://{bucket}/{found[start]}", found[start : start + AT_ONCE]
            persistently(uri, partial(_delete_keys, uri, bucket, some))


def _some_below(uri: str) -> list[str]:
    """The first thousand keys below a name."""
    with _telling(uri, "ListObjectsV2"):
        place = _place(uri)
        prefix = f"{place['Key']}/" if place["Key"] else ""
        answer = s3_client().list_objects_v2(Bucket=place["Bucket"], Prefix=prefix, MaxKeys=AT_ONCE)
        return [found["Key"] for found in answer.get("Contents", ())]


def _delete_keys(uri: str, bucket: str, keys: list[str]) -> None:
    with _telling(uri, "DeleteObjects"):
        wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        failed = s3_client().delete_objects(Bucket=bucket, Delete=wanted).get("Errors", ())
    for error in failed:
        kind = ConnectionError if error["Code"] in PASSING else OSError
        raise kind(f"AWS Error {_snake(error['Code'])} during DeleteObjects operation: {error.get('Message', '')}")


def _place(uri: str) -> dict[str, str]:
    bucket, _, key = uri.removeprefix("s3://").rstrip("/").partition("/")
    return {"Bucket": bucket, "Key": key}


@contextmanager
def _telling(uri: str, operation: str) -> Iterator[None]:
    """Errors of boto3 as those of a file system: a missing object, a connection that failed, what S3 says otherwise."""
    from botocore import exceptions

    try:
        yield
    except (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError) as error:
        raise ConnectionError(str(error)) from error
    except exceptions.BotoCoreError as error:
        raise OSError(f"AWS Error CLIENT during {operation} operation: {error}") from error
    except _client_error() as error:
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        if code in GONE:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", uri) from error
        if status == CHANGED and operation == "GetObject":
            raise _Changed from error
        name = f"UNKNOWN (HTTP status {status})" if code.isdigit() else _snake(code)
        kind = ConnectionError if status == 429 or status >= 500 else OSError
        said = error.response["Error"].get("Message", "")
        raise kind(f"AWS Error {name} during {operation} operation: {said}") from error


def _snake(code: str) -> str:
    """What S3 calls an error, as Arrow spells it."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", code).upper()


def _client_error() -> Any:
    from botocore.exceptions import ClientError

    return ClientError
