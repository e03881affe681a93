"""The table of an artifact's shards: what their receipts say of them, in one file, so that nobody has to read them all.

    shards.parquet   folder, shard, rows, bucket, and name, bytes and sha256 of its files

It is written when all shards are done. Artifacts from before have none: of these the receipts are read, as before.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets.files import storage
from datasets.files.storage import CorruptFile, FileEntry
from datasets.formats import shards
from datasets.formats.shards import ImageRow, Receipt

FILE = "shards.parquet"
_FILE = pa.struct([("name", pa.string()), ("bytes", pa.int64()), ("sha256", pa.binary(32))])
_OF_A_FOLDER = pa.schema(
    [("shard", pa.int32()), ("rows", pa.int64()), ("bucket", pa.string()), ("files", pa.list_(_FILE))]
)
SCHEMA = pa.schema([("folder", pa.string()), *_OF_A_FOLDER])  # below the artifact's; "" for its own


@dataclass(frozen=True)
class Shard:
    """A finished shard in a folder: all that who works on it has to know, small enough to be sent there."""

    folder: str
    number: int
    rows: int
    bucket: str | None
    files: Mapping[str, FileEntry]

    def read(self, name: str) -> bytes:
        """One of its files, verified; raises `CorruptFile`."""
        return storage.read(storage.join(self.folder, name), expect=self.files[name])

    def images(self) -> list[ImageRow]:
        """The pictures of a shard of images, verified; raises `CorruptFile`."""
        return shards.read_images(self.read(shards.image_name(self.number)), self.rows)


class Shards(Mapping[int, Shard]):
    """The finished shards in a folder, by their numbers, ascending: a hundred bytes each, also when sent elsewhere."""

    def __init__(self, folder: str, table: pa.Table):
        self.folder = folder
        self._table = table.sort_by("shard").combine_chunks()

    @classmethod
    def told(cls, folder: str, receipts: Iterable[Receipt]) -> "Shards":
        """The shards that receipts in the folder tell of."""
        return cls(folder, _table(list(receipts)))

    @classmethod
    def gathered(cls, folder: str) -> "Shards":
        """Those of all receipts in a folder of a finished artifact; raises `CorruptFile`."""
        return cls.told(folder, shards.receipts(folder).values())

    @cached_property
    def _numbers(self) -> np.ndarray:
        return self._table["shard"].to_numpy()

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers.tolist())

    def __getitem__(self, number: int) -> Shard:
        place = int(np.searchsorted(self._numbers, number))
        if place == len(self) or self._numbers[place] != number:
            raise KeyError(number)
        row = self._table.slice(place, 1).to_pylist()[0]
        return Shard(self.folder, number, row["rows"], row["bucket"], dict(map(_entry, row["files"])))

    def counts(self, bucket: str | None = None) -> dict[int, int]:
        """Rows of each shard, of one bucket or of all."""
        table = self._table if bucket is None else self._table.filter(pc.field("bucket") == bucket)
        return dict(zip(table["shard"].to_pylist(), table["rows"].to_pylist(), strict=True))

    def buckets(self) -> dict[int, str | None]:
        """Bucket of each shard."""
        return dict(zip(self, self._table["bucket"].to_pylist(), strict=True))

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.folder, self._table)  # without what is made of it

    def files(self) -> dict[str, FileEntry]:
        """All their files."""
        found = pc.list_flatten(self._table["files"]).combine_chunks()
        names, sizes, sums = (found.field(index).to_pylist() for index in range(3))
        return {name: FileEntry(size, sha256.hex()) for name, size, sha256 in zip(names, sizes, sums, strict=True)}


def dump(receipts: Mapping[str, Iterable[Receipt]], before: pa.Table | None = None) -> bytes:
    """The bytes of the file: of the receipts in an artifact's folders, by these; equal ones give equal bytes.

    Of shards without a receipt here, what a table from `before` says stays.
    """
    tables = {folder: _table(list(found)) for folder, found in receipts.items()}
    if before is not None:
        tables = {folder: _others(before, folder, table) for folder, table in tables.items()}
    parts = [_with_folder(folder, table) for folder, table in sorted(tables.items())]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(parts).combine_chunks(), sink, compression="zstd", write_statistics=False)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _others(before: pa.Table, folder: str, table: pa.Table) -> pa.Table:
    """A table of some shards in a folder, with the others there from before."""
    others = before.filter(
        (pc.field("folder") == folder) & ~pc.field("shard").isin(table["shard"].combine_chunks())
    ).drop_columns("folder")
    return pa.concat_tables([others, table]).sort_by("shard").cast(_OF_A_FOLDER)  # as it is called when it is made anew


def load(content: bytes) -> pa.Table:
    """The table (`SCHEMA`) from the bytes of its file.

    Raises:
        CorruptFile: they hold another.
    """
    table = pq.read_table(pa.BufferReader(content))
    if not table.schema.equals(SCHEMA):
        raise CorruptFile(f"{FILE} has {', '.join(table.column_names)}: it is no table of shards")
    return table


def within(table: pa.Table, path: str, folder: str) -> Shards:
    """The shards of a loaded table in a folder of its artifact, which lies at `path`."""
    return Shards(path, table.filter(pc.field("folder") == folder).drop_columns("folder"))


def _table(receipts: list[Receipt]) -> pa.Table:
    receipts = sorted(receipts, key=lambda receipt: receipt.shard)
    files = [item for receipt in receipts for item in receipt.files.items()]
    parts = [
        pa.array([name for name, _ in files], pa.string()),
        pa.array([entry.bytes for _, entry in files], pa.int64()),
        pa.array([bytes.fromhex(entry.sha256) for _, entry in files], pa.binary(32)),
    ]
    ends = np.cumsum([0, *(len(receipt.files) for receipt in receipts)])
    columns = [
        pa.array([receipt.shard for receipt in receipts], pa.int32()),
        pa.array([receipt.rows_out for receipt in receipts], pa.int64()),
        pa.array([receipt.bucket for receipt in receipts], pa.string()),
        pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.StructArray.from_arrays(parts, fields=list(_FILE))),
    ]
    return pa.table(columns, schema=_OF_A_FOLDER)


def _with_folder(folder: str, table: pa.Table) -> pa.Table:
    return table.add_column(0, "folder", pa.array([folder] * table.num_rows, pa.string()))


def _entry(file: dict[str, Any]) -> tuple[str, FileEntry]:
    return file["name"], FileEntry(file["bytes"], file["sha256"].hex())
