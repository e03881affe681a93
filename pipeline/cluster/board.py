"""The board: one small actor through which workers tell the driver how far they are, and hear whether to stop."""

import pickle
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, TypeVar

from datasets.files import notices
from datasets.files.notices import Retry
from pipeline.cluster.answers import get
from pipeline.cluster.messages import Message
from pipeline.cluster.ranks.watchdog import Pulses
from pipeline.errors import InfrastructureError
from pipeline.store.redact import hide_all

T = TypeVar("T")


class Board:
    """What workers tell the driver, and whether they should stop. Runs as an actor without a CPU of its own.

    Where its node dies, Ray starts it anew: messages that nobody has fetched are lost, the wish to stop comes again
    with the next exchange.
    """

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._stop = False
        self._job, self._pulses = 0, Pulses()

    def post(self, message: Message, job: int = 0) -> None:
        """Leave a message for the driver; a rank's tells its job, and what one of an earlier job says is passed over.

        A frozen node may send it when the next attempt has begun, and does the same steps again.
        """
        if job in (0, self._job) or job > self._job:
            self._messages.append(message)
            if isinstance(message, Retry):
                self._pulses.storage_fails()

    def exchange(self, stop: bool) -> list[Message]:
        """The driver's visit: tell whether to stop, take the messages along."""
        self._stop = stop
        messages, self._messages = self._messages, []
        return messages

    def stopping(self) -> bool:
        """Whether workers should save and return."""
        return self._stop

    def begin_job(self, job: int) -> None:
        """Forget the ranks of the jobs before; jobs are numbered in their order."""
        self._job, self._pulses = job, Pulses()

    def beat(self, job: int, rank: int, step: int, doing: str, seconds: float, stall_s: float) -> str | None:
        """A rank's pulse; answers the stall of its job. One that a frozen node sent late must not end a later job."""
        if job > self._job:  # this actor was started anew
            self.begin_job(job)
        return self._pulses.beat(rank, step, doing, seconds, stall_s) if job == self._job else "this attempt is over"

    def rest(self, job: int, rank: int) -> None:
        """A rank has no pulse for now."""
        if job == self._job:
            self._pulses.rest(rank)

    def stall(self) -> str | None:
        """The stall of the job, if it was in one."""
        return self._pulses.stall


class BoardClient:
    """A worker's view of the board."""

    def __init__(self, board: Any, job: int = 0):
        self._board, self._job = board, job
        self._asked = 0.0
        self._stopping = False

    def post(self, message: Message) -> None:
        """Leave a message for the driver, without waiting."""
        self._board.post.remote(message, self._job)

    def stopping(self) -> bool:
        """Whether to save and return; asks the board at most twice a second."""
        if time.monotonic() - self._asked > 0.5:
            self._stopping = get(self._board.stopping.remote())
            self._asked = time.monotonic()
        return self._stopping

    def beat(self, rank: int, step: int, doing: str, seconds: float, stall_s: float) -> str | None:
        """What this rank does; returns the stall that its job is in. None too while the board starts anew."""
        try:
            found: str | None = get(self._board.beat.remote(self._job, rank, step, doing, seconds, stall_s))
        except InfrastructureError:
            return None
        return found

    def rest(self, rank: int) -> None:
        """This rank has no pulse for now."""
        self._board.rest.remote(self._job, rank)


def heard(board: Any, hidden: Iterable[str], work: Callable[..., T], *arguments: Any) -> T:
    """Do a piece of work, and tell the driver what the storage has to get over meanwhile.

    Whatever is written here leaves out what the driver has `hidden` of its environment, as all do that write there.
    """
    hide_all(hidden)
    with notices.heard_by(BoardClient(board).post):
        return work(*arguments)


class Raised(Exception):
    """What a worker of Ray Data raised, in one piece: Ray would lose it in an error of its own, or add to its words."""

    def __init__(self, error: Exception, *added: object) -> None:
        super().__init__(error)
        self.error = error


class HeardActor:
    """A `worker(*arguments)` for one pickled shard a batch, whose driver is told what the storage has to get over.

    What the driver has `hidden` is left out of whatever it writes. It may be called by several threads at once: what is
    got over is told once, by the whole process.
    """

    def __init__(self, board: Any, hidden: Iterable[str], worker: type, *arguments: Any):
        hide_all(hidden)
        self._telling = ExitStack()
        self._telling.enter_context(notices.heard_by(BoardClient(board).post))  # for as long as the actor lives
        self._failed: Exception | None = None
        try:
            self._work = worker(*arguments)
        except Exception as error:  # told by the first call: of an actor that never was, Ray tells nothing else
            self._failed = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bool]]:
        try:
            if self._failed:
                raise self._failed
            self._work(pickle.loads(batch["shard"][0]))
        except Exception as error:
            raise Raised(error) from error
        return {"done": [True]}
