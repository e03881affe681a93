"""The outbox: records for a service that may be away, kept in a file until they have arrived there.

A run never waits for MLflow. Each record is appended to a file of JSON lines; a thread sends them on in their order and
tries again where that fails. What has not arrived when the run ends, or is killed, is sent by the next run with the
same folder. So a record may be sent twice: whoever takes it must not mind.
"""

import fcntl
import json
import logging
import textwrap
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from datasets.files import json_files, local, notices, storage
from datasets.files.errors import reason_of

log = logging.getLogger(__name__)

Record = dict[str, Any]
BATCH = 500  # records sent at once
LONGEST = 500  # characters of a reason that is told; MLflow's remedy for an old database takes 300
PAUSES_S = (1.0, 2.0, 5.0, 15.0, 30.0)  # after a failure and further ones in a row; the last one from there on


class Outbox:
    """The records of one process, and what dead ones left behind in the same folder.

    Args:
        folder: where the files lie, on a local file system; created where it is missing.
        name: of this process's file, not taken by another one.
        send: takes some records in their order, in one thread; what it raises may pass later.
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
        self._waiting: deque[Record] = deque()
        self._changed = threading.Condition()
        self._idle = self._failing = self._closing = False
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    def add(self, record: Record) -> None:
        """Keep a record, and send it in its turn; returns at once, and never fails."""
        with self._changed:
            self._keep(json.dumps(record).encode() + b"\n")
            self._waiting.append(record)
            self._idle = False
            self._changed.notify_all()

    def _keep(self, line: bytes) -> None:
        """Put a line at the end of the file, whole or not at all."""
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:]) or 0
            self._size += len(line)
        except OSError as error:
            self.unkept += 1
            self.why_unkept = reason_of(error)
            log.warning("%s cannot take a record: %s", self.path, self.why_unkept)
            with suppress(OSError):
                self._file.truncate(self._size)
                self._file.seek(self._size)

    def flush(self, patience_s: float) -> bool:
        """Wait until all has arrived, sending fails, or the time is over; whether all has arrived."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._failing, patience_s)
            return self._idle

    def close(self, patience_s: float) -> int:
        """Send what is left, where it fails with one more try; returns how many records stay for the next run.

        Where `unkept` is not 0, so many of them at most are lost.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(patience_s)
        with self._changed:
            if not self._waiting:
                with suppress(OSError):  # the next run sends it again, which changes nothing
                    self.path.unlink()
            self._file.close()
            return len(self._waiting)

    def _work(self) -> None:
        for path in left_behind(self.path.parent):
            if path != self.path and not self._send_left_behind(path):
                return
        while True:
            with self._changed:
                self._idle = not self._waiting
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closing)
                batch = [self._waiting[place] for place in range(min(len(self._waiting), BATCH))]
            if not batch or not self._send_on(batch):
                return
            with self._changed:
                for _ in batch:
                    self._waiting.popleft()

    def _send_left_behind(self, path: Path) -> bool:
        """Send a dead process's file; False where this process ends before it could."""
        try:
            with open(path, "rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                records = _complete(file.read(), path)
                for start in range(0, len(records), BATCH):
                    if not self._send_on(records[start : start + BATCH]):
                        return False
                path.unlink()
        except (BlockingIOError, FileNotFoundError):  # its process lives, or somebody else has sent it
            pass
        except OSError as error:  # somebody else's, on a root that is not shared as it should be
            notices.tell(notices.PassedOver(str(path), reason_of(error)))
        return True

    def _send_on(self, batch: Sequence[Record]) -> bool:
        """Send until that succeeds; False where this process ends before it could."""
        pauses = iter(PAUSES_S)
        while True:
            try:
                self._send(batch)
            except Exception as error:
                self.last_error = in_short(error)
                log.warning("records could not be sent (%d wait): %s", len(batch), self.last_error)
                if self.failures == 0:
                    self._complain(self.last_error)
            else:
                self._failing = False
                return True
            with self._changed:
                self.failures += 1
                self._failing = True
                self._changed.notify_all()
                if self._closing:
                    return False
                self._changed.wait_for(lambda: self._closing, next(pauses, PAUSES_S[-1]))


def _made(path: Path) -> FileIO:
    """A new file, locked until this process ends, however it does."""
    while True:
        file = path.open("xb", buffering=0)
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return file
        file.close()  # before it was locked, somebody took it for a dead one's that holds nothing


def in_short(error: BaseException) -> str:
    """What the error at the bottom of others says, in a line: those above repeat it among addresses and objects.

    One that tells a remedy (a word of MLflow's, or `NeedsMending`) is told whole.
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
            records = _complete(file.read(), path)
            kept = [record for record in records if record.get("kind") != kind]
            storage.publish("".join(json.dumps(record) + "\n" for record in kept).encode(), str(path))
        dropped += len(records) - len(kept)
    return dropped


def left_behind(folder: Path) -> Iterator[Path]:
    """The files of records in a folder, in their order."""
    return filter(_ours, sorted(folder.glob("*.jsonl")))


def _ours(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def _complete(content: bytes, path: Path) -> list[Record]:
    """The records of a file, without what its process died in, or another program has put there."""
    found = list(json_files.lines(content, dict))
    if lost := found.count(None):
        notices.tell(notices.PassedOver(str(path), f"{lost} of its lines are cut off, or no records"))
    return [record for record in found if record]
