"""Parquet files with LAION's columns, read as a stream of tables under our column names."""

from collections.abc import Iterator, Set

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets.config import DataError
from datasets.files import storage

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
    "licence": "LICENSE",
    "origin": "ORIGINAL_URL",  # not LAION's: of sources that give out copies
}
_TEXTS = ("url", "caption", "licence", "origin")
_BATCH_ROWS = 1 << 16
_HELP = {
    "data.metadata": "give files with LAION's columns, or set the rules of data.filters that need them to null"
    " (data.scores brings AESTHETIC_SCORE from another table, data.scorer computes it for views)",
    "data.scores": "give files with URL and AESTHETIC_SCORE",
}


def tables(
    path: str, needed: Set[str], *, read: Set[str] = COLUMNS.keys(), key: str = "data.metadata"
) -> Iterator[pa.Table]:
    """All rows of a file, folder, pattern (`*`) or URI, in the order of file names, 65,536 at a time.

    Args:
        needed: columns, under our names, that every file must have; others may be missing and come as nulls.
        read: columns that are read where they are there.
        key: of the config, where the path stands.

    Raises:
        DataError: nothing is there, a file is no Parquet, or a needed column is missing.
    """
    for place in _files(path, key):
        try:
            with storage.opened(place) as source, pq.ParquetFile(source) as file:
                theirs = _present(place, file.schema_arrow.names, needed, key)
                chosen = [name for ours, name in theirs.items() if ours in read]
                for batch in file.iter_batches(_BATCH_ROWS, columns=chosen):
                    yield renamed(pa.table(batch))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise _unreadable(place, error, key) from error


def columns(path: str, needed: Set[str] = frozenset(), key: str = "data.metadata") -> set[str]:
    """Our names of the columns that the first file has, from its last bytes; arguments and errors as of `tables`."""
    first = _files(path, key)[0]
    try:
        with storage.opened(first) as source:
            names = pq.read_schema(source).names
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(first, error, key) from error
    return set(_present(first, names, needed, key))


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


def _files(path: str, key: str) -> list[str]:
    files = storage.matching(path, ".parquet")
    if not files:
        raise DataError(f"{key}: there is no Parquet file at {path}; give a file, a folder, a pattern or a URI")
    return list(files.values())


def _present(path: str, names: list[str], needed: Set[str], key: str) -> dict[str, str]:
    theirs = _by_lower_case(names)
    present = {ours: theirs[name.lower()] for ours, name in COLUMNS.items() if name.lower() in theirs}
    missing = [COLUMNS[ours] for ours in COLUMNS if ours in needed and ours not in present]
    if missing:
        raise DataError(f"{key}: {path} has no column {', '.join(missing)}, only {', '.join(names)}; {_HELP[key]}")
    return present


def _unreadable(place: str, error: Exception, key: str) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
    return DataError(
        f"{key}: {place} cannot be read as LAION's Parquet ({reason}); fetch it again, or give other files"
    )


def _by_lower_case(names: list[str]) -> dict[str, str]:
    return {name.lower(): name for name in names}
