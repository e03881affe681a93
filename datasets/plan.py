"""The plan: which pictures a run will fetch, and the key, shard and row that each of them keeps for ever."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets import filters, laion, openmoji
from datasets.config import DataConfig, DataError

COLUMNS = ("key", "url", "caption", "width", "height", "similarity", "punsafe", "pwatermark", "aesthetic")


@dataclass(frozen=True)
class Plan:
    """Planned rows sorted by shard and row, and what became of all others, by reason."""

    rows: pa.Table
    read: int
    rejected: dict[str, int]


def make(config: DataConfig, seed: int) -> Plan:
    """Filter the source's metadata and lay the survivors out in shards, in an order drawn by the seed.

    The order is that of a hash of (seed, key), so it depends neither on the source's file order nor on other rows.

    Raises:
        DataError: the source is empty, or nothing passes the filters.
    """
    read = 0
    rejected: Counter[str] = Counter()
    tables = []
    for table in _source(config):
        read += table.num_rows
        kept, reasons = filters.accept(_clean(table), config.filters)
        rejected.update(reasons)
        tables.append(kept)
    if read == 0:
        raise DataError(f"data.metadata: {config.metadata or config.source} holds no rows")
    rows = pa.concat_tables(tables)
    if rows.num_rows == 0:
        counts = ", ".join(f"{reason} {count}" for reason, count in rejected.items() if count)
        raise DataError(f"data.filters: none of {read} rows is left; removed by {counts}")
    rows, doubles = _unique(_keyed(rows))
    rejected["duplicate"] = doubles
    rows = _drawn(rows, seed)
    if config.limit is not None and rows.num_rows > config.limit:
        rejected["limit"] = rows.num_rows - config.limit
        rows = rows.slice(0, config.limit)
    assert rows.num_rows + sum(rejected.values()) == read
    number = range(rows.num_rows)
    rows = rows.append_column("shard", pa.array([i // config.shard_rows for i in number], pa.int32()))
    rows = rows.append_column("row", pa.array([i % config.shard_rows for i in number], pa.int32()))
    return Plan(rows, read, dict(rejected))


def parquet_bytes(rows: pa.Table) -> bytes:
    """The plan's table as a Parquet file; equal plans give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def shards(data: bytes) -> Iterator[tuple[int, pa.Table]]:
    """Shard numbers and their rows, from the bytes of a plan."""
    table = pq.read_table(pa.BufferReader(data))
    for shard in sorted(set(table["shard"].to_pylist())):
        yield shard, table.filter(pc.equal(table["shard"], shard))


def key_of(url: str, caption: str) -> str:
    """Content-derived key: blake2b-128, in hex, of URL, NUL and caption."""
    return hashlib.blake2b(f"{url}\0{caption}".encode(), digest_size=16).hexdigest()


def _source(config: DataConfig) -> Iterable[pa.Table]:
    if config.metadata is not None:
        return laion.batches(config.metadata)
    assert config.openmoji is not None
    return [laion.normalised(openmoji.metadata(config.openmoji))]


def _clean(table: pa.Table) -> pa.Table:
    """Captions in NFC without control characters and with single spaces; a missing one becomes empty."""
    captions = [clean_caption(text or "") for text in table["caption"].to_pylist()]
    return table.set_column(table.schema.get_field_index("caption"), "caption", pa.array(captions, pa.string()))


def clean_caption(text: str) -> str:
    """NFC, control and surrogate characters dropped, white space folded."""
    kept = "".join(" " if letter.isspace() else letter for letter in unicodedata.normalize("NFC", text))
    visible = (letter for letter in kept if unicodedata.category(letter) not in ("Cc", "Cf", "Cs") or letter == "\u200d")
    return " ".join("".join(visible).split())


def _keyed(rows: pa.Table) -> pa.Table:
    pairs = zip(rows["url"].to_pylist(), rows["caption"].to_pylist(), strict=True)
    keys = pa.array([key_of(url or "", caption) for url, caption in pairs], pa.string())
    return rows.append_column("key", keys).select(COLUMNS)


def _unique(rows: pa.Table) -> tuple[pa.Table, int]:
    """The first row of each key, and how many others there were."""
    first: dict[str, int] = {}
    for place, key in enumerate(rows["key"].to_pylist()):
        first.setdefault(key, place)
    return rows.take(list(first.values())), rows.num_rows - len(first)


def _drawn(rows: pa.Table, seed: int) -> pa.Table:
    ranks = [hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest() for key in rows["key"].to_pylist()]
    return rows.take(sorted(range(len(ranks)), key=ranks.__getitem__))
