"""Mapping shards: what is made of one is published, then its receipt; what has a receipt is never made again.

A step gives a worker: an object that is called with a shard's number and with what stands for it, and returns what it
has made of it. Everything else that an actor does is here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from datasets.files import storage
from datasets.files.fence import Fence
from datasets.formats import shards
from datasets.formats.rounding import Rounding
from datasets.formats.shards import Clock, Receipt
from pipeline.cluster.messages import Advanced

T = TypeVar("T")


@dataclass(frozen=True)
class Made:
    """What was made of a shard's `rows`: contents by file name, and what its receipt tells of the rows.

    Those that did not come out are counted in `dropped` by cause; `counts` are of those that did.
    """

    rows: int
    files: Mapping[str, bytes]
    dropped: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    bucket: str | None = None
    rounding: Rounding | None = None

    def publish(self, folder: str, shard: int, clock: Clock, fence: Fence) -> Receipt:
        """Put the files into a folder, then the receipt, which `fence` may refuse."""
        return shards.publish_receipt(
            folder,
            shard,
            rows_in=self.rows,
            rows_out=self.rows - sum(self.dropped.values()),
            files={name: storage.publish(content, storage.join(folder, name)) for name, content in self.files.items()},
            clock=clock,
            dropped=self.dropped,
            counts=self.counts,
            bucket=self.bucket,
            rounding=self.rounding,
            fence=fence,
        )


class Worker(Protocol):
    """What a step gives to be called with each shard; its models are loaded when it is made, once an actor."""

    def __call__(self, number: int, work: Any, /) -> Made:
        """What is made of a shard."""


def chunked(rows: Sequence[T], size: int) -> dict[int, Sequence[T]]:
    """Rows that lie in no shards, so many at a time, by number."""
    return {n: rows[start : start + size] for n, start in enumerate(range(0, len(rows), size))}


class ShardActor:
    """An actor: has `worker(*arguments)` make something of a shard, publishes it, and tells the board.

    It is called with number and work, and does nothing once the run is to stop.
    """

    def __init__(
        self,
        worker: Callable[..., Worker],
        arguments: tuple[Any, ...],
        total: int,
        unit: str,
        folder: str,
        fence: Fence,
        board: Any,
    ):
        from pipeline.cluster.board import BoardClient  # imports Ray

        self._work, self._board = worker(*arguments), BoardClient(board)
        self._total, self._unit = total, unit
        self._folder, self._fence = folder, fence

    def __call__(self, numbered: tuple[int, Any]) -> None:
        number, work = numbered
        if not self._board.stopping():
            clock = Clock()
            made = self._work(number, work)
            made.publish(self._folder, number, clock, self._fence)
            self._board.post(Advanced(made.rows, self._total, self._unit))
