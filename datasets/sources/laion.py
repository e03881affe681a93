"""Parquet files with LAION's columns, read as a stream of tables under our column names."""

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets.config import DataError
from datasets.files import storage
from datasets.files.errors import StoreAway
from datasets.left_out import LeftOut
from datasets.sources.files_at import files_at

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
_ALIASES = {  # other names of a column, by ours, which count where LAION's own is not there, or holds nothing
    "url": ("image_url",),
    "caption": ("caption", "captions"),  # Re-LAION's
    "width": ("original_width",),
    "height": ("original_height",),
    "aesthetic": ("aesthetic_score",),
    "licence": ("licence",),
}
_TEXTS = ("url", "caption", "licence", "origin")
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
_BATCH_ROWS = 1 << 16
_LISTS = pa.large_list(pa.large_binary())
_HELP = {
    "data.metadata": "give files with LAION's columns, or set the rules of data.filters that need them to null"
    " (data.scores brings AESTHETIC_SCORE from another table, data.scorer computes it for views)",
    "data.scores": "give files with URL and AESTHETIC_SCORE",
}


class OtherColumns(DataError):
    """A Parquet file is there and whole, but its columns are not those that are needed."""


def tables(
    path: str,
    needed: Set[str],
    *,
    read: Set[str] = COLUMNS.keys(),
    key: str = "data.metadata",
    left_out: LeftOut | None = None,
) -> Iterator[pa.Table]:
    """All rows of a file, folder, pattern (`*`) or URI, in the order of file names, 65,536 at a time.

    Args:
        needed: columns, under our names, that every file must have; others may be missing and come as nulls.
        read: columns that are read where they are there.
        key: of the config, where the path stands.
        left_out: counts `no_caption`, rows whose list of captions is empty; a list of several gives a row for each.

    Raises:
        DataError: nothing is there, a file is no Parquet or damaged, a needed column is missing or of another type.
    """
    for place in _files(path, key):
        with parquet(place, key) as file:
            theirs = _present(place, file, needed, key)
            chosen = [name for ours, name in theirs.items() if ours in read]
            for batch in file.iter_batches(_BATCH_ROWS, columns=chosen):
                yield renamed(pa.table(batch), left_out)


def columns(path: str, needed: Set[str] = frozenset(), key: str = "data.metadata") -> dict[str, str]:
    """The columns that are taken: our names and the first file's own.

    Local files are all looked at, by their last bytes. Arguments and errors as of `tables`.
    """
    files = _files(path, key)
    taken = []
    for place in files[:1] if storage.is_remote(path) else files:
        with parquet(place, key) as file:
            taken.append(_present(place, file, needed, key))
    return taken[0]


def count(path: str, key: str = "data.metadata") -> int:
    """Rows of the files, as their last bytes tell; errors as of `tables`."""
    rows = 0
    for place in _files(path, key):
        with parquet(place, key) as file:
            rows += file.metadata.num_rows
    return rows


@contextmanager
def parquet(place: str, key: str) -> Iterator[pq.ParquetFile]:
    """A file of Parquet, to be read within the block.

    Raises:
        DataError: it is none, or damaged; names `key`.
        StorageError: it is the store that cannot be read, and not the file.
    """
    try:
        with storage.opened(place) as source, pq.ParquetFile(source) as file:
            yield file
    except pa.ArrowException as error:
        raise _unreadable(place, error, key) from error
    except StoreAway:
        raise
    except OSError as error:
        storage.sha256(place)  # which fails too where it is the store
        raise _unreadable(place, error.__cause__ or error, key) from error


def read_as(path: str, key: str = "data.metadata") -> dict[str, str]:
    """LAION's name of each column that is taken, and the file's own; arguments and errors as of `columns`."""
    return {COLUMNS[ours]: name for ours, name in columns(path, key=key).items()}


def is_other(taken: Mapping[str, str]) -> bool:
    """Whether a column of `read_as` has another name than LAION's, but for capitals."""
    return any(laions.lower() != name.lower() for laions, name in taken.items())


def told(taken: Mapping[str, str]) -> str:
    """What `read_as` has found, in words."""
    found = ", ".join(laions if laions == name else f"{laions} from {name}" for laions, name in taken.items())
    missing = ", ".join(name for name in COLUMNS.values() if name not in taken)
    return f"columns taken: {found}{missing and f'; not there: {missing}'}"


def renamed(table: pa.Table, left_out: LeftOut | None = None) -> pa.Table:
    """A table under our names and types: texts as bytes, numbers as float64; what is not finite, sizes of nothing and
    absent columns as nulls.

    LAION's files differ in their number types, and some texts in them are no valid UTF-8. Where a caption is a list,
    each of its texts gets a row.
    """
    theirs = _taken(table.column_names)
    columns = {}
    for ours in COLUMNS:
        kind = pa.large_binary() if ours in _TEXTS else pa.float64()
        column = table[theirs[ours]] if ours in theirs else pa.nulls(table.num_rows, kind)
        if ours in _TEXTS:
            column = texts(column)
            columns[ours] = column if _is_list(column.type) else _as_bytes(column)
        else:
            column = _plain(column)
            column = _digits(column) if is_text(column.type) else column
            number = pc.cast(column, pa.float64(), safe=False)  # of whole numbers beyond 2^53 the nearest will do
            columns[ours] = pc.if_else(_is_none(number, ours), None, number)
    return _a_row_each(pa.table(columns), left_out or LeftOut())


def _a_row_each(table: pa.Table, left_out: LeftOut) -> pa.Table:
    """A table in which each row has one caption."""
    if not _is_list(table["caption"].type):
        return table
    lists = pa.array(table["caption"].to_pylist(), _LISTS)  # those of fixed lengths have something in null ones too
    empty = table.filter(pc.equal(pc.fill_null(pc.list_value_length(lists), 0), 0))
    urls = ((url or b"").decode(errors="replace") for url in empty["url"].to_pylist())
    left_out.add_all("no_caption", urls, empty.num_rows, "its list of captions is empty")
    rows = table.take(pc.list_parent_indices(lists))
    place = table.column_names.index("caption")
    return rows.set_column(place, "caption", pc.list_flatten(lists))


def _is_none(number: pa.ChunkedArray, ours: str) -> pa.ChunkedArray:
    """Where a number is none; a picture of 0 px is one whose size nobody knew."""
    none = pc.invert(pc.is_finite(number))
    return pc.or_(none, pc.less_equal(number, 0)) if ours in ("width", "height") else none


def texts(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """A column of texts, or of lists of these, in bytes: some are no UTF-8, which Arrow would not make texts of.

    Others as they are.
    """
    column = _plain(column)
    if is_text(column.type):
        return _as_bytes(column)
    return pc.cast(column, _LISTS) if fits(column.type, "caption") and _is_list(column.type) else column


def _plain(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """A column without its dictionary."""
    return pc.cast(column, column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _as_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    is_view = pa.types.is_string_view(column.type)
    texts = column if is_text(column.type) and not is_view else pc.cast(column, pa.string())  # licences may be numbers
    return pc.cast(texts, pa.large_binary())


def _digits(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts that are numbers; null for all others, as a number that is not there."""
    texts = pc.cast(column, pa.string())
    return pc.if_else(pc.match_substring_regex(texts, _NUMBER), pc.utf8_trim_whitespace(texts), None)


def _files(path: str, key: str) -> list[str]:
    return list(files_at(path, key, ".parquet", "Parquet file", "a file, a folder, a pattern or a URI").values())


def _present(path: str, file: pq.ParquetFile, needed: Set[str], key: str) -> dict[str, str]:
    """The columns of a file that are taken, by our names."""
    schema: pa.Schema = file.schema_arrow
    present = _taken(schema.names, lambda name: _holds(file, name))
    missing = [COLUMNS[ours] for ours in COLUMNS if ours in needed and ours not in present]
    if missing:
        raise OtherColumns(
            f"{key}: {path} has no column {', '.join(missing)}, only {', '.join(schema.names)}; {_HELP[key]}"
        )
    for ours, name in present.items():
        if schema.names.count(name) > 1:
            raise OtherColumns(f"{key}: {path} has several columns {name}; {_HELP[key]}")
        kind, wanted = schema.field(name).type, "text" if ours in _TEXTS else "number"
        if not fits(kind, ours):
            raise OtherColumns(f"{key}: the column {name} of {path} is {kind}, no {wanted}; {_HELP[key]}")
    return present


def _taken(names: list[str], holds: Callable[[str], bool] = bool) -> dict[str, str]:
    """Our names and theirs, in any mix of cases, LAION's own before others; before all those that hold something."""
    theirs = {name.lower(): name for name in reversed(names)}
    found: dict[str, str] = {}
    for ours, name in COLUMNS.items():
        there = [theirs[known] for known in (name.lower(), *_ALIASES.get(ours, ())) if known in theirs]
        if there:
            found[ours] = next(filter(holds, there), there[0]) if len(there) > 1 else there[0]
    return found


def _holds(file: pq.ParquetFile, name: str) -> bool:
    """Whether a column has anything in some row, as far as its type and statistics tell."""
    if any(field.name == name and pa.types.is_null(field.type) for field in file.schema_arrow):
        return False
    metadata = file.metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    places = [place for place in range(metadata.num_columns) if metadata.schema.column(place).path == name]
    chunks = [group.column(place) for group in groups for place in places]
    told = [chunk.statistics for chunk in chunks]
    nulls = sum(one.null_count for one in told if one is not None and one.has_null_count)
    return not places or nulls < metadata.num_rows


def fits(kind: pa.DataType, ours: str) -> bool:
    """Whether a column of a type can be taken as ours."""
    if pa.types.is_dictionary(kind):
        return fits(kind.value_type, ours)
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if pa.types.is_null(kind) or (ours == "licence" and number):
        return True
    if ours not in _TEXTS:
        return bool(number) or is_text(kind)  # of digits, as tables that came from CSV have
    return is_text(kind) or (ours == "caption" and _is_list(kind) and fits(kind.value_type, "url"))


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of a type holds texts."""
    return any(
        is_kind(kind)
        for is_kind in (
            *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
            *(pa.types.is_binary, pa.types.is_large_binary),
        )
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _unreadable(place: str, error: BaseException, key: str) -> DataError:
    """The refusal of a file that is no Parquet, or damaged."""
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
    return DataError(
        f"{key}: {place} cannot be read as LAION's Parquet ({reason}); fetch it again, or give other files"
    )
