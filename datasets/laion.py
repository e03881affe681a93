"""Parquet files with LAION's columns, read as a stream of tables under our column names."""

from collections.abc import Iterator, Set
from fnmatch import fnmatchcase

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets import storage
from datasets.config import DataError

# Ours: LAION's, in any mix of cases. `aesthetic`, of the first predictor, is left out: its scale is another.
COLUMNS = {
    "url": "URL",
    "caption": "TEXT",
    "width": "WIDTH",
    "height": "HEIGHT",
    "similarity": "similarity",
    "punsafe": "punsafe",
    "pwatermark": "pwatermark",
    "aesthetic": "AESTHETIC_SCORE",
}
_TEXTS = ("url", "caption")
_BATCH_ROWS = 1 << 16


def tables(metadata: str, needed: Set[str]) -> Iterator[pa.Table]:
    """All rows of a file, folder, pattern (`*`) or URI, in the order of file names, 65,536 at a time.

    Args:
        needed: columns, under our names, that every file must have; others may be missing and come as nulls.

    Raises:
        DataError: nothing is there, a file is no Parquet, or a needed column is missing.
    """
    for path in files(metadata):
        filesystem, inner = storage.open_filesystem(path)
        try:
            with filesystem.open_input_file(inner) as source, pq.ParquetFile(source) as file:
                theirs = _present(path, file.schema_arrow.names, needed)
                for batch in file.iter_batches(_BATCH_ROWS, columns=list(theirs.values())):
                    yield renamed(pa.table(batch))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"data.metadata: {path} cannot be read as LAION's Parquet: {reason}") from error


def files(metadata: str) -> list[str]:
    """The Parquet files that `data.metadata` stands for, sorted by name.

    Raises:
        DataError: there are none.
    """
    path = storage.absolute(metadata)
    if "*" in path:
        folder, _, pattern = path.partition("*")
        folder, _, start = folder.rpartition("/")
        found = [name for name in storage.listing(folder) if _matches(name, f"{start}*{pattern}")]
        paths = [storage.join(folder, name) for name in found]
    elif path.endswith(".parquet"):
        paths = [path] if storage.exists(path) else []
    else:
        paths = [storage.join(path, name) for name in storage.listing(path) if name.endswith(".parquet")]
    if not paths:
        raise DataError(f"data.metadata: there is no Parquet file at {metadata}")
    return paths


def renamed(table: pa.Table) -> pa.Table:
    """A table under our names and types: texts as bytes, numbers as float64, NaN and absent columns as nulls.

    LAION's files differ in their number types, and some texts in them are no valid UTF-8.
    """
    theirs = _by_lower_case(table.column_names)
    columns = {}
    for ours, name in COLUMNS.items():
        kind = pa.large_binary() if ours in _TEXTS else pa.float64()
        found = theirs.get(name.lower())
        column = pa.nulls(table.num_rows, kind) if found is None else pc.cast(table[found], kind)
        columns[ours] = column if ours in _TEXTS else pc.if_else(pc.is_nan(column), None, column)
    return pa.table(columns)


def _present(path: str, names: list[str], needed: Set[str]) -> dict[str, str]:
    theirs = _by_lower_case(names)
    present = {ours: theirs[name.lower()] for ours, name in COLUMNS.items() if name.lower() in theirs}
    missing = [COLUMNS[ours] for ours in COLUMNS if ours in needed and ours not in present]
    if missing:
        raise DataError(
            f"data.metadata: {path} has no column {', '.join(missing)}, only {', '.join(names)}; "
            "give files with LAION's columns, or set the rules of data.filters that need them to null"
        )
    return present


def _by_lower_case(names: list[str]) -> dict[str, str]:
    return {name.lower(): name for name in names}


def _matches(name: str, pattern: str) -> bool:
    """Whether a path fits a pattern part by part: `*` stays within one folder."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
