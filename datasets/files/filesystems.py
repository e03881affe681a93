"""Which file system a path lies on, and how object stores are asked: the options of their clients, in one place."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from datasets.files import notices
from datasets.files.errors import ENDPOINTS, StoreRefuses

T = TypeVar("T")
READERS = 32  # threads, for small files
AHEAD = 2 * READERS  # of their calls, under way or done, before it is the turn of the first
CONNECTIONS = 64  # that boto3's client keeps: as many as threads that read at once
CONNECT_S = 10  # for a connection to a store
SILENCE_S = 30  # without a byte of an answer
GOOGLE_S = 10  # that Google's client makes a request again for, of which it tells nobody
QUIET_TRIES = 8  # of requests of which one operation makes many; Arrow's client makes them again and tells nobody
LISTING_TRIES = 3  # of listings, which take a request for each thousand files, and for which somebody may wait


def is_remote(path: str) -> bool:
    """Whether `path` is a URI rather than a local path."""
    return "://" in path and not path.startswith("file://")


def absolute(path: str) -> str:
    """Make a local path absolute (Ray changes the working directory of its workers); leave a URI as it is.

    Links are not followed: what they lead to may have another name, without the suffix that tells what it is.
    """
    return path.rstrip("/") if is_remote(path) else os.path.abspath(os.path.expanduser(path.removeprefix("file://")))


def is_hollow(path: str) -> bool:
    """Whether the path inside a bucket has a part without a name."""
    scheme, _, rest = path.rstrip("/").partition("://")
    return scheme in ("s3", "gs") and "//" in rest


def open_filesystem(path: str, tries: int = QUIET_TRIES) -> tuple[pafs.FileSystem, str]:
    """The Arrow file system of a local path or URI, and the path inside it.

    `tries` is how often S3's client makes each request before it fails; with 1, whoever calls hears of every failure.
    """
    if not is_remote(path):
        return pafs.LocalFileSystem(), absolute(path)
    scheme, _, rest = path.partition("://")
    if scheme in ("s3", "gs"):
        if is_hollow(path):
            raise StoreRefuses(None, "it has two slashes in a row, which is no path for Arrow; leave one out", path)
        bucket, _, key = rest.rstrip("/").partition("/")
        filesystem, inner = _bucket(f"{scheme}://{bucket}", tries)
        return filesystem, f"{inner}/{key}" if key else inner
    try:
        return pafs.FileSystem.from_uri(path)
    except pa.ArrowInvalid:  # not one of Arrow's own schemes: fsspec may know it (memory://, ...)
        import fsspec

        try:
            filesystem, inner = fsspec.core.url_to_fs(path)
        except (ValueError, ImportError) as error:  # no such scheme, or its library is not installed
            raise StoreRefuses(None, f"this kind of address cannot be used: {error}", path) from None
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), inner


def named(infos: Iterable[pafs.FileInfo]) -> dict[str, pafs.FileInfo]:
    """What Arrow has found by its path; names that are no UTF-8, which are none of ours, are passed over."""
    found = {}
    for info in infos:
        try:
            found[info.path] = info
        except UnicodeDecodeError as error:
            path = error.object.decode(errors="backslashreplace")
            notices.tell(notices.PassedOver(path, "its name is no UTF-8"))
    return found


def ahead(calls: Iterable[Callable[[], T]], most: int = AHEAD) -> Iterator[T]:
    """What each call returns, in their order, while some of the next are under way: a store answers after a while.

    No more than `most` are taken before it is the turn of the first.
    """
    under_way: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(READERS)
    try:
        for call in calls:
            under_way.append(pool.submit(call))
            if len(under_way) > most:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:  # also where one has failed, or nobody wants the rest
        pool.shutdown(cancel_futures=True)


def forget_clients() -> None:
    """Make clients of object stores anew: those that there are keep the address and keys that they were made with."""
    _bucket.cache_clear()
    _boto3_client.cache_clear()


@lru_cache
def _bucket(uri: str, tries: int) -> tuple[pafs.FileSystem, str]:
    """A bucket's client, made once: that takes as long as a request, and a new one has no open connection."""
    if uri.startswith("gs://"):  # whose client would make a request again for a quarter of an hour
        uri = f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={GOOGLE_S}"
    pa.set_io_thread_count(max(pa.io_thread_count(), READERS))  # Arrow writes by eight threads, however many ask
    filesystem, inner = pafs.FileSystem.from_uri(uri)
    if isinstance(filesystem, pafs.S3FileSystem):
        _, (options,) = filesystem.__reduce__()  # what the URI and AWS_ENDPOINT_URL say, which only from_uri reads
        filesystem = pafs.S3FileSystem(**{**options, **_s3_options(tries)})
    return filesystem, inner


def _s3_options(tries: int) -> dict[str, Any]:
    return {
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=tries),
        "connect_timeout": CONNECT_S,
        "request_timeout": SILENCE_S,
        "allow_delayed_open": True,  # a small object is one request instead of three
    }


def s3_client() -> Any:
    """boto3's client of S3, for the endpoint and with the keys of the environment as Arrow takes them.

    It makes each request once: who calls makes it again (`retrying`). It may be used by many threads.
    """
    return _boto3_client(*map(os.environ.get, ENDPOINTS))


@lru_cache
def _boto3_client(*_: str | None) -> Any:
    """A client for the endpoints that the environment names, made once: it is slow to make."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    session = boto3.session.Session()  # the shared one must not be used by two threads
    once = Config(
        connect_timeout=CONNECT_S,
        read_timeout=SILENCE_S,
        retries={"total_max_attempts": 1},
        max_pool_connections=CONNECTIONS,
        signature_version=None if session.get_credentials() else UNSIGNED,  # of what everybody may read
        request_checksum_calculation="when_required",  # not every store knows them, and what we read we hash
        response_checksum_validation="when_required",
    )
    return session.client("s3", config=once, region_name=os.environ.get("AWS_REGION"))
