"""A simulated store and its writers: latencies, stalls and deaths as a seed has them, in time that costs nothing.

What runs in a `World` is the real code, in threads of which one runs at a time: each touch of the store and each pause
is an event, and the earliest goes next. Equal seeds give equal schedules.
"""

import contextlib
import errno
import heapq
import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from datasets.files import storage
from datasets.files.errors import told
from datasets.files.storage import FileEntry
from pipeline.store import claims
from pipeline.store.process import ProcessId


def locked() -> threading.Lock:
    """A lock that somebody else will open."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Killed(BaseException):
    """The process ends here; nothing that it does afterwards has an effect."""


@dataclass(eq=False)
class Process:
    """Somebody who writes to the store, on a host of their own."""

    number: int
    dead: bool = False

    @property
    def id(self) -> ProcessId:
        return ProcessId(f"host {self.number}", self.number, 0.0, f"boot {self.number}", "pid:[1]")


@dataclass(eq=False)
class Task:
    """A thread of a process."""

    process: Process
    turn: threading.Lock = field(default_factory=lambda: locked())
    ended: bool = False


class World:
    """Files by path, and what goes on.

    Args:
        seed: of all that is random.
        stalls: share of touches before or after which a thread stands still for up to `stall_s`.
        kills: share of touches at which the process dies.
    """

    def __init__(self, seed: int, stalls: float = 0.0, kills: float = 0.0, stall_s: float = 0.0):
        self.random = random.Random(seed)
        self.stalls, self.kills, self.stall_s = stalls, kills, stall_s
        self.files: dict[str, bytes] = {}
        self.now, self.touches = 0.0, 0
        self.wrong: list[str] = []
        self.on_last_word: Callable[[str], None] = lambda path: None  # is about to be put, in one step
        self._events: list[tuple[float, int, Task]] = []
        self._order = itertools.count()
        self._current: Task
        self._over = locked()

    @property
    def process(self) -> Process:
        """Of the thread that runs."""
        return self._current.process

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let others go on for so long."""
        me = self._current
        heapq.heappush(self._events, (self.now + seconds, next(self._order), me))
        if self._next() is not me:
            me.turn.acquire()
        if me.process.dead:
            raise Killed

    def start(self, process: Process, work: Callable[[], None], after: float = 0.0) -> Task:
        """A new thread of a process."""
        task = Task(process)

        def run() -> None:
            task.turn.acquire()
            try:
                if not process.dead:
                    work()
            except Killed:
                pass
            except BaseException as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
            task.ended = True
            self._next()

        threading.Thread(target=run, daemon=True).start()
        heapq.heappush(self._events, (self.now + after, next(self._order), task))
        return task

    def run(self) -> None:
        """Let everything go on to its end."""
        self._next()
        self._over.acquire()

    def _next(self) -> Task | None:
        """Wake whose turn it is; it is told, as it may be who asks."""
        if not self._events:
            self._over.release()
            return None
        before = getattr(self, "_current", None)
        self.now, _, task = heapq.heappop(self._events)
        self._current = task
        if task is not before or task.ended:
            task.turn.release()
        return task

    def touch(self) -> None:
        """Time that passes on the way to the store or back; where a process may stand still, or die."""
        self.touches += 1
        if self.random.random() < self.kills:
            self.process.dead = True
            raise Killed
        late = self.random.random() < self.stalls
        self.sleep(self.random.uniform(0, self.stall_s) if late else self.random.expovariate(20))

    def _below(self, folder: str) -> list[str]:
        return [path for path in self.files if path.startswith(f"{folder}/")]

    def exists(self, path: str) -> bool:
        self.touch()
        found = path in self.files or bool(self._below(path))
        self.touch()
        return found

    def read(self, path: str, expect: FileEntry | None = None) -> bytes:
        self.touch()
        if path not in self.files:
            raise told(FileNotFoundError(path), path)
        return self.files[path]

    def publish(self, content: bytes, path: str) -> FileEntry:
        self.touch()
        self.on_last_word(path)
        self.files[path] = content
        self.touch()
        return storage.entry_of(content)

    def create(self, content: bytes, path: str) -> bool:
        self.touch()
        if path in self.files:
            return False
        self.files[path] = content
        self.touch()
        return True

    def move(self, source: str, target: str) -> None:
        """A file, or a folder, for which its place must be free."""
        self.touch()
        doomed = [source] if source in self.files else self._below(source)
        if not doomed:
            raise told(FileNotFoundError(source), source)
        if source not in self.files and self._below(target):
            raise told(OSError(errno.ENOTEMPTY, "not empty"), target)
        self.on_last_word(target)
        for path in doomed:
            self.files[target + path.removeprefix(source)] = self.files.pop(path)
        self.touch()

    def listing(self, folder: str) -> list[str]:
        self.touch()
        return sorted(path.removeprefix(f"{folder}/") for path in self._below(folder))

    def sizes(self, folder: str) -> dict[str, int]:
        self.touch()
        return {path.removeprefix(f"{folder}/"): len(self.files[path]) for path in self._below(folder)}

    def remove(self, path: str) -> None:
        """A folder's files go one by one, in any order."""
        doomed = [path] if path in self.files else self._below(path)
        self.random.shuffle(doomed)
        for name in doomed or [path]:
            self.touch()
            self.files.pop(name, None)
        self.touch()

    def remove_all(self, paths: Sequence[str]) -> None:
        for path in paths:
            self.remove(path)

    def sweep(self, folder: str, fence: Callable[[], None]) -> None:
        """Nothing is ever half-written here."""

    @contextlib.contextmanager
    def beating(self, beat: Callable[[], None], what: str, every_s: float) -> Iterator[None]:
        """The heartbeats of a claim, in place of `claims._beating`."""
        stopped = False

        def pause() -> bool:
            self.sleep(every_s)
            return stopped

        task = self.start(self.process, lambda: claims._beat(beat, what, pause))
        try:
            yield
        finally:
            stopped = True
            while not task.ended:
                self.sleep(0.1)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the store and the threads of heartbeats be this world's."""
        with pytest.MonkeyPatch.context() as patch:
            for name in (
                "exists",
                "read",
                "publish",
                "create",
                "move",
                "listing",
                "sizes",
                "remove",
                "remove_all",
                "sweep",
            ):
                patch.setattr(storage, name, getattr(self, name))
            patch.setattr(claims, "_beating", self.beating)
            patch.setattr(ProcessId, "own", classmethod(lambda cls: self.process.id))
            yield


def pace(world: World) -> Any:
    """Of claims in a world: heartbeats of a second, silence of six."""
    return claims.Pace(heartbeat_s=1.0, silence_s=6.0, look_s=1.0, clock=world)
