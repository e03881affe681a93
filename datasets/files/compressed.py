"""Compressed files, told by their content: what they hold, unpacked into a file that is nobody else's.

gzip, bzip2 and xz by the standard library, Zstandard and LZ4 by pyarrow. What can only be read from its beginning is so
read once, and then here and there. The file has no name: it is gone with the process, however that ends. In memory is
never more than a piece, and a decoder's window.
"""

import bz2
import gzip
import io
import lzma
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa

from datasets.files import storage

PIECE = 1 << 16  # bytes, of which damage costs one at most
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what decoders raise over hostile bytes
WINDOW = 256 << 20  # bytes that an xz decoder may take; the largest preset takes 65 MiB
FREE = 1 << 30  # bytes that anything may unpack to
RATIO = 100  # of what it unpacks to, to what it has: above it, a larger file is taken for a bomb
KEPT = 8 << 30  # bytes of unpacked files that `Unpacked` keeps
_UNREAD = {b"\x1f\x9d": "compress", b"7z\xbc\xaf": "7-Zip", b"PK\x03\x04": "ZIP", b"Rar!": "RAR", b"LZIP": "lzip"}


class Unreadable(ValueError):
    """A compressed file that is not unpacked: of a format that we do not read, or a bomb."""


class _Pulled(io.RawIOBase):
    """A source as decoders read it; keeps what the store has against it, for that says nothing about the content."""

    def __init__(self, source: pa.NativeFile):
        super().__init__()
        self._source = source
        self.failure: OSError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._source.readinto(buffer))
        except OSError as error:
            self.failure = error
            raise


def _xz(file: Any) -> Iterator[bytes]:
    """All streams of a file, one after the other; `lzma.LZMAFile` bounds no memory."""
    decoder, left = lzma.LZMADecompressor(memlimit=WINDOW), b""
    while True:
        if decoder.eof:
            left = decoder.unused_data.lstrip(b"\0") or file.read(PIECE).lstrip(b"\0")  # padding between streams
            if not left:
                return
            decoder = lzma.LZMADecompressor(memlimit=WINDOW)
        elif decoder.needs_input and not left and not (left := file.read(PIECE)):
            raise EOFError("cut short")
        yield decoder.decompress(left, PIECE)
        left = b""


def _in_pieces(file: Any) -> Iterator[bytes]:
    while piece := file.read1(PIECE):  # not `read`, which loses what came before damage
        yield piece


def _arrow(name: str) -> Callable[[Any], Iterator[bytes]]:
    return lambda file: _in_pieces(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), name))


_DECODERS: dict[bytes, Callable[[Any], Iterator[bytes]]] = {
    b"\x1f\x8b": lambda file: _in_pieces(gzip.GzipFile(fileobj=file, mode="rb")),
    b"BZh": lambda file: _in_pieces(bz2.BZ2File(file)),
    b"\xfd7zXZ": _xz,
    b"\x28\xb5\x2f\xfd": _arrow("zstd"),
    b"\x04\x22\x4d\x18": _arrow("lz4"),
}
_LONGEST = max(map(len, (*_DECODERS, *_UNREAD)))


def is_compressed(path: str) -> bool:
    """Whether a file is compressed, in a format that we read or not."""
    with storage.opened(path) as source:
        return bool(source.read_at(_LONGEST, 0).startswith((*_DECODERS, *_UNREAD)))


@contextmanager
def unpacked(path: str) -> Iterator[pa.NativeFile]:
    """What a compressed file holds, to read here and there in; of a damaged one, as much as comes before the damage.

    Raises:
        Unreadable: it is of a format that we do not read, or unpacks to more than `RATIO` times its bytes and `FREE`.
    """
    with _unpacked(path) as file:
        yield pa.PythonFile(file, mode="r")


@contextmanager
def opened(path: str) -> Iterator[pa.NativeFile]:
    """A file as it is, or what it holds where it is compressed. Raises as `unpacked`."""
    with (unpacked if is_compressed(path) else storage.opened)(path) as file:
        yield file


def _unpacked(path: str) -> BinaryIO:
    with storage.opened(path) as source:
        start, limit = source.read_at(_LONGEST, 0), max(FREE, RATIO * source.size())
        if format_ := next((name for magic, name in _UNREAD.items() if start.startswith(magic)), None):
            raise Unreadable(f"{format_} is not read; uncompress it first")
        decode = next(decode for magic, decode in _DECODERS.items() if start.startswith(magic))
        file: BinaryIO = tempfile.TemporaryFile(prefix="unpacked-")  # noqa: SIM115
        source.seek(0)
        try:
            _fill(file, decode, _Pulled(source), limit)
        except BaseException:
            file.close()
            raise
    file.seek(0)
    return file


def _fill(file: BinaryIO, decode: Callable[[Any], Iterator[bytes]], source: _Pulled, limit: int) -> None:
    """Write what a decoder gives, up to damage or the source's end."""
    pieces = decode(source)
    while True:
        try:
            piece = next(pieces, None)
        except DAMAGE as error:  # what came before it counts
            if source.failure:
                raise source.failure from error
            return
        if piece is None:
            return
        if file.tell() + len(piece) > limit:
            raise Unreadable(f"it unpacks to more than {limit:,} bytes")
        file.write(piece)


class Unpacked:
    """Files as they are, and what compressed ones hold, each unpacked once and kept: the last, up to `KEPT` bytes."""

    def __init__(self) -> None:
        self._files: dict[object, BinaryIO] = {}
        self._compressed: dict[str, bool] = {}
        self._lock = threading.Lock()

    def read_at(self, path: str, size: int, offset: int) -> bytes:
        """Bytes of what a file holds; fewer, where it ends before. Raises as `unpacked`."""
        with self._lock:
            if path not in self._compressed:
                self._compressed[path] = is_compressed(path)
        if not self._compressed[path]:
            with storage.opened(path) as source:
                content: bytes = source.read_at(size, offset)
            return content
        with self._lock:
            key = path, *storage.stamps(path).values()
            file = self._files.pop(key, None) or _unpacked(path)
            self._files[key] = file  # as the last that was asked for
            while len(self._files) > 1 and sum(map(_size, self._files.values())) > KEPT:
                self._files.pop(next(iter(self._files))).close()
            file.seek(offset)
            return file.read(size)


def _size(file: BinaryIO) -> int:
    return file.seek(0, 2)
