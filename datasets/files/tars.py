"""Tars that others have made, compressed or not, which their content tells: nothing in them is trusted."""

import io
import posixpath
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from datasets.files import compressed

TEXT_BYTES = 1 << 18  # longest header, and longest text of strangers, that is read
_READ_AHEAD = 1 << 20


class Limited(io.BufferedReader):
    """A file of which no read takes more than a limit, and none lies beyond its end: a header may say anything."""

    def __init__(self, source: pa.NativeFile, max_bytes: int):
        super().__init__(source, _READ_AHEAD)
        self._limit, self._end = max(max_bytes, TEXT_BYTES), source.size()

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= self._limit:
            raise tarfile.ReadError(f"a read of {size} bytes")
        return super().read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if offset > self._end:  # which an object store takes for an error of its own
            raise tarfile.ReadError(f"cut short before byte {offset}")
        return super().seek(offset, whence)


@contextmanager
def opened(path: str, max_bytes: int) -> Iterator[Limited]:
    """A tar to read; what it holds, where it is compressed. No read takes more than `max_bytes`.

    Raises:
        Unreadable: as `compressed.opened`.
    """
    with compressed.opened(path) as source, Limited(source, max_bytes) as file:
        yield file


def members(file: Limited) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo | None]]:
    """Each member but folders, and the file whose bytes it has: itself, or an earlier one that it is a link to.

    None for a link to something else, and for what is no file. `file` may be read meanwhile.

    Raises:
        tarfile.TarError: it is no tar, damaged, or cut short; and anything else that tarfile raises over hostile bytes.
    """
    files: dict[str, tarfile.TarInfo] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if not member.isdir():
                held = _held(member, files)
                if held is not None:
                    files[posixpath.normpath(member.name)] = held
                yield member, held
            if tar.offset <= member.offset:  # a negative length, which would lead round and round
                raise tarfile.ReadError("it leads back")
        file.seek(tar.offset)
        if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end mark: tarfile takes a damaged header for the end")


def _held(member: tarfile.TarInfo, files: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    if member.isreg() and not member.issparse():
        return member
    if member.islnk():
        return files.get(posixpath.normpath(member.linkname))
    if member.issym():
        return files.get(posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.linkname)))
    return None
