"""Files on shared storage: one code path for local folders and for URIs such as `s3://bucket/prefix`.

Nothing becomes visible half-written. Locally a file is written beside its final name, flushed to disk, and renamed; an
object store makes an object visible only when its upload is complete. Paths are plain strings, local or URI.
"""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from datasets.files import conditional

CHUNK = 1 << 20
READERS = 32  # threads, for small files


@dataclass(frozen=True)
class FileEntry:
    """What a manifest keeps of one file: its size in bytes and the sha256 of its content, in hex."""

    bytes: int
    sha256: str


class CorruptFile(ValueError):
    """A file's content is not what its manifest says."""


def entry_of(content: bytes | memoryview) -> FileEntry:
    """Size and sha256 of a file's content."""
    return FileEntry(len(content), hashlib.sha256(content).hexdigest())


def is_remote(path: str) -> bool:
    """Whether `path` is a URI rather than a local path."""
    return "://" in path and not path.startswith("file://")


def join(base: str, *parts: str) -> str:
    """Append path components to a local path or URI."""
    return "/".join([base.rstrip("/"), *parts])


def absolute(path: str) -> str:
    """Make a local path absolute (Ray changes the working directory of its workers); leave a URI as it is."""
    return path.rstrip("/") if is_remote(path) else str(Path(path.removeprefix("file://")).expanduser().resolve())


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The Arrow file system of a local path or URI, and the path inside it."""
    if not is_remote(path):
        return pafs.LocalFileSystem(), absolute(path)
    scheme, _, rest = path.partition("://")
    if scheme in ("s3", "gs"):
        bucket, _, key = rest.rstrip("/").partition("/")
        filesystem, inner = _bucket(f"{scheme}://{bucket}")
        return filesystem, f"{inner}/{key}" if key else inner
    try:
        return pafs.FileSystem.from_uri(path)
    except pa.ArrowInvalid:  # not one of Arrow's own schemes: fsspec may know it (memory://, ...)
        import fsspec

        filesystem, inner = fsspec.core.url_to_fs(path)
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), inner


@lru_cache
def _bucket(uri: str) -> tuple[pafs.FileSystem, str]:
    """A bucket's client, made once: that takes as long as a request, and a new one has no open connection."""
    filesystem: tuple[pafs.FileSystem, str] = pafs.FileSystem.from_uri(uri)
    return filesystem


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, inner = open_filesystem(path)
    return filesystem.get_file_info(inner).type != pafs.FileType.NotFound


def read(path: str, expect: FileEntry | None = None) -> bytes:
    """The whole content of a file; with `expect`, verified against its size and sha256 (else `CorruptFile`)."""
    filesystem, inner = open_filesystem(path)
    with filesystem.open_input_stream(inner) as stream:
        data: bytes = stream.read()
    if expect is not None:
        verify(data, path, expect)
    return data


def read_all(paths: Sequence[str]) -> list[bytes]:
    """The contents of many small files, in their order, read by several threads: a store answers each after a while."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read, paths))


def verify(content: bytes | memoryview, path: str, expect: FileEntry) -> None:
    """Raise `CorruptFile` unless the content of the file at `path` has the expected size and sha256."""
    if entry_of(content) != expect:
        raise CorruptFile(
            f"{path} does not hold the {expect.bytes} bytes that its manifest names; "
            "delete its artifact's folder and run the same command again"
        )


def sha256(path: str) -> str:
    """sha256 of a file's content in hex, read in pieces."""
    filesystem, inner = open_filesystem(path)
    found = hashlib.sha256()
    with filesystem.open_input_stream(inner) as stream:
        while piece := stream.read(CHUNK):
            found.update(piece)
    return found.hexdigest()


def stamps(path: str) -> dict[str, tuple[int, int] | None]:
    """Size in bytes and time of change in ns of a file (as ""), or of each file below a folder; None without a time."""
    filesystem, inner = open_filesystem(path)
    infos = [filesystem.get_file_info(inner)]
    if infos[0].type == pafs.FileType.Directory:
        infos = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
    return {
        info.path[len(inner.rstrip("/")) + 1 :]: (info.size, info.mtime_ns) if info.mtime_ns is not None else None
        for info in infos
        if info.type == pafs.FileType.File
    }


def local_copy(path: str, folder: Path) -> Path:
    """Where a file or folder can be opened: in place when it is local, else as a copy of it made in `folder`."""
    if not is_remote(path):
        return Path(absolute(path))
    filesystem, inner = open_filesystem(path)
    target = folder / inner.rstrip("/").rpartition("/")[2]
    pafs.copy_files(inner, str(target), source_filesystem=filesystem, destination_filesystem=pafs.LocalFileSystem())
    return target


def publish(content: bytes | Path, path: str) -> FileEntry:
    """Put `content` (bytes, or a local file) at `path` in one step and return its size and sha256."""
    data = content if isinstance(content, bytes) else content.read_bytes()
    if is_remote(path):
        filesystem, inner = open_filesystem(path)
        with filesystem.open_output_stream(inner) as stream:
            stream.write(data)
    else:
        target = Path(absolute(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)
    return entry_of(data)


def create(data: bytes, path: str) -> bool:
    """Put `data` at `path` only if nothing is there yet; False when something is.

    Locally, and where a store knows conditions on a write (`conditional`), the check and the creation are one
    operation. Elsewhere two writers within the same moment are told apart by a second look, after a pause: as long as
    nothing takes longer than that, one of them finds what the other has put.
    """
    if is_remote(path):
        if exists(path):  # first of all: a store that knows no conditions would overwrite it
            return False
        if (put := conditional.put(data, path)) is not None:
            return put or _holds(path, data)  # ours, of a request whose answer was lost
        publish(data, path)
        conditional.settle()
        return _holds(path, data)
    target = Path(absolute(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    temporary.write_bytes(data)
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def _holds(path: str, data: bytes) -> bool:
    try:
        return read(path) == data
    except FileNotFoundError:
        return False


def move(source: str, target: str) -> None:
    """Put what lies at `source` at `target` in one step, in place of what is there; `source` is gone then.

    Raises:
        FileNotFoundError: there is no `source` (any more); `target` is as it was.
    """
    filesystem, inner = open_filesystem(source)
    _, place = open_filesystem(target)
    if is_remote(source):
        try:
            filesystem.copy_file(inner, place)
        except OSError as error:  # no errno tells why
            if not exists(source):
                raise FileNotFoundError(source) from error
            raise
        with contextlib.suppress(FileNotFoundError):  # by somebody else, after the copy
            filesystem.delete_file(inner)
    else:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        os.replace(inner, place)
        _sync_folder(Path(place).parent)


def sizes(folder: str) -> dict[str, int]:
    """Bytes of each file below a folder, by its name relative to it."""
    filesystem, inner = open_filesystem(folder)
    infos = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True, allow_not_found=True))
    start = len(inner.rstrip("/")) + 1
    return {info.path[start:]: info.size for info in infos if info.type == pafs.FileType.File}


def listing(folder: str) -> list[str]:
    """Names of the files below a folder, relative to it and sorted; empty when there is no such folder."""
    filesystem, inner = open_filesystem(folder)
    infos = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True, allow_not_found=True))
    prefix = len(inner.rstrip("/")) + 1
    files = (info.path[prefix:] for info in infos if info.type == pafs.FileType.File)
    return sorted(name for name in files if not name.endswith(".tmp"))


def matching(path: str, suffix: str) -> dict[str, str]:
    """The files that a file, folder, pattern (`*`) or URI stands for, sorted: path by name relative to the folder.

    A folder stands for all files below it that end in `suffix`; empty where there is none.
    """
    path = absolute(path)
    if "*" in path:
        folder, _, pattern = path.partition("*")
        folder, _, start = folder.rpartition("/")
        names = [name for name in listing(folder) if _matches(name, f"{start}*{pattern}")]
    elif _is_file(path):
        folder, _, name = path.rpartition("/")
        names = [name] if name.endswith(suffix) else []
    else:
        folder, names = path, [name for name in listing(path) if name.endswith(suffix)]
    return {name: join(folder, name) for name in names}


def identity(files: Iterable[tuple[str, str]]) -> str:
    """16 hex digits of the names and sizes of files, given as (name, path): cheap to ask, and the same after a move."""
    found = hashlib.sha256()
    for name, path in sorted(files):
        filesystem, inner = open_filesystem(path)
        found.update(f"{name}\0{filesystem.get_file_info(inner).size}\0".encode(errors="surrogateescape"))
    return found.hexdigest()[:16]


def _is_file(path: str) -> bool:
    filesystem, inner = open_filesystem(path)
    kind: bool = filesystem.get_file_info(inner).type == pafs.FileType.File
    return kind


def _matches(name: str, pattern: str) -> bool:
    """Whether a path fits a pattern part by part: `*` stays within one folder."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def total_bytes(folder: str) -> int:
    """Bytes of all files below a folder."""
    filesystem, inner = open_filesystem(folder)
    infos = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True, allow_not_found=True))
    return sum(info.size for info in infos if info.type == pafs.FileType.File)


def sweep(folder: str) -> None:
    """Delete what killed writers left half-written in a local folder; nobody may be writing there."""
    if not is_remote(folder):
        for file in Path(absolute(folder)).rglob(".*.tmp"):
            file.unlink(missing_ok=True)


def remove(path: str) -> None:
    """Delete a file or a whole folder; nothing happens when it is not there.

    What is local is gone for good before this returns: a power cut brings back nothing of it.
    """
    filesystem, inner = open_filesystem(path)
    if not is_remote(path):
        _delete(Path(inner))
        if Path(inner).parent.is_dir():
            _sync_folder(Path(inner).parent)
        return
    kind = filesystem.get_file_info(inner).type
    if kind == pafs.FileType.Directory:
        filesystem.delete_dir(inner)
    elif kind == pafs.FileType.File:
        filesystem.delete_file(inner)


def _delete(target: Path) -> None:
    """Delete a file, a link or a folder, also while others delete there."""
    if target.is_symlink() or not target.is_dir():
        target.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        for inside in target.iterdir():
            _delete(inside)
        target.rmdir()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable: without this a power cut may forget it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
