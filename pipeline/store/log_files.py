"""Logs below a root that can be read while they are written, by anyone who reads the root.

<root>/logs/<run>/<artifact>.log                    what the driver says of a step
<root>/logs/<run>/<artifact>.ranks/<attempt>-<rank>.log    what a rank of its trainings says

On a disk a log is a file that grows. Where files cannot grow, on object stores, it is a folder of pieces, one every few
seconds at first and every two minutes later on, where there is something to say.
"""

import codecs
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from datasets.files import local, storage
from datasets.files.errors import reason_of
from pipeline.store.redact import redact_line

FOLDER = "logs"
PIECES_S = 5.0, 120.0  # between two pieces: at first, and later on
OF_LIFE = 0.01  # in between, this share of the time since the log began
LAST = 50  # lines that are kept in memory
FORMAT = "%(asctime)s %(levelname)s %(message)s"


def of_step(root: str, run: str, output: str) -> str:
    """The log of the step of a run that makes an artifact."""
    return storage.join(root, FOLDER, run, f"{output}.log")


def of_rank(step_log: str, attempt: int, rank: int) -> str:
    """The log of a rank, beside its step's."""
    return storage.join(f"{step_log.removesuffix('.log')}.ranks", f"{attempt}-{rank}.log")


def ranks(step_log: str) -> dict[tuple[int, int], str]:
    """The logs of a step's ranks by attempt and rank."""
    folder = f"{step_log.removesuffix('.log')}.ranks"
    names = {name.partition(".log")[0] for name in storage.listing(folder) if ".log" in name}
    numbers = {name: name.split("-") for name in names}
    return {
        (int(parts[0]), int(parts[1])): storage.join(folder, f"{name}.log")
        for name, parts in numbers.items()
        if len(parts) == 2 and all(part.isdecimal() for part in parts)
    }


class Tail:
    """A log that is read while it grows: each time what is new in it. Of one in pieces each is fetched once."""

    def __init__(self, path: str):
        self.path = path
        self._bytes, self._pieces = 0, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self) -> str:
        """What it says that was not given before."""
        if storage.is_file(self.path):
            with storage.opened(self.path) as file:
                file.seek(self._bytes)
                content = file.read()
            self._bytes += len(content)
        else:
            pieces = sorted(storage.listing(self.path))[self._pieces :]
            content = b"".join(storage.read_all([storage.join(self.path, piece) for piece in pieces]))
            self._pieces += len(pieces)
        return self._decoder.decode(content)


def can_grow(path: str) -> bool:
    """Whether a file there can be appended to."""
    return not storage.is_remote(path)


class LogFile(logging.Handler):
    """Writes records to a log below a root. What it cannot write, on a full disk or a store that is away, is told once.

    The `last` lines are kept too: where a store fails, they cannot be read from there.

    Raises:
        OSError: it cannot even be begun.
    """

    def __init__(self, path: str, warn: Callable[[str], None]):
        super().__init__()
        self.setFormatter(logging.Formatter(FORMAT))
        self._path, self._warn = path, warn
        self._told = False
        self.last: deque[str] = deque(maxlen=LAST)
        self._began, self._pieces = time.monotonic(), 0
        self._piece = ""  # on its way: one that a store took, and failed to say so, is not put there again with more
        self._waiting, self._guard, self._publishing = "", threading.Lock(), threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if not can_grow(path):
            self._thread = threading.Thread(target=self._work, name="log", daemon=True)
            self._thread.start()
        else:
            local.make_folder(Path(path).parent)
            self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 -- as long as the handler lives

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            line = f"{redact_line(self.format(record))}\n"
            self.last.extend(line.splitlines())
            if self._thread:
                with self._guard:
                    self._waiting += line
            else:
                self._file.write(line)
                self._file.flush()
        except OSError as error:
            self._tell(error)
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Write what waits, where it was not written at once."""
        while self._thread and self._publish():
            pass

    def close(self) -> None:
        """Write what waits."""
        if self._thread:
            self._closing.set()
            self._thread.join()
        else:
            try:
                self._file.close()
            except OSError as error:  # of lines still waiting
                self._tell(error)
        super().close()

    def _work(self) -> None:
        least, most = PIECES_S
        while not self._closing.wait(min(max(least, OF_LIFE * (time.monotonic() - self._began)), most)):
            self.flush()
        self.flush()

    def _publish(self) -> bool:
        """Put the next piece there; whether there was one, and it arrived."""
        with self._publishing:
            if not self._piece:
                with self._guard:
                    self._piece, self._waiting = self._waiting, ""
            if not self._piece:
                return False
            try:
                storage.publish(self._piece.encode(), storage.join(self._path, f"{self._pieces:06}"))
            except Exception as error:  # whatever the store's library raises: the log is no reason to end
                self._tell(error)
                return False
            self._pieces, self._piece = self._pieces + 1, ""
            return True

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            self._warn(f"{self._path} is not complete: {reason_of(error)}")


def attached(handler: LogFile, *names: str) -> Callable[[], None]:
    """Let the loggers of these names write to it, from INFO on; returns what undoes that, and closes it."""
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False  # the screen has words of its own

    def undo() -> None:
        for logger, level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
        handler.close()

    return undo
