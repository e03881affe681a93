"""The files of a plan's artifact: parts of up to 256 full shards, each a Parquet file, and their shards."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datasets.planning import layout


def parts(files: Iterable[str]) -> list[str]:
    """The parts of a plan among the files of its artifact, in their order; beside them lies what was left out."""
    return sorted(name for name in files if name.startswith("plan/"))


def parquet_bytes(rows: pa.Table, shard_rows: int) -> bytes:
    """A part of the plan as a Parquet file, a row group a full shard; equal plans give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", row_group_size=shard_rows)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def shards(content: bytes) -> Iterator[tuple[int, pa.Table]]:
    """Each shard's number and its planned rows, from the bytes of a part of a plan."""
    rows = pq.read_table(pa.BufferReader(content))
    numbers, starts, counts = np.unique(rows["shard"].to_numpy(), return_index=True, return_counts=True)
    for number, start, count in zip(numbers, starts, counts, strict=True):
        yield int(number), rows.slice(start, count)


def all_shards(read: Callable[[str], bytes], files: Iterable[str]) -> Iterator[tuple[int, pa.Table]]:
    """The `shards` of all parts of a plan in turn; `read` gives a file of its artifact, `files` are their names."""
    return (shard for part in parts(files) for shard in shards(read(part)))


def captions(read: Callable[[str], bytes], files: Iterable[str], numbers: Iterable[int]) -> dict[str, str]:
    """The planned captions of some shards by key; `read` gives a file of the plan's artifact, `files` are their names.

    Only the parts with these shards are read: each has as many, but for the last, which has the rest.
    """
    names, wanted = parts(files), sorted(set(numbers))
    found: dict[str, str] = {}
    for place in sorted({min(number // layout.SHARDS_PER_PART, len(names) - 1) for number in wanted}):
        rows = pq.read_table(pa.BufferReader(read(names[place])), columns=["key", "caption", "shard"])
        ours = rows.take(np.flatnonzero(np.isin(rows["shard"].to_numpy(), wanted)))
        found |= dict(zip(ours["key"].to_pylist(), ours["caption"].to_pylist(), strict=True))
    return found
