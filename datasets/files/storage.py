"""Files on shared storage: one code path for local folders and for URIs such as `s3://bucket/prefix`.

Nothing becomes visible half-written. Locally a file is written beside its final name, flushed to disk, and renamed; an
object store makes an object visible only when its upload is complete. Paths are plain strings, local or URI.
"""

import hashlib
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

CHUNK = 1 << 20
ETAG = "etag "  # before what a store says of an object's content
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


def size(path: str) -> int:
    """Bytes of a file."""
    filesystem, inner = open_filesystem(path)
    found: int = filesystem.get_file_info(inner).size
    return found


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


def content_tag(path: str) -> str:
    """What a store says of an object's content, as `ETAG` and its tag; the sha256 in hex where it says nothing."""
    filesystem, inner = open_filesystem(path)
    with filesystem.open_input_stream(inner) as stream:
        tag = (stream.metadata() or {}).get(b"ETag", b"").decode().strip('"')
    return f"{ETAG}{tag}" if tag else sha256(path)


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

    Locally the check and the creation are one operation. Arrow's object stores know no condition on a write (S3's
    If-None-Match; looked for in pyarrow 25), so there two writers within the same moment are told apart by a second
    look only, and not always: if one has looked before the other writes, both believe that they were first.
    """
    if is_remote(path):
        if exists(path):
            return False
        publish(data, path)
        return read(path) == data
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
    elif is_file(path):
        folder, _, name = path.rpartition("/")
        names = [name] if name.endswith(suffix) else []
    else:
        folder, names = path, [name for name in listing(path) if name.endswith(suffix)]
    return {name: join(folder, name) for name in names}


def is_file(path: str) -> bool:
    """Whether a file is there."""
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
    """Delete a file or a whole folder; nothing happens when it is not there."""
    filesystem, inner = open_filesystem(path)
    kind = filesystem.get_file_info(inner).type
    if kind == pafs.FileType.Directory:
        filesystem.delete_dir(inner)
    elif kind == pafs.FileType.File:
        filesystem.delete_file(inner)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable: without this a power cut may forget it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
