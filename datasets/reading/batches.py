"""Training batches: which sample comes when is arithmetic, so any rank can read any stretch at any time.

The samples of all epochs form one endless sequence; each epoch is a permutation of all rows, or of those that
a view chooses. Shards are permuted first, then rows are shuffled within windows of a few shards, so that reading
stays local. The sequence is a pure function of the seed (and the view): neither the number of ranks nor the batch
size enters, and resuming is reading on.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from datasets.buckets import Size
from datasets.config import DataError
from datasets.files import storage
from datasets.files.cache import VerifiedFiles
from datasets.files.storage import CorruptFile
from datasets.formats import shards
from datasets.formats.shard_table import Shards
from datasets.formats.shards import ImageRow
from datasets.reading.views import View

WINDOW = 8  # shards whose rows are mixed
DECODED_BYTES = 64 << 20  # decoded pictures that are kept of a shard


@dataclass(frozen=True)
class Source:
    """A field of the batches: `image` for a folder of tars, else the name of the tensors in Parquet files.

    A shard whose file is not what `shards` say of it is refused. Pictures are cropped and resized to `size`; None takes
    them as they are stored.
    """

    field: str
    shards: Shards
    size: Size | None = None

    @property
    def folder(self) -> str:
        """Where the shards lie."""
        return self.shards.folder


class Batches:
    """Samples of several artifacts made from the same pictures, joined shard by shard and compared by key.

    Held are the shards of the window that is being read and, read in a thread meanwhile, those of the next one: tensors
    as they lie in their file (a mapped one takes no memory of its own; int8 is copied), pictures encoded, and as many
    of them decoded as `DECODED_BYTES` allows.

    Args:
        bucket: whose shards alone are read.
        files: what the shards are read through; None verifies each file once for this reader.
        view: the pictures to choose; None = all.

    Raises:
        DataError: there is no row at all.
        CorruptFile: the artifacts differ in their shards, or the view is of others.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        window: int = WINDOW,
        bucket: str | None = None,
        files: VerifiedFiles | None = None,
        view: View | None = None,
    ):
        self._sources = tuple(sources)
        self._stored = _common_counts(sources, bucket)
        self._counts = self._stored if view is None else view.counts(self._stored)
        self._places = None if view is None else lru_cache(maxsize=window)(view.places)
        self._seed = seed
        self._window = window
        self.rows = sum(self._counts.values())
        if self.rows == 0:
            raise DataError(f"{sources[0].folder} holds no rows: raise data.limit or loosen data.filters")
        self._windows = lru_cache(maxsize=2)(self._make_windows)
        self._mixed = lru_cache(maxsize=2)(self._mix)
        self._files = files or VerifiedFiles()
        self._shards = Ahead(self._load)

    def read(self, start: int, rows: int) -> dict[str, np.ndarray]:
        """The samples `start` to `start + rows` of the endless sequence, each field stacked.

        Returns:
            `image` as uint8 (rows, 3, H, W); tensors as (rows, *shape) in their stored dtype; `key` as uint8
            (rows, 16).

        Raises:
            DataError: the data has fewer rows than that, so that one batch would repeat a sample.
            CorruptFile: a shard is not what its manifest says, or two artifacts differ in its keys.
        """
        if rows > self.rows:
            raise DataError(
                f"a batch takes {rows} rows, but the data has only {self.rows}: "
                "lower batch_size of the training or raise data.limit"
            )
        return self.stretch(start, rows)

    def first(self, rows: int) -> dict[str, np.ndarray]:
        """The first samples, at most so many, as `read` gives them."""
        return self.read(0, min(rows, self.rows))

    def first_shards(self, rows: int) -> set[int]:
        """Numbers of the shards in which the first samples lie."""
        return {self._place(position)[0] for position in range(min(rows, self.rows))}

    def stretch(self, start: int, rows: int) -> dict[str, np.ndarray]:
        """As `read`, of any length: beyond the data's, samples repeat."""
        self._shards.hold(self._needed(start, start + rows - 1))
        places = [self._place(position) for position in range(start, start + rows)]
        samples = [(self._shards[shard], row) for shard, row in places]
        fields = ("key", *(source.field for source in self._sources))
        return {field: np.stack([shard[field][row] for shard, row in samples]) for field in fields}

    def _place(self, position: int) -> tuple[int, int]:
        """Shard of a sample, and its place in there."""
        epoch, index, offset = self._window_of(position)
        shard, row = self._mixed(epoch, index)[offset].tolist()
        return shard, row if self._places is None else int(self._places(shard)[row])

    def _window_of(self, position: int) -> tuple[int, int, int]:
        """Epoch of a sample, its window in there, and its place in that."""
        epoch, offset = divmod(position, self.rows)
        starts, _ = self._windows(epoch)
        index = bisect_right(starts, offset) - 1
        return epoch, index, offset - starts[index]

    def _needed(self, first: int, last: int) -> list[int]:
        """Shards of the windows of two samples, of all between them, and of the one that follows."""
        (epoch, index, _), end = self._window_of(first), self._window_of(last)[:2]
        needed: list[int] = []
        while True:
            _, windows = self._windows(epoch)
            needed += windows[index]
            if (epoch, index) > end:
                return needed
            epoch, index = (epoch, index + 1) if index + 1 < len(windows) else (epoch + 1, 0)

    def _make_windows(self, epoch: int) -> tuple[list[int], list[list[int]]]:
        """First sample and shards of each window of an epoch."""
        windows = shard_windows(list(self._counts), seed=self._seed, epoch=epoch, window=self._window)
        rows = [sum(self._counts[shard] for shard in window) for window in windows]
        return [0, *accumulate(rows[:-1])], windows

    def _mix(self, epoch: int, index: int) -> np.ndarray:
        _, windows = self._windows(epoch)
        counts = {shard: self._counts[shard] for shard in windows[index]}
        return mixed_rows(counts, seed=self._seed, epoch=epoch, index=index)

    def _load(self, shard: int) -> "dict[str, _Samples]":
        """All fields of a shard."""
        read = {source.field: _read(source, shard, self._stored[shard], self._files) for source in self._sources}
        first, *others = (keys for keys, _ in read.values())
        if any(keys != first for keys in others):
            folders = ", ".join(source.folder for source in self._sources)
            raise CorruptFile(f"shard {shard} has other keys in one of {folders}; delete the wrong one and run again")
        raw = np.frombuffer(bytes.fromhex("".join(first)), np.uint8).reshape(-1, 16)
        return {"key": raw, **{field: samples for field, (_, samples) in read.items()}}


def shard_windows(numbers: Sequence[int], *, seed: int, epoch: int, window: int) -> list[list[int]]:
    """The shards of an epoch in random order, in groups of `window`."""
    permuted = np.random.default_rng((seed, epoch)).permutation(numbers).tolist()
    return [permuted[start : start + window] for start in range(0, len(permuted), window)]


def mixed_rows(counts: Mapping[int, int], *, seed: int, epoch: int, index: int) -> np.ndarray:
    """All rows of an epoch's window number `index` in random order: int64 (rows, 2) of shard and place in it.

    `counts` gives the rows of each of its shards.
    """
    pairs = np.array([(shard, row) for shard, count in counts.items() for row in range(count)], np.int64)
    return np.random.default_rng((seed, epoch, index)).permutation(pairs)


class Ahead:
    """Things by number, made by `load` in a thread before they are asked for."""

    def __init__(self, load: Callable[[int], Any]):
        self._load = load
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._held: dict[int, Future[Any]] = {}

    def hold(self, numbers: Sequence[int]) -> None:
        """Start on those that are new, in their order; let go of all others."""
        for number in self._held.keys() - set(numbers):
            self._held.pop(number).cancel()
        for number in numbers:
            if number not in self._held:
                self._held[number] = self._pool.submit(self._load, number)

    def __getitem__(self, number: int) -> Any:
        """What `load` made of a number that is held; or raises what it raised."""
        return self._held[number].result()


class _Samples(Protocol):
    """The values of a field for the rows of a shard."""

    def __getitem__(self, row: int, /) -> np.ndarray: ...


class _Pictures:
    """The pictures of a shard, decoded when they are asked for: uint8 (3, H, W) each."""

    def __init__(self, rows: Sequence[ImageRow], size: Size | None):
        self._rows, self._size = rows, size
        self._decoded = lru_cache(maxsize=DECODED_BYTES // self._decode(0).nbytes)(self._decode)

    def __getitem__(self, row: int, /) -> np.ndarray:
        return self._decoded(row)

    def _decode(self, row: int) -> np.ndarray:
        return self._rows[row].pixels(self._size).transpose(2, 0, 1)


def _common_counts(sources: Sequence[Source], bucket: str | None) -> dict[int, int]:
    """Rows of each shard that has any, by shard number, of one bucket or all; the same in all sources."""
    counts = [source.shards.counts(bucket) for source in sources]
    for source, other in zip(sources, counts, strict=True):
        if other != counts[0]:
            raise CorruptFile(
                f"{source.folder} and {sources[0].folder} differ in their shards; delete one and run again"
            )
    return {shard: rows for shard, rows in counts[0].items() if rows}


def _read(source: Source, shard: int, count: int, files: VerifiedFiles) -> tuple[list[str], _Samples]:
    """Keys and samples of one field of a shard."""
    name = shards.image_name(shard) if source.field == "image" else shards.tensor_name(shard)
    content = files.read(storage.join(source.folder, name), source.shards[shard].files[name])
    if source.field == "image":
        rows = shards.read_images(content.tobytes(), count)
        return [row.key for row in rows], _Pictures(rows, source.size)
    return shards.read_tensors(content, source.field)
