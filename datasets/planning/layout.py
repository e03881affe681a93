"""Which shard, and which place in it, every planned row gets."""

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from datasets.buckets import Frame
from datasets.planning import grouping

SHARDS_PER_PART = 256


class Layout:
    """Gives out shards and rows up to a limit, and hands over a part as soon as it is full.

    A shard gets its number when it is full, and the others at the end: so those of a part are consecutive, and only one
    shard a bucket waits.
    """

    def __init__(
        self, frame: Frame, schema: pa.Schema, shard_rows: int, limit: int | None, keep: Callable[[pa.Table], None]
    ):
        self._frame, self._schema, self._shard_rows, self._limit, self._keep = frame, schema, shard_rows, limit, keep
        self._open: dict[str, pa.Table] = {}  # rows by bucket, fewer than a shard each
        self._numbered: list[pa.Table] = []
        self._numbered_rows = self._shards = 0
        self.rows, self.captions = Counter[str](), Counter[str]()  # by source
        self.buckets: Counter[str] = Counter()

    def add(self, rows: pa.Table) -> pa.Table:
        """Lay out rows; returns those beyond the limit."""
        room = rows.num_rows if self._limit is None else self._limit - self.rows.total()
        taken = rows.slice(0, room).drop("lot")
        self.rows.update(grouping.by_source(taken.select(["source"])))
        self.captions.update(grouping.by_source(taken))
        for bucket, group in self._by_bucket(taken):
            waiting = pa.concat_tables([self._open[bucket], group]) if bucket in self._open else group
            full = waiting.num_rows // self._shard_rows * self._shard_rows
            self._number(waiting.slice(0, full))
            self._open[bucket] = waiting.slice(full)
        while self._numbered_rows >= SHARDS_PER_PART * self._shard_rows:
            self._hand_over(SHARDS_PER_PART * self._shard_rows)
        return rows.slice(taken.num_rows)

    def close(self) -> None:
        """Hand over what is left."""
        for bucket in sorted(self._open):
            self._number(self._open[bucket])
        if self._numbered_rows:
            self._hand_over(self._numbered_rows)

    def _by_bucket(self, rows: pa.Table) -> Iterator[tuple[str, pa.Table]]:
        """Each bucket with its rows, in their order; squares are all together, without the column."""
        if self._frame.square:
            yield "", rows
            return
        ratios = rows["width"].to_numpy() / rows["height"].to_numpy()
        places = np.searchsorted(self._frame.borders, ratios, side="right")
        for place in np.unique(places):
            bucket = str(self._frame.sizes[place])
            group = rows.filter(pa.array(places == place))
            self.buckets[bucket] += group.num_rows
            yield bucket, group.append_column("bucket", pa.array([bucket] * group.num_rows))

    def _number(self, rows: pa.Table) -> None:
        shard, row = np.divmod(np.arange(rows.num_rows), self._shard_rows)
        numbers = {"shard": shard + self._shards, "row": row}
        for name, values in numbers.items():
            rows = rows.append_column(name, pa.array(values))
        self._shards += -(-rows.num_rows // self._shard_rows)
        self._numbered.append(rows.select(self._schema.names))
        self._numbered_rows += rows.num_rows

    def _hand_over(self, count: int) -> None:
        rows = pa.concat_tables(self._numbered)
        self._keep(rows.slice(0, count).cast(self._schema))
        self._numbered, self._numbered_rows = [rows.slice(count)], rows.num_rows - count
