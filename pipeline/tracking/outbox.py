"""The outbox: records for a service that may be away, kept in a file until they have arrived there.

A run never waits for MLflow. Each record is appended to a file of JSON lines; a thread sends them on in their order and
tries again where that fails. Those that a service which answers does not take are set aside, so that they hold up no
others, and tried again now and then. What has not arrived when the run ends, or is killed, is sent by the next run with
the same folder. So a record may be sent twice: whoever takes it must not mind.
"""

import fcntl
import json
import logging
import os
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any, NamedTuple

from datasets.files import json_files, local, notices
from datasets.files.errors import reason_of

log = logging.getLogger(__name__)

Record = dict[str, Any]
BATCH = 500  # records sent at once
BATCH_BYTES = 16 << 20  # which hold no more than that, but for a single one
LONGEST = 500  # characters of a reason that is told; MLflow's remedy for an old database takes 300
PAUSES_S = (1.0, 2.0, 5.0, 15.0, 30.0)  # after a failure and further ones in a row; the last one from there on


class NotTaken(Exception):
    """The service answers, and has taken all records sent but those at `places`."""

    is_told_whole = True

    def __init__(self, places: Sequence[int], reason: str):
        super().__init__(reason)
        self.places = places


class Line(NamedTuple):
    """A record in a file, where it may wait for long; or itself, where that could not take it."""

    size: int
    file: IO[bytes]
    start: int
    itself: bytes | None = None

    def content(self) -> bytes:
        """The record in JSON, with the line's end."""
        return self.itself or os.pread(self.file.fileno(), self.size, self.start)


class Outbox:
    """The records of one process, and what dead ones left behind in the same folder.

    Args:
        folder: where the files lie, on a local file system; created where it is missing.
        name: of this process's file, not taken by another one.
        send: takes some records in their order, in one thread; what it raises may pass later, for all of them or, by
            `NotTaken`, for some.
        complain: is told why, in that thread, when sending fails for the first time.

    Raises:
        OSError: no file can be made in the folder.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        send: Callable[[Sequence[Record]], None],
        complain: Callable[[str], None] = lambda reason: None,
    ):
        local.make_folder(folder)
        self.path = folder / f"{name}.jsonl"
        self.failures = 0
        self.last_error = ""
        self.unkept = 0  # records that the file could not take: sent all the same, but they do not outlive this process
        self.why_unkept = ""
        self._send = send
        self._complain = complain
        self._file = _made(self.path)
        self._size = 0
        self._waiting: deque[Line] = deque()
        self._sent: list[Line] = []  # those on their way
        self._aside: deque[Line] = deque()  # those that the service has not taken while it answered
        self._aside_since = 0.0
        self._changed = threading.Condition()
        self._idle = self._failing = self._closing = self._trying_last = False
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    def add(self, record: Record) -> None:
        """Keep a record, and send it in its turn; returns at once, and never fails."""
        with self._changed:
            self._waiting.append(self._kept(json.dumps(record).encode() + b"\n"))
            self._idle = False
            self._changed.notify_all()

    def _kept(self, content: bytes) -> Line:
        """Put a line at the end of the file, whole or not at all."""
        line = Line(len(content), self._file, self._size)
        try:
            written = 0
            while written < line.size:
                written += os.pwrite(self._file.fileno(), content[written:], line.start + written)
        except OSError as error:
            self.unkept += 1
            self.why_unkept = reason_of(error)
            log.warning("%s cannot take a record: %s", self.path, self.why_unkept)
            with suppress(OSError):  # else the next line overwrites it
                self._file.truncate(line.start)
            return line._replace(itself=content)
        self._size += line.size
        return line

    def flush(self, patience_s: float) -> bool:
        """Wait until all has been sent, sending fails, or the time is over; whether all has arrived. What was set aside
        is not waited for."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._failing, patience_s)
            return self._idle and not self._left()

    def close(self, patience_s: float) -> int:
        """Send what is left, where it fails with one more try; returns how many records stay for the next run.

        Where `unkept` is not 0, so many of them at most are lost.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(patience_s)
        with self._changed:
            left = self._left()
            with suppress(OSError):  # the next run sends more of it again, which changes nothing
                _keep_only(left, self.path)
                self.unkept = 0
            self._file.close()
            return len(left)

    def _left(self) -> list[Line]:
        return [*self._sent, *self._waiting, *self._aside]

    def _work(self) -> None:
        for path in left_behind(self.path.parent):
            if path != self.path and not self._send_left_behind(path):
                return
        while self._take():
            aside = self._send_on(self._sent)
            if aside is None:
                return
            with self._changed:
                self._set_aside(aside)
                self._sent = []

    def _set_aside(self, lines: Sequence[Line]) -> None:
        if lines:
            self._aside += lines
            self._aside_since = time.monotonic()

    def _take(self) -> bool:
        """Wait until there are lines to be sent, and take them; False where this process ends and there are none."""
        with self._changed:
            while not self._waiting:
                aside_s = time.monotonic() - self._aside_since
                if self._aside and (self._closing or aside_s > PAUSES_S[-1]) and not self._trying_last:
                    self._trying_last = self._closing
                    self._waiting, self._aside = self._aside, deque()
                elif self._closing:
                    return False
                else:
                    self._idle = True
                    self._changed.notify_all()
                    self._changed.wait(PAUSES_S[-1] - aside_s if self._aside else None)
            self._sent = _batch(self._waiting)
            return True

    def _send_left_behind(self, path: Path) -> bool:
        """Send a dead process's file; False where this process ends before it could."""
        try:
            with open(path, "rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lines, left = _lines(file, path), list[Line]()
                while lines:
                    aside = self._send_on(_batch(lines))
                    if aside is None:
                        return False
                    left += aside
                with self._changed:  # from now on they are ours, to be tried again and told of
                    ours = [self._kept(line.content()) for line in left]
                    self._set_aside(ours)
                if not any(line.itself for line in ours):  # else there was no room: they are twice, which does no harm
                    path.unlink()
        except (BlockingIOError, FileNotFoundError):  # its process lives, or somebody else has sent it
            pass
        except OSError as error:  # somebody else's, on a root that is not shared as it should be
            notices.tell(notices.PassedOver(str(path), reason_of(error)))
        return True

    def _send_on(self, lines: Sequence[Line]) -> list[Line] | None:
        """Send until the service answers; returns what it did not take, None where this process ends before."""
        pauses = iter(PAUSES_S)
        while True:
            try:
                self._send([json.loads(line.content()) for line in lines])
                aside = list[Line]()
            except NotTaken as error:
                self._tell(error)
                aside = [lines[place] for place in error.places]
            except Exception as error:
                self._tell(error)
                with self._changed:
                    self._failing = True
                    self._changed.notify_all()
                    if self._closing:
                        return None
                    self._changed.wait_for(lambda: self._closing, next(pauses, PAUSES_S[-1]))
                continue
            self._failing = False
            return aside

    def _tell(self, error: Exception) -> None:
        self.last_error = in_short(error)
        with self._changed:
            waiting = len(self._left())
        log.warning("records could not be sent (%d wait): %s", waiting, self.last_error)
        if self.failures == 0:
            self._complain(self.last_error)
        self.failures += 1


def _batch(lines: deque[Line]) -> list[Line]:
    """Take the first lines off, as many as are sent at once."""
    taken = [lines.popleft()]
    size = taken[0].size
    while lines and len(taken) < BATCH and (size := size + lines[0].size) <= BATCH_BYTES:
        taken.append(lines.popleft())
    return taken


def _keep_only(lines: Sequence[Line], path: Path) -> None:
    """Leave a file of records with these lines; none where there are none."""
    if lines:
        local.publish((memoryview(line.content()) for line in lines), path)
    else:
        path.unlink()


def _made(path: Path) -> FileIO:
    """A new file, locked until this process ends, however it does."""
    while True:
        file = path.open("x+b", buffering=0)
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return file
        file.close()  # before it was locked, somebody took it for a dead one's that holds nothing


def in_short(error: BaseException) -> str:
    """What the error at the bottom of others says, in a line: those above repeat it among addresses and objects.

    One that is a sentence of ours (`NotTaken`, `NeedsMending`) is told whole.
    """
    while (cause := error.__cause__ or error.__context__) and not getattr(error, "is_told_whole", False):
        error = cause
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return textwrap.shorten(text, LONGEST, placeholder=" ...")


def drop(folder: Path, kind: str) -> int:
    """Take the records of a kind out of what ended processes have left below a folder; returns how many those were.

    Raises:
        BlockingIOError: a process that still lives keeps records there.
    """
    dropped = 0
    for path in [path for path in sorted(folder.rglob("*.jsonl")) if _ours(path)]:
        with open(path, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lines = _lines(file, path)
            kept = [line for line in lines if json.loads(line.content()).get("kind") != kind]
            _keep_only(kept, path)
        dropped += len(lines) - len(kept)
    return dropped


def left_behind(folder: Path) -> Iterator[Path]:
    """The files of records in a folder, in their order."""
    return filter(_ours, sorted(folder.glob("*.jsonl")))


def _ours(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def _lines(file: IO[bytes], path: Path) -> deque[Line]:
    """Where a file has its records, without what its process died in, or another program has put there."""
    found, start, lost = deque[Line](), 0, 0
    for content in file:
        if all(json_files.lines(content, dict)):
            found.append(Line(len(content), file, start))
        else:
            lost += 1
        start += len(content)
    if lost:
        notices.tell(notices.PassedOver(str(path), f"{lost} of its lines are cut off, or no records"))
    return found
