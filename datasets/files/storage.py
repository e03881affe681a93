"""Files on shared storage: one code path for local folders and for URIs such as `s3://bucket/prefix`.

Nothing becomes visible half-written. Locally a file is written beside its final name, flushed to disk, and renamed; an
object store makes an object visible only when its upload is complete. Paths are plain strings, local or URI.

What fails for a reason that may pass is tried again (`retrying`). What fails for good is a `StorageError`, one sentence
with the path; where a file is missing, a `FileNotFoundError` too.
"""

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from datasets.files import conditional, local, s3
from datasets.files.errors import NothingThere, StorageError, StoreAway, told
from datasets.files.fence import Fence, unfenced
from datasets.files.filesystems import LISTING_TRIES, QUIET_TRIES, absolute, ahead, is_remote, named, open_filesystem
from datasets.files.local import Known
from datasets.files.retrying import persistently

T = TypeVar("T")
CHUNK = 8 << 20  # bytes
ETAG = "etag "  # before what a store says of an object's content
ONE_REQUEST = 10 << 20  # bytes; that many or more are uploaded in parts


class Pieces(Protocol):
    """The content of a file in pieces, which can be gone through any number of times; `len` is of bytes."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[memoryview]: ...


@dataclass(frozen=True)
class FileEntry:
    """What a manifest keeps of one file: its size in bytes and the sha256 of its content, in hex."""

    bytes: int
    sha256: str


MEND = "`python -m pipeline data repair`, with the conf and words of its run, mends it or says how"


class CorruptFile(ValueError):
    """A file's content is not what its manifest says."""


def entry_of(content: bytes | memoryview | Pieces) -> FileEntry:
    """Size and sha256 of a file's content."""
    found = hashlib.sha256()
    for piece in _pieces(content):
        found.update(piece)
    return FileEntry(len(content), found.hexdigest())


def _pieces(content: bytes | memoryview | Pieces) -> Iterable[bytes | memoryview]:
    return [content] if isinstance(content, bytes | memoryview) else content


def join(base: str, *parts: str) -> str:
    """Append path components to a local path or URI; empty ones are none."""
    return "/".join([base.rstrip("/"), *filter(None, parts)])


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    return _info(path).type != pafs.FileType.NotFound


def read(path: str, expect: FileEntry | None = None) -> bytes:
    """The whole content of a file; with `expect`, verified against its size and sha256 (else `CorruptFile`)."""

    def content(filesystem: pafs.FileSystem, inner: str) -> bytes:
        with filesystem.open_input_file(inner) as file:  # as a stream, a store would be asked for each 256 KiB
            return bytes(file.read())

    data = s3.read(path) if _on_s3(path) else _ask(path, content)
    if expect:
        verify(data, path, expect)
    return data


def read_all(paths: Sequence[str]) -> list[bytes]:
    """The contents of many small files, in their order, read by several threads: a store answers each after a while."""
    return list(ahead(partial(read, path) for path in paths))


@contextmanager
def opened(path: str) -> Iterator[pa.NativeFile]:
    """A file to read here and there in. What fails in the block is told with the path, and not tried again."""
    with _ask(path, lambda filesystem, inner: filesystem.open_input_file(inner), QUIET_TRIES) as file, _telling(path):
        yield file


@contextmanager
def streamed(path: str) -> Iterator[pa.NativeFile]:
    """A file to read from its beginning to its end; errors as those of `opened`."""

    def stream(filesystem: pafs.FileSystem, inner: str) -> pa.NativeFile:
        return filesystem.open_input_stream(inner, compression=None, buffer_size=CHUNK)  # else by the suffix

    with _ask(path, stream, QUIET_TRIES) as file, _telling(path):
        yield file


@contextmanager
def _telling(path: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise told(error, path) from error


def verify(content: bytes | memoryview, path: str, expect: FileEntry) -> None:
    """Raise `CorruptFile` unless the content of the file at `path` has the expected size and sha256."""
    if entry_of(content) != expect:
        raise CorruptFile(f"{path} does not hold the {expect.bytes} bytes that its manifest names; {MEND}")


def sha256(path: str) -> str:
    """sha256 of a file's content in hex, read in pieces."""
    found = hashlib.sha256()
    with streamed(path) as stream:
        while piece := stream.read(CHUNK):
            found.update(piece)
    return found.hexdigest()


def stamps(path: str) -> dict[str, tuple[int, int] | None]:
    """Size in bytes and time of change in ns of a file (as ""), or of each file below a folder; None without a time."""
    info = _info(path)
    files = {"": Known(info.size, info.mtime_ns)} if info.type == pafs.FileType.File else _files(path)
    return {name: None if file.mtime_ns is None else (file.size, file.mtime_ns) for name, file in files.items()}


def age_s(path: str) -> float:
    """Seconds since a file was written, by its store's clock and ours; infinite where it or its time is not there."""
    stamp = stamps(path).get("")
    return time.time() - stamp[1] / 1e9 if stamp else float("inf")


def content_tag(path: str) -> str:
    """What a store says of an object's content, as `ETAG` and its tag; the sha256 in hex where it says nothing."""
    if _on_s3(path):
        return f"{ETAG}{s3.tag(path)}"
    with streamed(path) as stream:
        found = (stream.metadata() or {}).get(b"ETag", b"").decode().strip('"')
    return f"{ETAG}{found}" if found else sha256(path)


def local_copy(path: str, folder: Path) -> Path:
    """Where a file or folder can be opened: in place when it is local, else as a copy of it made in `folder`."""
    if not is_remote(path):
        return Path(absolute(path))
    target = folder / path.rstrip("/").rpartition("/")[2]
    here = pafs.LocalFileSystem()

    def copy(filesystem: pafs.FileSystem, inner: str) -> None:
        pafs.copy_files(inner, str(target), source_filesystem=filesystem, destination_filesystem=here)

    _ask(path, copy, QUIET_TRIES)
    return target


def publish(content: bytes | Pieces | Path, path: str) -> FileEntry:
    """Put `content` (bytes, in pieces too, or a local file) at `path` in one step and return its size and sha256.

    While pieces are written and hashed, other threads go on.
    """
    data = content.read_bytes() if isinstance(content, Path) else content
    if _on_s3(path) and len(data) < ONE_REQUEST:
        s3.put(b"".join(_pieces(data)), path)
    elif _on_s3(path):
        s3.put_large(_pieces(data), len(data), path)
    elif is_remote(path):
        _ask(path, lambda filesystem, inner: _upload(data, filesystem, inner), _tries(data))
    else:
        persistently(path, lambda: local.publish(_pieces(data), Path(absolute(path))))
    return entry_of(data)


def create(data: bytes, path: str) -> bool:
    """Put `data`, which nobody else would write, at `path` only if nothing is there yet; False when something is.

    Locally, and where a store knows conditions on a write (`conditional`), the check and the creation are one
    operation. Elsewhere two writers within the same moment are told apart by a second look, after a pause: as long as
    nothing takes longer than that, one of them finds what the other has put.
    """
    if not is_remote(path):
        return persistently(path, lambda: local.create(data, Path(absolute(path))))
    if exists(path):  # first of all: a store that knows no conditions would overwrite it
        return False
    if (put := persistently(path, lambda: conditional.put(data, path))) is not None:
        return put or _holds(path, data)  # ours, of a request whose answer was lost
    publish(data, path)
    conditional.settle()
    return _holds(path, data)


def _holds(path: str, data: bytes) -> bool:
    try:
        return read(path) == data
    except FileNotFoundError:
        return False


def move(source: str, target: str) -> None:
    """Put what lies at `source` at `target` in one step, in place of what is there; `source` is gone then.

    What is local may be a folder; there must be none at `target` then.

    Raises:
        FileNotFoundError: there is no `source` (any more); `target` is as it was, unless an answer was lost: then it
            may hold what `source` held.
    """
    if not is_remote(source):
        persistently(source, lambda: local.move(Path(absolute(source)), Path(absolute(target))))
        return
    place = open_filesystem(target)[1]
    try:
        _ask(source, lambda filesystem, inner: filesystem.copy_file(inner, place))
    except StorageError as error:  # no errno tells why
        if isinstance(error, StoreAway) or exists(source):
            raise
        raise NothingThere(errno.ENOENT, "there is no such file", source) from error
    s3.delete(source) if _on_s3(source) else remove(source)


def listing(folder: str) -> list[str]:
    """Names of the files below a folder, relative to it and sorted; empty when there is no such folder."""
    return sorted(name for name in _files(folder) if not name.endswith(".tmp"))


def children(folder: str) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders right below a folder, sorted; none where there is no such folder."""

    def found(filesystem: pafs.FileSystem, inner: str) -> tuple[list[str], list[str]]:
        infos = named(filesystem.get_file_info(pafs.FileSelector(inner, recursive=False, allow_not_found=True)))
        kinds = (pafs.FileType.File, pafs.FileType.Directory)
        files, folders = (sorted(info.base_name for info in infos.values() if info.type == kind) for kind in kinds)
        return [name for name in files if not name.endswith(".tmp")], folders

    return _ask(folder, found, LISTING_TRIES)


def holds(folder: str, besides: Container[str] = ()) -> bool:
    """Whether a folder holds any file, however deep, but for some names relative to it; a store is asked just that.

    In a store no folder is without files, so those names count there too.
    """
    if is_remote(folder):
        return exists(folder)
    top = absolute(folder)
    for place, _, names in os.walk(top):
        files = (os.path.relpath(os.path.join(place, name), top) for name in names if not name.endswith(".tmp"))
        if any(file not in besides for file in files):
            return True
    return False


def matching(path: str, suffix: str | tuple[str, ...]) -> dict[str, str]:
    """The files that a file, folder, pattern (`*`) or URI stands for, sorted: path by name relative to the folder.

    A folder stands for all files below it that end in `suffix`, or one of several, in any mix of cases. A file that is
    named stands for itself: its content tells what it is. Hidden files and folders are none unless they are named, nor
    is what writers of Parquet keep in folders of their own. What is there under a name with `*` in it is no pattern.
    """
    path = absolute(path)
    hidden = re.compile(r"(^|/)(\.|_(delta_log|temporary|spark_metadata)/)")
    if "*" in path and (is_remote(path) or not os.path.exists(path)):
        folder, _, pattern = path.partition("*")
        folder, _, start = folder.rpartition("/")
        names = [name for name in listing(folder) if _matches(name, f"{start}*{pattern}")]
    elif is_file(path):
        folder, _, name = path.rpartition("/")
        return {name: path}
    else:
        folder, names = path, [name for name in listing(path) if name.lower().endswith(suffix)]
    return {name: join(folder, name) for name in names if not hidden.search(name)}


def is_file(path: str) -> bool:
    """Whether a file is there."""
    return bool(_info(path).type == pafs.FileType.File)


def _matches(name: str, pattern: str) -> bool:
    """Whether a path fits a pattern: `*` stays within one folder, and no other sign means anything."""
    return re.fullmatch("[^/]*".join(map(re.escape, pattern.split("*"))), name) is not None


def sizes(folder: str) -> dict[str, int]:
    """Bytes of each file below a folder, by its name relative to it."""
    return {name: info.size for name, info in _files(folder).items()}


def sweep(folder: str, fence: Fence = unfenced) -> None:
    """Delete what killed writers left half-written in a local folder; whoever else writes there is behind the fence.

    Their names are looked for before the fence is asked, and no writer uses a name twice: so nothing goes that somebody
    has begun to write who took over since.
    """

    def delete() -> None:
        if found := list(Path(absolute(folder)).rglob(".*.tmp")):
            fence()
        for file in found:
            file.unlink(missing_ok=True)

    if not is_remote(folder):
        persistently(folder, delete)


def remove_all(paths: Sequence[str]) -> None:
    """Delete files, many by one request or by several threads: a store answers each request after a while."""
    if all(map(_on_s3, paths)):
        s3.delete_all(paths)
        return
    list(ahead(partial(remove, path) for path in paths))


def remove(path: str) -> None:
    """Delete a file or a whole folder; nothing happens when it is not there.

    What is local is gone for good before this returns: a power cut brings back nothing of it.
    """

    def delete(filesystem: pafs.FileSystem, inner: str) -> None:
        kind = filesystem.get_file_info(inner).type
        with suppress(FileNotFoundError):  # somebody else deletes it too, or our last try did
            if kind == pafs.FileType.Directory:
                filesystem.delete_dir(inner)
            elif kind == pafs.FileType.File:
                filesystem.delete_file(inner)

    if _on_s3(path):
        s3.delete(path)
        s3.delete_below(path)
    elif is_remote(path):
        _ask(path, delete)
    else:
        persistently(path, lambda: local.remove(Path(absolute(path))))


def _on_s3(path: str) -> bool:
    return path.startswith("s3://")


def _ask(path: str, question: Callable[[pafs.FileSystem, str], T], tries: int = 1) -> T:
    """What the store of a path answers, asked again where that fails for a reason that may pass.

    Every failure is told. A question that takes many requests would hardly ever come to its end where some of them
    fail: its `tries` leaves the most part to the store's client.
    """
    return persistently(path, lambda: question(*open_filesystem(path, tries)))


def _info(path: str) -> pafs.FileInfo:
    return _ask(path, lambda filesystem, inner: filesystem.get_file_info(inner))


def _files(folder: str) -> dict[str, Known]:
    """What is known of each file below a folder, by its name relative to it; none where there is no such folder."""

    def found(filesystem: pafs.FileSystem, inner: str) -> dict[str, Known]:
        if not is_remote(folder):
            return local.files(Path(inner))
        infos = named(filesystem.get_file_info(pafs.FileSelector(inner, recursive=True, allow_not_found=True)))
        start = len(inner.rstrip("/")) + 1
        kept = {path[start:]: info for path, info in infos.items() if info.type == pafs.FileType.File}
        return {name: Known(info.size, info.mtime_ns) for name, info in kept.items()}

    return _ask(folder, found, LISTING_TRIES)


def _tries(data: bytes | Pieces) -> int:
    return 1 if len(data) < ONE_REQUEST else QUIET_TRIES


def _upload(data: bytes | Pieces, filesystem: pafs.FileSystem, inner: str) -> None:
    with filesystem.open_output_stream(inner) as stream:
        for piece in _pieces(data):
            stream.write(piece)
