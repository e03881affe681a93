"""LAION metadata: Parquet files with its columns, in any of the published spellings, read batch by batch."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from datasets import storage
from datasets.config import DataError

BATCH_ROWS = 1 << 16
# our name -> the names that LAION's releases use
COLUMNS = {
    "url": ("URL", "url"),
    "caption": ("TEXT", "caption", "text"),
    "width": ("WIDTH", "width", "original_width"),
    "height": ("HEIGHT", "height", "original_height"),
    "similarity": ("similarity",),
    "punsafe": ("punsafe",),
    "pwatermark": ("pwatermark",),
    "aesthetic": ("AESTHETIC_SCORE", "aesthetic", "aesthetic_score"),
}
TYPES = {"url": pa.string(), "caption": pa.string(), "width": pa.int64(), "height": pa.int64()}


def batches(path: str) -> Iterator[pa.Table]:
    """Tables with our column names from a Parquet file, or all below a folder or URI, in order of their names.

    Raises:
        DataError: there is nothing at `path`, it is no Parquet, or a column is missing.
    """
    path = storage.absolute(path)
    if not storage.exists(path):
        raise DataError(f"data.metadata: there is nothing at {path}")
    filesystem, inner = storage.open_filesystem(path)
    try:
        dataset = pads.dataset(inner, filesystem=filesystem, format="parquet")
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"data.metadata: {path} cannot be read as Parquet ({str(error).splitlines()[0]})") from None
    names = _names(dataset.schema.names, path)
    for batch in dataset.to_batches(columns=list(names.values()), batch_size=BATCH_ROWS):
        yield normalised(pa.table(batch), names)


def normalised(table: pa.Table, names: dict[str, str] | None = None) -> pa.Table:
    """A table under our column names and types; sizes come as floats with NaN in some releases."""
    names = names or _names(table.schema.names, "the table")
    columns = {}
    for ours, theirs in names.items():
        column = table[theirs]
        if ours in ("width", "height") and pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), None, column)
        columns[ours] = pc.cast(column, TYPES.get(ours, pa.float64()), safe=False)
    return pa.table(columns)


def _names(found: list[str], path: str) -> dict[str, str]:
    names = {ours: next((name for name in spellings if name in found), None) for ours, spellings in COLUMNS.items()}
    missing = [COLUMNS[ours][0] for ours, name in names.items() if name is None]
    if missing:
        raise DataError(f"data.metadata: {path} has no column {', '.join(missing)}; it has {', '.join(found) or 'none'}")
    return {ours: name for ours, name in names.items() if name is not None}
