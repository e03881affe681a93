"""Putting files into local folders: whole or not at all, safe on the disk, and shared as far as the folder is."""

import contextlib
import errno
import os
import re
import stat
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from datasets.files import notices

GROUP = stat.S_IRGRP | stat.S_IWGRP
HALF = re.compile("[\ud800-\udfff]")  # as Python has bytes that are no UTF-8
NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})


def publish(pieces: Iterable[bytes | memoryview], target: Path) -> None:
    """Put what pieces hold at `target` in one step, in place of what is there."""
    with _beside(pieces, target) as temporary:
        os.replace(temporary, target)
    _sync_folder(target.parent)


def create(data: bytes, target: Path) -> bool:
    """Put `data` at `target` in one step if nothing is there; False where something is.

    Some file systems (FAT, some network and user-space ones) know no hard links. There the name is taken first and the
    content follows: for a moment, or for ever if this process dies in it, the file is empty.
    """
    with _beside([data], target) as temporary:
        try:
            _link(temporary, target)
        except FileExistsError:
            if not _same(temporary, target):  # it is, as of NFS, where the answer to our own first try was lost
                return False
    _sync_folder(target.parent)
    return True


def move(source: Path, target: Path) -> None:
    """Put the file or folder at `source` at `target` in one step, in place of a file that is there."""
    make_folder(target.parent)
    os.replace(source, target)
    for folder in {target.parent, source.parent}:
        _sync_folder(folder)


class Known(NamedTuple):
    """What a listing tells of a file; stores need not tell when it was changed."""

    size: int
    mtime_ns: int | None


def files(folder: Path) -> dict[str, Known]:
    """Each file below a folder by its name relative to it; none where there is no such folder.

    Links are followed, but none that leads to a folder above it; names that are no UTF-8 are passed over.
    """
    found: dict[str, Known] = {}
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        below, above = waiting.pop()
        place = os.path.join(folder, below)
        if (here := _followed(place)) is None or not stat.S_ISDIR(here.st_mode):  # it may have gone meanwhile
            continue
        above |= {(here.st_dev, here.st_ino)}
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(place):
                path = place + name
                if HALF.search(name):
                    told = os.fsencode(path).decode(errors="backslashreplace")
                    notices.tell(notices.PassedOver(told, "its name is no UTF-8"))
                elif (about := _followed(path)) is None:
                    pass
                elif stat.S_ISREG(about.st_mode):
                    found[below + name] = Known(about.st_size, about.st_mtime_ns)
                elif stat.S_ISDIR(about.st_mode) and (about.st_dev, about.st_ino) not in above:
                    waiting.append((f"{below}{name}/", above))
    return found


def _followed(path: str) -> os.stat_result | None:
    """What lies at a path or where a link there leads; None where it leads nowhere."""
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return None


def is_behind_a_link(folder: Path, name: str) -> bool:
    """Whether a file lies elsewhere: the folder, or one between it and the file, is a link."""
    return any(above.is_symlink() for above in (folder, *(folder / part for part in Path(name).parents)))


def remove(target: Path) -> None:
    """Delete a file or a whole folder, so that a power cut brings back nothing of it."""
    _delete(target)
    if target.parent.is_dir():
        _sync_folder(target.parent)


def make_folder(folder: Path) -> None:
    """Make a folder with those above it; in one that its group may write to, the group may write to new ones too.

    So several people share a root that was made for their group, whatever their umask is.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:  # somebody else was as fast; or it is no folder, which the next step will say
        return
    _sync_folder(folder.parent)
    if _group_writes(folder.parent):
        with contextlib.suppress(PermissionError):
            os.chmod(folder, stat.S_IMODE(folder.stat().st_mode) | stat.S_IRWXG)


def _same(temporary: Path, target: Path) -> bool:
    try:
        return os.path.samefile(temporary, target)
    except FileNotFoundError:  # somebody was before us, and has deleted it since
        return False


def _link(temporary: Path, target: Path) -> None:
    """Give a file a second name that must be new; where that cannot be, move it there."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, target)


@contextlib.contextmanager
def _beside(pieces: Iterable[bytes | memoryview], target: Path) -> Iterator[Path]:
    """A file with what pieces hold, on the disk, in the same folder; gone after the block unless it was moved."""
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as stream:
            stream.writelines(pieces)
            stream.flush()
            os.fsync(stream.fileno())
            _share(stream.fileno(), target.parent)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _delete(target: Path) -> None:
    """Delete a file, a link or a folder, also while others delete there."""
    if target.is_symlink() or not target.is_dir():
        target.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        for inside in target.iterdir():
            _delete(inside)
        target.rmdir()


def _share(descriptor: int, folder: Path) -> None:
    """Let a folder's group write to a new file, if it may write to the folder."""
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if _group_writes(folder) and mode | GROUP != mode:
        with contextlib.suppress(PermissionError):  # a file system without rights of its own
            os.fchmod(descriptor, mode | GROUP)


def share(path: Path) -> None:
    """Let a folder's group write to a file there, if it may write to the folder; the file is made where it is not
    there. Another's, or one that cannot be made, stays as it is: whoever opens it hears of that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _share(descriptor, path.parent)
        finally:
            os.close(descriptor)


def share_as(folder: Path) -> None:
    """Let the group write to what this process and its children make from now on, if it may write to a folder that is
    to be theirs; where that is not there yet, to the one that it will lie in."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if _group_writes(folder):
        os.umask(os.umask(0) & ~stat.S_IRWXG)


def _group_writes(folder: Path) -> bool:
    """Whether a folder is its group's too; one such as /tmp is everybody's, and nothing in it is."""
    mode = folder.stat().st_mode
    return bool(mode & stat.S_IWGRP and not mode & stat.S_ISVTX)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable: without this a power cut may forget it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems know this of files only
            raise
    finally:
        os.close(descriptor)
