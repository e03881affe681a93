"""Tables larger than memory: rows put aside in temporary files by hash, and questions that need all rows of a hash."""

import hashlib
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

FEW = 1 << 15  # rows that wait in memory
TOGETHER = 1 << 12  # rows, at least, that are worth being looked at together


class Spill:
    """Rows in temporary files by the first byte of a uint64 column, so that no more than a 256th is in memory; or all,
    and no file is written, where they are few."""

    def __init__(self, folder: str, column: str):
        self._folder, self._column = folder, column
        self._name = secrets.token_hex(4)
        self._writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        self._waiting: dict[int, list[pa.Table]] = {}  # what comes after the rows of the files
        self._count = 0  # of these

    def __enter__(self) -> "Spill":
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.close()

    def add(self, rows: pa.Table) -> None:
        """Put rows where they belong, in their order."""
        bytes_ = (rows[self._column].to_numpy() >> np.uint64(56)).astype(np.uint8)
        grouped = rows.take(pa.array(np.argsort(bytes_, kind="stable")))
        present, starts, counts = np.unique(np.sort(bytes_), return_index=True, return_counts=True)
        for first, start, count in zip(present.tolist(), starts.tolist(), counts.tolist(), strict=True):
            self._waiting.setdefault(first, []).append(grouped.slice(start, count))
        self._count += rows.num_rows
        if self._count > FEW:
            for first, tables in self._waiting.items():
                for table in tables:
                    self._writer(first, table.schema).write_table(table)
            self._waiting, self._count = {}, 0

    def buckets(self) -> Iterator[tuple[list[int], pa.Table]]:
        """First bytes, ascending, with their rows, of several that have few together; nothing can be added any more."""
        firsts: list[int] = []
        tables: list[pa.Table] = []
        for first in sorted({*self._writers, *self._waiting}):
            firsts.append(first)
            tables.append(self._bucket(first))
            if sum(table.num_rows for table in tables) >= TOGETHER:
                yield firsts, pa.concat_tables(tables)
                firsts, tables = [], []
        if tables:
            yield firsts, pa.concat_tables(tables)

    def of(self, firsts: Iterable[int]) -> pa.Table | None:
        """The rows of first bytes; None where there are none."""
        tables = [self._bucket(first) for first in firsts if first in self._writers or first in self._waiting]
        return pa.concat_tables(tables) if tables else None

    def _bucket(self, first: int) -> pa.Table:
        waiting = self._waiting.get(first, [])
        if first not in self._writers:
            return pa.concat_tables(waiting)
        self._writers[first].close()
        with pa.OSFile(self._path(first)) as source:
            return pa.concat_tables([pa.ipc.open_stream(source).read_all(), *waiting])

    def _writer(self, first: int, schema: pa.Schema) -> "pa.ipc.RecordBatchStreamWriter":
        if first not in self._writers:
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            self._writers[first] = pa.ipc.new_stream(self._path(first), schema, options=options)
        return self._writers[first]

    def _path(self, first: int) -> str:
        return str(Path(self._folder, f"{self._name}-{first:02x}.arrow"))


class Cap:
    """At most so many rows with the same text in a column: those whose lots come first stay.

    Copies of a row, which have its lot and text, count once; rows that another cap removes count too. Rows with other
    texts may have the same lot: captions of a picture.
    """

    def __init__(self, folder: str, name: str, limit: tuple[str, int]):
        self.name = name
        self._column, self._most = limit
        self._seen, self._beyond = Spill(folder, "text"), Spill(folder, "lot")
        self._judged = False

    def __enter__(self) -> "Cap":
        return self

    def __exit__(self, *_: object) -> None:
        for spill in (self._seen, self._beyond):
            spill.__exit__()

    def add(self, rows: pa.Table) -> None:
        """Note rows."""
        self._seen.add(pa.table({"text": pa.array(self._hashes(rows)), "lot": rows["lot"]}))

    def kept(self, firsts: Iterable[int], rows: pa.Table) -> pa.Table:
        """The rows of first bytes of the lot that are within the cap; all rows must have been noted before."""
        if not self._judged:
            self._judge()
        beyond = self._beyond.of(firsts)
        if beyond is None:
            return rows
        lots, texts = rows["lot"].to_numpy(), self._hashes(rows)
        pairs = set(zip(beyond["lot"].to_pylist(), beyond["text"].to_pylist(), strict=True))
        return rows.filter(
            pa.array([pair not in pairs for pair in zip(lots.tolist(), texts.tolist(), strict=True)], pa.bool_())
        )

    def _hashes(self, rows: pa.Table) -> np.ndarray:
        """blake2b-64 of each row's text, uint64 (N,)."""
        texts = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in rows[self._column].to_pylist())
        return np.frombuffer(b"".join(texts), ">u8").astype(np.uint64)

    def _judge(self) -> None:
        self._judged = True
        for _, pairs in self._seen.buckets():
            ordered = (
                pairs.group_by(["text", "lot"]).aggregate([]).sort_by([("text", "ascending"), ("lot", "ascending")])
            )
            texts = ordered["text"].to_numpy()
            _, starts, counts = np.unique(texts, return_index=True, return_counts=True)
            ranks = np.arange(len(texts)) - np.repeat(starts, counts)
            self._beyond.add(ordered.filter(pa.array(ranks >= self._most)))
