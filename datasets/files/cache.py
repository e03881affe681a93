"""The files of artifacts as they are read again and again: verified once, trusted from then on."""

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from datasets.files import notices, storage
from datasets.files.errors import StorageError, reason_of
from datasets.files.retrying import persistently
from datasets.files.storage import FileEntry


class VerifiedFiles:
    """Reads files, and hashes each of them the first time only.

    Without a folder, a local file is mapped where it lies, and hashed anew when its inode, size or time has changed;
    a remote one is fetched and hashed each time. With one, files are kept there under their hashes. All processes of a
    node can share it: one of them fetches a file, the others wait for it, and whatever lies there is trusted.

    Args:
        folder: on a disk of this machine, our own (or root's); None keeps nothing.
        most_bytes: that may lie in there; what was read longest ago goes first.
    """

    def __init__(self, folder: str | None = None, most_bytes: int = 0):
        self._folder = Path(storage.absolute(folder)) if folder else None
        self._most_bytes = most_bytes
        self._seen: dict[str, tuple[FileEntry, int, int, int]] = {}

    def read(self, path: str, expect: FileEntry) -> memoryview:
        """The content of a file. Copy what is to live longer than the file.

        Raises:
            CorruptFile: it is not what `expect` says.
        """
        if self._folder is not None:
            return self._kept(self._folder / expect.sha256[:2] / expect.sha256, path, expect)
        if storage.is_remote(path):
            return memoryview(storage.read(path, expect))
        return persistently(path, lambda: self._in_place(storage.absolute(path), expect))

    def _in_place(self, path: str, expect: FileEntry) -> memoryview:
        status = os.stat(path)
        facts = (expect, status.st_ino, status.st_size, status.st_mtime_ns)
        content = _mapped(path)
        if self._seen.get(path) != facts:
            storage.verify(content, path, expect)
            self._seen[path] = facts
        return content

    def _kept(self, place: Path, path: str, expect: FileEntry) -> memoryview:
        """A file by way of the folder; where that cannot be used, reading is slower, and nothing ends."""
        try:
            return self._from_folder(place, path, expect)
        except StorageError:  # of the file itself
            raise
        except OSError as error:
            notices.tell(notices.PassedOver(str(place), f"not kept: {reason_of(error)}"))
        return memoryview(storage.read(path, expect))

    def _from_folder(self, place: Path, path: str, expect: FileEntry) -> memoryview:
        _require_own(place.parent.parent)
        if (content := _hit(place, expect)) is not None:
            return content
        place.parent.mkdir(exist_ok=True)
        with _locked(place.parent):
            if (content := _hit(place, expect)) is not None:  # another process has fetched it meanwhile
                return content
            data = storage.read(path, expect)
            if expect.bytes <= self._most_bytes:
                self._keep(data, place)
        return memoryview(data)

    def _keep(self, data: bytes, place: Path) -> None:
        """Put a file there; a disk that is full makes reading slower, and ends nothing."""
        try:
            storage.sweep(str(place.parent))  # of a fetcher that was killed: it held the lock
            self._make_room(len(data))
            storage.publish(data, str(place))
        except OSError as error:
            notices.tell(notices.PassedOver(str(place), f"not kept: {reason_of(error)}"))

    def _make_room(self, needed: int) -> None:
        """Count so many bytes more, and delete files where those are too many.

        A process that is killed here has counted bytes that never come, until all files are looked at the next time.
        """
        assert self._folder is not None
        counted = self._folder / "bytes"
        with _locked(self._folder):
            try:
                there = int(counted.read_text())
            except (FileNotFoundError, ValueError):  # never counted, or a process was killed in the writing
                there = self._most_bytes
            if there + needed > self._most_bytes:
                there = self._reduced(needed)
            counted.write_text(f"{there + needed}")

    def _reduced(self, needed: int) -> int:
        """Look at all files and, where there is no room for so many bytes, delete those read longest ago: a tenth of
        all, since so many had to be looked at. Returns how many bytes are there."""
        assert self._folder is not None
        files = []
        for file in self._folder.glob("??/[0-9a-f]*"):
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                files.append((status.st_mtime_ns, status.st_size, file))
        there = sum(size for _, size, _ in files)
        if there + needed > self._most_bytes:
            for _, size, file in sorted(files):
                file.unlink(missing_ok=True)
                there -= size
                if there <= min(self._most_bytes - needed, self._most_bytes * 9 // 10):
                    break
        return there


def _require_own(folder: Path) -> None:
    """Make the folder, where it is not there; OSError where somebody else has: what lies in it is trusted."""
    try:
        owner = os.stat(folder).st_uid
    except FileNotFoundError:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = os.stat(folder).st_uid
    if owner not in (os.geteuid(), 0):
        raise OSError("the folder is another user's")


def _hit(place: Path, expect: FileEntry) -> memoryview | None:
    """The content of a kept file, which now is the latest that was read."""
    try:
        content = _mapped(str(place))
        os.utime(place)
    except FileNotFoundError:
        return None
    return content if len(content) == expect.bytes else None


def _mapped(path: str) -> memoryview:
    """A file's content in the page cache; the system starts to read what is not there yet."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # which cannot be mapped
            return memoryview(b"")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    content.madvise(mmap.MADV_WILLNEED)
    return memoryview(content)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time in."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
