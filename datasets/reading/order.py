"""Which sample comes when: endless sequences, each of whose passes holds a share of the rows, by arithmetic alone.

A pass lays all shards out in random order and cuts what they hold into as many stretches as there are lanes, equal to a
row. A lane reads its stretch in windows of a few shards, whose rows it mixes. Of a batch every lane gives the same
number of samples, one lane after the other; so a rank, whose samples of a batch follow each other, reads few lanes, and
no two ranks the same shards but for those that a cut divides. Neither ranks nor what was read before enter anywhere.

Odd lanes read their stretch from its end: what a cut divides, two lanes read at the same time, and a rank that has both
of them reads it once.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

WINDOW = 8  # shards whose rows are mixed, where there is one lane
MIXED = 4096  # rows that a window of several lanes mixes at least: webdataset's usual buffer leaves them less far apart


@dataclass(frozen=True)
class Span:
    """A phase: its first sample and the one after its last, of the whole training, and its batch."""

    start: int
    stop: int
    batch_size: int

    def batch_at(self, position: int) -> tuple[int, int]:
        """Number of the batch in which a sample lies, and its place in there."""
        assert self.start <= position < self.stop
        return divmod(position - self.start, self.batch_size)


def span_at(spans: Sequence[Span], position: int) -> int:
    """Number of the phase in which a sample lies; they are in their order."""
    return bisect_right([span.start for span in spans], position) - 1


def places(start: int, size: int, first: int, rows: int, lanes: int) -> Iterator[tuple[int, int, int]]:
    """Lane, place in its sequence, and count of the samples `first` to `first + rows` of a batch, by lanes.

    `start` is the batch's first sample in the sequence of all lanes, of which all batches are multiples of `lanes`.
    """
    assert start % lanes == size % lanes == 0, f"a batch of {size} at {start} does not divide among {lanes} lanes"
    each = size // lanes
    for lane in range(first // each, -(-(first + rows) // each)):
        begin, end = max(first, lane * each), min(first + rows, (lane + 1) * each)
        yield lane, start // lanes + begin - lane * each, end - begin


def share_read(lanes: int, world: int) -> float:
    """How many times the data so many ranks read in a pass, with shards enough."""
    return (lanes + world - math.gcd(lanes, world)) / lanes


@dataclass(frozen=True)
class _Piece:
    """Rows of a shard, from one to before another in the order of the pass; of most shards all."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """A stretch of a lane: the pass that it belongs to, its number in there, its samples, its shards."""

    epoch: int
    index: int
    start: int
    stop: int
    shards: tuple[int, ...]


class Order:
    """The order of the samples of shards with so many rows each, in so many lanes, by a seed.

    Args:
        counts: rows by shard; none is 0.
        window: shards whose rows are mixed.
    """

    def __init__(self, counts: Mapping[int, int], seed: int, window: int, lanes: int = 1):
        self._counts, self._seed, self._window, self.lanes = counts, seed, window, lanes
        self.rows = sum(counts.values())
        self._pass = lru_cache(maxsize=3)(self._laid_out)
        self._windows = lru_cache(maxsize=3 * lanes)(self._make_windows)
        self._mixed = lru_cache(maxsize=2 * lanes)(self._mix)

    def window_of(self, lane: int, place: int) -> Window:
        """The window in which a sample of a lane lies."""
        epoch = ((place + 1) * self.lanes - 1 - lane) // self.rows
        begin = self._begin(lane, epoch)
        starts, windows = self._windows(lane, epoch)
        index = bisect_right(starts, place - begin) - 1
        shards = tuple(piece.shard for piece in windows[index])
        return Window(epoch, index, begin + starts[index], begin + starts[index + 1], shards)

    def samples(self, lane: int, place: int, rows: int) -> Iterator[tuple[int, int, int]]:
        """Pass, shard and row of the samples of a lane from a place on."""
        end = place + rows
        while place < end:
            window = self.window_of(lane, place)
            stop = min(end, window.stop)
            mixed = self._mixed(lane, window.epoch, window.index)
            for shard, row in mixed[place - window.start : stop - window.start].tolist():
                yield window.epoch, shard, row
            place = stop

    def needed(self, lane: int, place: int, rows: int) -> list[Window]:
        """The windows of the samples of a lane from a place on, and the one that follows."""
        found = [self.window_of(lane, place)]
        while found[-1].start < place + rows:
            found.append(self.window_of(lane, found[-1].stop))
        return found

    def first(self, rows: int) -> Iterator[tuple[int, int, int]]:
        """Lane, place and count of the first samples of the first pass, at most so many, from as few lanes as hold
        them."""
        for lane in range(self.lanes):
            count = min(rows, self._begin(lane, 1))
            if count:
                yield lane, 0, count
            rows -= count

    def _begin(self, lane: int, epoch: int) -> int:
        """Place of a lane's first sample of a pass: after as many passes no two lanes differ by more than a sample."""
        return (epoch * self.rows + lane) // self.lanes

    def _before(self, lane: int, epoch: int) -> int:
        """Samples that all lanes before this one take up to a pass: the sum of their `_begin`."""
        each, left = divmod(epoch * self.rows, self.lanes)
        return lane * each + max(0, lane + left - self.lanes)

    def _laid_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of a pass, and the number of rows up to each one's end."""
        permuted = np.random.default_rng((self._seed, epoch)).permutation(list(self._counts))
        return permuted, np.cumsum([self._counts[shard] for shard in permuted.tolist()])

    def _make_windows(self, lane: int, epoch: int) -> tuple[list[int], list[list[_Piece]]]:
        """Where each window of a lane's stretch of a pass starts in it, with its end, and what they are of."""
        start, stop = (self._before(lane + at, epoch + 1) - self._before(lane + at, epoch) for at in (0, 1))
        pieces = self._pieces(epoch, start, stop)
        if lane % 2:
            pieces.reverse()
        windows = [pieces[at : at + self._window] for at in range(0, len(pieces), self._window)]
        rows = [sum(piece.stop - piece.start for piece in window) for window in windows]
        return [0, *accumulate(rows)], windows

    def _pieces(self, epoch: int, start: int, stop: int) -> list[_Piece]:
        """The rows of a pass from one to before another."""
        shards, ends = self._pass(epoch)
        found = []
        for at in range(int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, stop, "left")) + 1):
            if start < stop:
                count = self._counts[int(shards[at])]
                begin = int(ends[at]) - count
                found.append(_Piece(int(shards[at]), max(start - begin, 0), min(stop - begin, count)))
        return found

    def _mix(self, lane: int, epoch: int, index: int) -> np.ndarray:
        """All rows of a window in random order: int64 (rows, 2) of shard and row in it."""
        _, windows = self._windows(lane, epoch)
        rows = [(np.full(piece.stop - piece.start, piece.shard), self._rows(epoch, piece)) for piece in windows[index]]
        pairs = np.stack([np.concatenate(column) for column in zip(*rows, strict=True)], 1).astype(np.int64)
        # a seed's trailing zeros say nothing: the first lane draws as an only one
        return np.random.default_rng((self._seed, epoch, index, lane)).permutation(pairs)

    def _rows(self, epoch: int, piece: _Piece) -> np.ndarray:
        """Rows of a piece: which of a divided shard's are whose is drawn for each pass."""
        count = self._counts[piece.shard]
        if piece.stop - piece.start == count:
            return np.arange(count)
        drawn = np.random.default_rng((self._seed, epoch, piece.shard, 0, 1)).permutation(count)
        return drawn[piece.start : piece.stop]
