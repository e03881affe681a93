"""Aesthetic scores from another table, joined by URL: Re-LAION comes without the column.

The URLs of both sides are taken as they are written and hashed to 64 bits: among 10^8 scores, a row that has none finds
a wrong one once in 10^11 cases. The table's hashes lie sorted in a temporary file, 16 bytes a score, that is mapped
into memory; the rows stream past it.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datasets.config import DataError
from datasets.left_out import LeftOut
from datasets.planning.filters import urls
from datasets.planning.spill import Spill
from datasets.sources import laion

KEY = "data.scores"


def joined(tables: Iterable[pa.Table], path: str, left_out: LeftOut) -> Iterator[pa.Table]:
    """The rows that have a score in the Parquet files at `path`, with that one as `aesthetic`.

    Where the files name a URL several times, the first of its scores counts; a null is no score. Rows without one are
    left out and counted in `left_out` as `no_score`. Tables have our column names.

    Raises:
        DataError: there are no such files, they lack a column, or hold no score.
    """
    with tempfile.TemporaryDirectory(prefix="scores-") as folder:
        hashes, scores = _sorted(path, Path(folder))
        for table in tables:
            wanted = _hashes(table["url"])
            places = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
            known = hashes[places] == wanted
            without = table.filter(pa.array(~known))
            left_out.add_all("no_score", urls(without), without.num_rows, f"{KEY} has no score of it")
            column = pa.array(scores[places[known]], pa.float64())
            yield table.filter(pa.array(known)).set_column(table.column_names.index("aesthetic"), "aesthetic", column)


def _sorted(path: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All hashes, ascending and each once, and their scores: uint64 and float64 (N,), mapped from files."""
    read = {"url", "aesthetic"}
    files = folder / "hashes", folder / "scores"
    with Spill(str(folder), "hash") as spill, files[0].open("wb") as hashes, files[1].open("wb") as scores:
        for table in laion.tables(path, read, read=read, key=KEY):
            rows = table.filter(pc.and_(pc.is_valid(table["url"]), pc.is_valid(table["aesthetic"])))
            if rows.num_rows:
                spill.add(pa.table({"hash": _hashes(rows["url"]), "score": rows["aesthetic"]}))
        for _, rows in spill.buckets():
            unique, first = np.unique(rows["hash"].to_numpy(), return_index=True)
            hashes.write(unique.tobytes())
            scores.write(rows["score"].to_numpy()[first].tobytes())
    if not files[0].stat().st_size:
        raise DataError(f"{KEY}: {path} holds no scores")
    return np.memmap(files[0], np.uint64, "r"), np.memmap(files[1], np.float64, "r")


def _hashes(urls: pa.ChunkedArray) -> np.ndarray:
    """blake2b-64 of each URL, uint64 (N,); that of a missing one is the hash of nothing, which no table has."""
    digests = (hashlib.blake2b((url or b"").strip(), digest_size=8).digest() for url in urls.to_pylist())
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)
