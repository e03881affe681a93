"""Files that a command puts into a folder outside of the root, for others: whole, also where it is killed."""

import errno
import fcntl
import glob
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets.files import local, notices, storage
from datasets.files.errors import StorageError
from datasets.files.notices import PassedOver

STAGED = ".delivery"  # the end of the name of a folder that is being filled
LOCK = ".lock"  # and of the file beside it that is held meanwhile: NFS locks files alone, and those that are written


def deliver(files: Iterable[tuple[str, Callable[[], bytes]]], folder: str) -> None:
    """Put files, each by its name and what makes its content, into a folder.

    A local folder that is not there yet appears in one step, with all of them; what killed calls have left of it goes.
    In one that is there, and in a store, each file appears in its turn: the last one says that all are there.

    Raises:
        StorageError: it cannot be written, or somebody else has put something there meanwhile.
    """
    if storage.is_remote(folder) or storage.exists(folder):
        _put(files, folder)
        return
    with _beside(Path(storage.absolute(folder))) as staged:
        _put(files, staged)
        try:
            storage.move(staged, folder)
        except StorageError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise StorageError(error.errno, "somebody else has put something there meanwhile", folder) from error


def _put(files: Iterable[tuple[str, Callable[[], bytes]]], folder: str) -> None:
    for name, content in files:
        storage.publish(content(), storage.join(folder, name))


@contextmanager
def _beside(target: Path) -> Iterator[str]:
    """A new folder beside another, gone after the block unless it was moved; those of killed calls go first."""
    found = target.parent.glob(f".{glob.escape(target.name)}.*{STAGED}*")
    for left in sorted({Path(str(name).removesuffix(LOCK)) for name in found}):
        if re.fullmatch("[0-9a-f]{12}", left.name[len(target.name) + 2 : -len(STAGED)]) and not left.is_symlink():
            _clear(left, Path(f"{left}{LOCK}"))
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{STAGED}")
    lock, new = Path(f"{staged}{LOCK}"), Path(f"{staged}.new")
    local.make_folder(target.parent)
    new.touch()
    with _held(new):
        try:
            new.rename(lock)  # held before it can be taken for a killed call's
            local.make_folder(staged)
            yield str(staged)
        finally:
            new.unlink(missing_ok=True)
            storage.remove(str(staged))
            storage.remove(str(lock))


def _clear(left: Path, lock: Path) -> None:
    """Delete what a killed call has left; what nobody can know of is told, for its owner to delete."""
    with _held(lock) as free:
        if free and _drop(str(left)):
            _drop(str(lock))
        elif free is None and left.exists():
            reason = "somebody else's call, or one by an earlier version, has left it or is at work on it"
            notices.tell(PassedOver(str(left), reason))


def _drop(left: str) -> bool:
    """Whether it is gone."""
    try:
        storage.remove(left)
        return True
    except StorageError as error:  # somebody else's, which takes room and no more
        notices.tell(PassedOver(left, f"a killed call has left it: {error.strerror}"))
        return False


@contextmanager
def _held(file: Path) -> Iterator[bool | None]:
    """Hold a file for as long as the block, or this process, lasts; False where another one does, None where nobody
    can."""
    held: bool | None = True
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # gone, or somebody else's
        yield None
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        held = False
    try:
        yield held
    finally:
        os.close(descriptor)
