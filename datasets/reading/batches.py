"""Training batches: which sample comes when is arithmetic, so any rank can read any stretch at any time.

The samples of all epochs form one endless sequence; each epoch is a permutation of all rows, or of those that
a view chooses. Shards are permuted first, then rows are shuffled within windows of a few shards, so that reading
stays local; in several lanes (`order`), each rank reads a part of the shards. The sequence is a pure function of the
seed (and the view, and with lanes the batch sizes): the number of ranks does not enter, and resuming is reading on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
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
from datasets.reading import captions
from datasets.reading.captions import Drawn
from datasets.reading.order import MIXED, WINDOW, Order, Span, places, span_at
from datasets.reading.views import View

LOADERS = 4  # threads, where there are several lanes, whose windows may end at once, and on a store, which answers late
DECODED_BYTES = 64 << 20  # decoded pictures that are kept of a shard of each lane


@dataclass(frozen=True)
class Source:
    """A field of the batches: `image` for a folder of tars, else the name of the tensors in Parquet files.

    A shard whose file is not what `shards` say of it is refused. Pictures are cropped and resized to `size`; None takes
    them as they are stored. With weights for `captions`, the tensors are of captions, of which a picture has several:
    one is drawn in each pass.
    """

    field: str
    shards: Shards
    size: Size | None = None
    captions: Mapping[str, float] | None = None

    @property
    def folder(self) -> str:
        """Where the shards lie."""
        return self.shards.folder


class Batches:
    """Samples of several artifacts made from the same pictures, joined shard by shard and compared by key.

    Held are the shards of the windows that are being read and, read in threads meanwhile, those of the next ones:
    tensors as they lie in their file (a mapped one takes no memory of its own; int8 is copied), pictures encoded, and
    as many of them decoded as `DECODED_BYTES` allows.

    Args:
        window: shards whose rows are mixed; None: `WINDOW`, and with several lanes as many as hold `MIXED` rows.
        bucket: whose shards alone are read.
        files: what the shards are read through; None verifies each file once for this reader.
        view: the pictures to choose; None = all.
        lanes: in which the samples come; above 1 it divides all batches.
        spans: all phases of the training, which `read` needs to know its batches, where there are several lanes.

    Raises:
        DataError: there is no row at all.
        CorruptFile: the artifacts differ in their shards, or the view is of others.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        window: int | None = None,
        bucket: str | None = None,
        files: VerifiedFiles | None = None,
        view: View | None = None,
        lanes: int = 1,
        spans: Sequence[Span] = (),
    ):
        self._sources = tuple(sources)
        self._stored = _common_counts(sources, bucket)
        counts = self._stored if view is None else view.counts(self._stored)
        self.rows = sum(counts.values())
        if self.rows == 0:
            raise DataError(f"{sources[0].folder} holds no rows: take more data (data.limit, data.filters)")
        window = window or mixing(self._stored, lanes)
        self._order = Order(counts, seed, window, lanes)
        self._places = None if view is None else lru_cache(maxsize=lanes * window)(view.places)
        self._seed, self._spans = seed, tuple(spans)
        self._files = files or VerifiedFiles()
        late = any(storage.is_remote(source.folder) for source in sources)
        self._shards = Ahead(self._load, LOADERS if late else min(LOADERS, lanes))

    def read(self, start: int, rows: int) -> dict[str, np.ndarray]:
        """The samples `start` to `start + rows` of the training, each field stacked; with lanes, of one batch.

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
                "lower batch_size of the training, or take more data (data.limit, data.filters)"
            )
        if self._order.lanes == 1:
            return self.stretch(start, rows)
        span = self._spans[span_at(self._spans, start)]
        _, first = span.batch_at(start)
        return self.part(start - first, span.batch_size, first, rows)

    def first(self, rows: int) -> dict[str, np.ndarray]:
        """The first samples, at most so many, as of `read`; of several captions the first, as it was planned."""
        return self._stacked(list(self._order.first(rows)), drawn=False)

    def first_shards(self, rows: int) -> set[int]:
        """Numbers of the shards in which the first samples lie."""
        return {shard for stretch in self._order.first(rows) for _, shard, _ in self._order.samples(*stretch)}

    def stretch(self, start: int, rows: int) -> dict[str, np.ndarray]:
        """As `read` without lanes, of any length: beyond the data's, samples repeat."""
        return self.part(start, rows, 0, rows)

    def part(self, start: int, size: int, first: int, rows: int) -> dict[str, np.ndarray]:
        """Samples `first` to `first + rows` of the batch of `size` at `start` of this sequence, as of `read`."""
        return self._stacked(list(places(start, size, first, rows, self._order.lanes)), drawn=True)

    def _stacked(self, stretches: Sequence[tuple[int, int, int]], *, drawn: bool) -> dict[str, np.ndarray]:
        """Samples of stretches of lanes, as of `read`; of several captions the one that is drawn, or the first."""
        self._shards.hold(self._needed(stretches))
        samples = [
            (self._shards[shard], self._row(shard, place), epoch if drawn else None)
            for stretch in stretches
            for epoch, shard, place in self._order.samples(*stretch)
        ]
        fields = ("key", *(source.field for source in self._sources))
        return {field: np.stack([_of(shard[field], row, epoch) for shard, row, epoch in samples]) for field in fields}

    def _row(self, shard: int, place: int) -> int:
        """A sample's row in its shard, from its place among those that the view chooses of it."""
        return place if self._places is None else int(self._places(shard)[place])

    def _needed(self, stretches: Iterable[tuple[int, int, int]]) -> list[int]:
        """Shards of the windows of stretches, then of those that follow."""
        windows = [self._order.needed(*stretch) for stretch in stretches]
        now, then = [one for found in windows for one in found[:-1]], [found[-1] for found in windows]
        return [shard for window in (*now, *then) for shard in window.shards]

    def _load(self, shard: int) -> "dict[str, _Samples | Drawn]":
        """All fields of a shard."""
        count = self._stored[shard]
        decoded = DECODED_BYTES // self._order.lanes
        read = {source.field: _read(source, shard, count, self._files, self._seed, decoded) for source in self._sources}
        first, *others = (keys for keys, _ in read.values())
        if any(keys != first for keys in others):
            folders = ", ".join(source.folder for source in self._sources)
            raise CorruptFile(f"shard {shard} has other keys in one of {folders}; delete the wrong one and run again")
        raw = np.frombuffer(bytes.fromhex("".join(first)), np.uint8).reshape(-1, 16)
        return {"key": raw, **{field: samples for field, (_, samples) in read.items()}}


def mixing(counts: Mapping[int, int], lanes: int) -> int:
    """Shards with so many rows each that a window mixes: with several lanes, few but for small ones."""
    return WINDOW if lanes == 1 else -(-MIXED * len(counts) // sum(counts.values()))


class Ahead:
    """Things by number, made by `load` in threads before they are asked for."""

    def __init__(self, load: Callable[[int], Any], threads: int = 1):
        self._load = load
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="shards")
        self._held: dict[int, Future[Any]] = {}

    def hold(self, numbers: Sequence[int]) -> None:
        """Start on those that are new, in their order; let go of all others."""
        for number in self._held.keys() - set(numbers):
            self._held.pop(number).cancel()
        for number in numbers:
            if number not in self._held:
                self._held[number] = self._pool.submit(self._load, number)

    def close(self) -> None:
        """Wait for what is being loaded, and begin no more."""
        self._pool.shutdown(cancel_futures=True)

    def __getitem__(self, number: int) -> Any:
        """What `load` made of a number that is held; or raises what it raised."""
        return self._held[number].result()


class _Samples(Protocol):
    """The values of a field for the rows of a shard."""

    def __getitem__(self, row: int, /) -> np.ndarray: ...


class _Pictures:
    """The pictures of a shard, decoded when they are asked for: uint8 (3, H, W) each."""

    def __init__(self, rows: Sequence[ImageRow], size: Size | None, most_bytes: int):
        self._rows, self._size = rows, size
        self._decoded = lru_cache(maxsize=most_bytes // self._decode(0).nbytes)(self._decode)

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


def _of(samples: _Samples | Drawn, row: int, epoch: int | None) -> np.ndarray:
    """A field's value of a row, in an epoch; None: the first of several."""
    if isinstance(samples, Drawn):
        return samples.first(row) if epoch is None else samples.of(row, epoch)
    return samples[row]


def _read(
    source: Source, shard: int, count: int, files: VerifiedFiles, seed: int, decoded: int
) -> tuple[list[str], _Samples | Drawn]:
    """Keys and samples of one field of a shard."""
    name = shards.image_name(shard) if source.field == "image" else shards.tensor_name(shard)
    content = files.read(storage.join(source.folder, name), source.shards[shard].files[name])
    if source.field == "image":
        rows = shards.read_images(content.tobytes(), count)
        return [row.key for row in rows], _Pictures(rows, source.size, decoded)
    keys, values = shards.read_tensors(content, source.field)
    if source.captions is None:
        return keys, values
    drawn = Drawn(keys, captions.names(content), values, source.captions, seed)
    return drawn.keys, drawn
