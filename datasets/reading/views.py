"""Views: which of the stored pictures a training sees, as a bit a picture; nothing is copied.

A view is one Parquet file with a row for each shard of images: its number, how many pictures it holds, and a bit for
each of them, in the order in which they are stored. A hundred million pictures take 12 MB.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets.config import ViewConfig
from datasets.files.storage import CorruptFile
from datasets.formats.shards import table_bytes
from datasets.outcomes import Outcome
from datasets.planning import filters
from datasets.reading import aesthetic

FILE = "view.parquet"
SCHEMA = pa.schema([("shard", pa.int32()), ("pictures", pa.int32()), ("chosen", pa.binary())])


@dataclass(frozen=True)
class View:
    """The chosen pictures of each shard: how many it holds, and their bits (`numpy.packbits`)."""

    shards: Mapping[int, tuple[int, bytes]]

    @classmethod
    def of(cls, chosen: Mapping[int, Sequence[bool] | np.ndarray]) -> "View":
        """The view that says of each picture of each shard, in their order, whether it is chosen."""
        return cls({shard: (len(bits), _packed(np.array(bits, bool))) for shard, bits in chosen.items()})

    def counts(self, stored: Mapping[int, int]) -> dict[int, int]:
        """Chosen pictures of each shard that has any; `stored` are the pictures that the shards hold.

        Raises:
            CorruptFile: this is a view of other shards.
        """
        for shard, count in stored.items():
            held, _ = self.shards.get(shard, (0, b""))
            if held != count:
                raise CorruptFile(f"shard {shard} holds {count} pictures, but the view knows {held}; make it again")
        counts = {shard: int(self._bits(shard).sum()) for shard in stored}
        return {shard: count for shard, count in counts.items() if count}

    def places(self, shard: int) -> np.ndarray:
        """Places of a shard's chosen pictures among all that it holds, ascending: int64 (chosen,)."""
        return np.flatnonzero(self._bits(shard))

    @property
    def rows(self) -> int:
        """All chosen pictures."""
        return sum(int(self._bits(shard).sum()) for shard in self.shards)

    def __and__(self, other: "View") -> "View":
        """The pictures that both views choose.

        Raises:
            CorruptFile: they are views of other shards.
        """
        held, others = ({shard: pictures for shard, (pictures, _) in view.shards.items()} for view in (self, other))
        other.counts(held)
        self.counts(others)
        return View({shard: (n, _packed(self._bits(shard) & other._bits(shard))) for shard, n in held.items()})

    def __invert__(self) -> "View":
        """The pictures that this view leaves out."""
        return View({shard: (n, _packed(1 - self._bits(shard))) for shard, (n, _) in self.shards.items()})

    def _bits(self, shard: int) -> np.ndarray:
        pictures, chosen = self.shards[shard]
        return np.unpackbits(np.frombuffer(chosen, np.uint8), count=pictures)


@dataclass(frozen=True)
class Planned:
    """A shard: its number, its planned rows (`plan.SCHEMA`), and the bytes of its tables: of what became of these
    (`download.INDEX`), and of scores (`aesthetic.SCHEMA`) that count in place of the planned ones."""

    number: int
    rows: pa.Table
    index: bytes
    scores: bytes | None = None


def make(
    shards: Iterable[Planned], config: ViewConfig, duplicates: Mapping[int, pa.Array]
) -> tuple[bytes, int, Counter[str]]:
    """Choose among the stored pictures, within the bounds, without the `duplicates`: keys by shard of those that look
    like others.

    Returns:
        The view's file, how many pictures it chooses, and how many others it leaves out by rule.
    """
    rules = filters.picture_rules(config)
    chosen: dict[int, tuple[int, bytes]] = {}
    rows, left_out = 0, Counter[str]()
    for shard in shards:
        keys = stored_keys(shard.index)
        stored = shard.rows.filter(pc.is_in(shard.rows["key"], keys))
        if shard.scores is not None:
            stored = aesthetic.scored(stored, shard.scores)
        accepted, rejected = filters.accept(stored, rules)
        if (unwanted := duplicates.get(shard.number)) is not None:
            unique = accepted.filter(~pc.field("key").isin(unwanted))
            left_out["duplicate"] += accepted.num_rows - unique.num_rows
            accepted = unique
        bits = pc.is_in(keys, accepted["key"].combine_chunks()).to_numpy(zero_copy_only=False)
        chosen[shard.number] = len(keys), _packed(bits)
        rows += accepted.num_rows
        left_out.update(rejected)
    return dump(View(chosen)), rows, left_out


def dump(view: View) -> bytes:
    """The bytes of a view's file."""
    lines = [{"shard": n, "pictures": pictures, "chosen": bits} for n, (pictures, bits) in view.shards.items()]
    return table_bytes(lines, SCHEMA)


def read(content: bytes) -> View:
    """A view from the bytes of its file."""
    lines = pq.read_table(pa.BufferReader(content), schema=SCHEMA).to_pylist()
    return View({line["shard"]: (line["pictures"], line["chosen"]) for line in lines})


def _packed(bits: np.ndarray) -> bytes:
    return np.packbits(bits).tobytes()


def stored_keys(index: bytes) -> pa.Array:
    """Keys of the pictures that a shard holds, in their order, from its table of what became of the planned rows."""
    table = pq.read_table(pa.BufferReader(index), columns=["key", "status"])
    return table.filter(pc.field("status") == str(Outcome.OK))["key"].combine_chunks()
