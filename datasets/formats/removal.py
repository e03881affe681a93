"""Taking pictures out of shards that are finished: what is left is as if they had never been kept.

Each function takes the bytes of a file and gives those of the file without some keys; a file that holds none of them
comes out byte for byte as it was.
"""

from collections.abc import Set
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets.files.storage import FileEntry
from datasets.formats import ranges, shards
from datasets.formats.shards import INDEX, Receipt
from datasets.outcomes import Outcome


def from_images(content: bytes, keys: Set[str]) -> bytes:
    """A tar of pictures without some."""
    rows = shards.read_images(content)
    return shards.write_images(row for row in rows if row.key not in keys)


def from_index(content: bytes, keys: Set[str]) -> bytes:
    """The table beside a tar: its rows stay, but say no more than that these pictures are forgotten."""
    rows = pq.read_table(pa.BufferReader(content)).to_pylist()
    if not any(row["key"] in keys for row in rows):
        return content
    forgotten = dict.fromkeys(INDEX.names) | {"status": str(Outcome.FORGOTTEN)}
    told = [
        forgotten | {name: row[name] for name in ("key", "row")} if row["key"] in keys else row
        for row in ranges.without(rows, keys)
    ]
    return shards.table_bytes(told, INDEX)


def from_tensors(content: bytes, keys: Set[str]) -> bytes:
    """A file of tensors without those of some pictures."""
    table = pq.read_table(pa.BufferReader(content))
    return shards.parquet_bytes(table.filter(~_among(table, keys)).combine_chunks())


def from_samples(content: bytes, keys: Set[str]) -> bytes:
    """The table of samples without those of some pictures."""
    rows = pq.read_table(pa.BufferReader(content)).to_pylist()
    return shards.table_bytes([row for row in rows if row["key"] not in keys])


def from_duplicates(content: bytes, keys: Set[str]) -> bytes:
    """The table of duplicates without some pictures, and without those that looked like them: these stay."""
    table = pq.read_table(pa.BufferReader(content))
    named = pc.field("key").isin(list(keys)) | pc.field("of").isin(list(keys))
    return shards.parquet_bytes(table.filter(~named).combine_chunks())


def from_receipt(receipt: Receipt, files: dict[str, FileEntry], rows: int, *, downloaded: bool) -> Receipt:
    """The receipt of a shard that is down to `rows` pictures, with its new files.

    A download's planned rows stay the same, and the missing ones count as forgotten; what was made from the pictures
    had fewer of them to begin with.
    """
    fewer = receipt.rows_out - rows
    if not fewer:
        return replace(receipt, files=files)
    if not downloaded:
        return replace(receipt, files=files, rows_in=receipt.rows_in - fewer, rows_out=rows)
    forgotten = receipt.dropped.get(str(Outcome.FORGOTTEN), 0) + fewer
    dropped = dict(sorted({**receipt.dropped, str(Outcome.FORGOTTEN): forgotten}.items()))
    return replace(receipt, files=files, rows_out=rows, dropped=dropped)


def holds(content: bytes, keys: Set[str]) -> bool:
    """Whether a table has a row of one of these keys."""
    table = pq.read_table(pa.BufferReader(content), columns=["key"])
    return table.filter(_among(table, keys)).num_rows > 0


def told(content: bytes, column: str, values: Set[str], wanted: str) -> set[str]:
    """What rows of a table that have one of some values in a column have in another, where there is anything."""
    table = pq.read_table(pa.BufferReader(content), columns=[column, wanted])
    found = table.filter(pc.field(column).isin(pa.array(list(values), pa.string())))
    return set(found[wanted].drop_null().to_pylist())


def count(content: bytes) -> int:
    """Rows of a table."""
    rows: int = pq.read_metadata(pa.BufferReader(content)).num_rows
    return rows


def pictures(content: bytes) -> int:
    """How many pictures the rows of a table are of."""
    keys = pq.read_table(pa.BufferReader(content), columns=["key"])["key"]
    return int(pc.count_distinct(keys).as_py())


def _among(table: pa.Table, keys: Set[str]) -> pc.Expression:
    """Whether a row's key, hex digits or 16 bytes, is among the keys."""
    spelt = keys if pa.types.is_string(table.schema.field("key").type) else map(bytes.fromhex, keys)
    return pc.field("key").isin(pa.array(list(spelt), table.schema.field("key").type))
