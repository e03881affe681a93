"""Training batches of one bucket each, so that every batch has one shape; by arithmetic, as in `batches`.

Each bucket has an endless sequence of its own samples, each of its epochs a permutation of all its rows. A schedule
says which bucket a batch comes from, and so where in that sequence it lies. Both are pure functions of the seed and
the training's phases: the number of ranks does not enter, and resuming is reading on.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from datasets.buckets import Frame, Size
from datasets.config import DataError
from datasets.files.cache import VerifiedFiles
from datasets.reading.batches import Batches, Source, mixing
from datasets.reading.order import Span, span_at
from datasets.reading.views import View


class BucketBatches:
    """Batches of one bucket each; their pictures have that size of `frame` which is nearest to the bucket.

    Args:
        sources: as for `Batches`; every shard has a bucket.
        spans: all phases of the training that read buckets, in their order; each goes on where the one before ended.
        view: the pictures to choose; None = all.
        lanes: in which the samples of each bucket come; above 1 it divides all batches of the training.

    Raises:
        DataError: the pictures are stored as squares, or there are none.
        CorruptFile: the artifacts differ in their shards.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        frame: Frame,
        seed: int,
        spans: Sequence[Span],
        files: VerifiedFiles | None = None,
        view: View | None = None,
        lanes: int = 1,
    ):
        stored, buckets = sources[0].shards.counts(), sources[0].shards.buckets()
        counts = stored if view is None else view.counts(stored)
        found = sorted({bucket for shard, rows in counts.items() if rows and (bucket := buckets[shard])})
        if not found:
            raise DataError(f"{sources[0].folder} holds no pictures in aspect-ratio buckets: set data.image.max_aspect")
        window = max(1, mixing(stored, lanes) // len(found))  # all buckets together hold as many shards as one sequence
        self._batches = {
            bucket: Batches(
                [_sized(source, frame, bucket) for source in sources], seed, window, bucket, files, view, lanes
            )
            for bucket in found
        }
        self._spans = tuple(spans)
        self._schedules = [Schedule(self.bucket_rows, span.batch_size, seed) for span in spans]
        self._starts = _starts(spans, self._schedules)

    @property
    def bucket_rows(self) -> dict[str, int]:
        """Rows of each bucket."""
        return {bucket: batches.rows for bucket, batches in self._batches.items()}

    @property
    def rows(self) -> int:
        """Rows of all buckets."""
        return sum(self.bucket_rows.values())

    @property
    def largest(self) -> Batches:
        """The samples of the largest bucket, in the order of its own sequence."""
        return max(self._batches.values(), key=lambda batches: batches.rows)

    def first(self, rows: int) -> dict[str, np.ndarray]:
        """The first samples of the largest bucket, at most so many, as `Batches.read` gives them."""
        return self.largest.first(rows)

    def first_shards(self, rows: int) -> set[int]:
        """Numbers of the shards in which these lie."""
        return self.largest.first_shards(rows)

    def read(self, start: int, rows: int) -> dict[str, np.ndarray]:
        """The samples `start` to `start + rows` of the training, which lie within one batch of a span.

        Fields are as `Batches.read` gives them. A bucket with fewer rows than a batch repeats them in it.
        """
        number = span_at(self._spans, start)
        span, schedule = self._spans[number], self._schedules[number]
        turn, first = span.batch_at(start)
        assert first + rows <= span.batch_size, "a batch comes from one bucket"
        bucket, before = schedule.batch(turn)
        begin = self._starts[number][bucket] + before * span.batch_size
        return self._batches[bucket].part(begin, span.batch_size, first, rows)


class Schedule:
    """Which bucket each batch of a phase comes from.

    In e passes over the data, a bucket of r rows fills floor(r e / batch_size) batches: what does not fill one in a
    pass is carried over into the next. Within a pass the seed shuffles the batches of all buckets.
    """

    def __init__(self, rows: Mapping[str, int], batch_size: int, seed: int):
        self._buckets, self._rows = list(rows), np.array(list(rows.values()), np.int64)
        self._batch_size, self._seed = batch_size, seed
        self._pass = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, number: int) -> tuple[str, int]:
        """Bucket of a batch, and how many batches came from that bucket before."""
        passes = self._passes(number)
        place = number - int(self._filled(passes).sum())
        order = self._pass(passes)
        bucket = order[place]
        before = self._filled(passes)[bucket] + np.count_nonzero(order[:place] == bucket)
        return self._buckets[bucket], int(before)

    def taken(self, batches: int) -> Counter[str]:
        """How many of the first batches come from each bucket."""
        passes = self._passes(batches)
        filled = self._filled(passes)
        begun = self._pass(passes)[: batches - int(filled.sum())]
        counts = filled + np.bincount(begun, minlength=len(filled))
        return Counter(dict(zip(self._buckets, counts.tolist(), strict=True)))

    def _filled(self, passes: int) -> np.ndarray:
        """Batches that each bucket fills in so many passes."""
        return self._rows * passes // self._batch_size

    def _passes(self, number: int) -> int:
        """The pass in which a batch lies."""
        passes = number * self._batch_size // int(self._rows.sum())  # at most: carrying over delays batches
        while self._filled(passes + 1).sum() <= number:
            passes += 1
        return passes

    def _shuffled(self, passes: int) -> np.ndarray:
        """The bucket, as a number, of every batch of a pass."""
        counts = self._filled(passes + 1) - self._filled(passes)
        return np.random.default_rng((self._seed, passes)).permutation(np.repeat(np.arange(len(counts)), counts))


def _sized(source: Source, frame: Frame, bucket: str) -> Source:
    return replace(source, size=frame.nearest(*Size.parse(bucket)))


def _starts(spans: Sequence[Span], schedules: Sequence[Schedule]) -> list[Counter[str]]:
    """For each span, by bucket, the samples that the spans before it took."""
    starts = [Counter[str]()]
    for span, schedule in zip(spans, schedules, strict=True):
        taken = schedule.taken((span.stop - span.start) // span.batch_size)
        starts.append(starts[-1] + Counter({bucket: count * span.batch_size for bucket, count in taken.items()}))
    return starts
