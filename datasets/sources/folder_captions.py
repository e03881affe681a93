"""Captions as they lie in a folder of pictures: in files beside them, or in tables (Hugging Face's imagefolder).

x.txt, x.json, ...         beside x.jpg (`datasets.sources.beside`)
metadata.csv, .tsv         with a header; commas, semicolons or tabs
metadata.jsonl, .parquet   an object or a row a picture
"""

import codecs
import contextlib
import csv
import json
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from datasets.config import DataError
from datasets.files.tars import TEXT_BYTES
from datasets.left_out import LeftOut
from datasets.source_settings import FolderConfig
from datasets.sources import beside, laion
from datasets.sources.beside import Found, placed
from datasets.sources.captions import BOM, HALF, Parts, best, garbled, parts_of

TABLES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
FILE_COLUMN = "file_name"
CAPTION_COLUMNS = ("text", "caption", "captions")  # of those that a table has the first that says something in a row
HELP = (
    "put the caption of x.jpg into x.txt beside it, or give a metadata.csv with the columns file_name,text, or caption "
    "pictures by their names: data.folder.uncaptioned=file_name"
)
_DELIMITERS = (",", ";", "\t")
_ABSOLUTE = re.compile(r"/|[A-Za-z]:")
_BLANK = f" \t\r\n{BOM}"
_LONGEST_FIELD = 1 << 24  # characters; csv's own limit refuses long captions

Row = tuple[str, object, list[object]]  # where it stands, its file_name, what may be its caption, the first first


def is_table(name: str) -> bool:
    """Whether a file is a table of captions, by its name."""
    return posixpath.basename(name).lower() in TABLES


def of_tables(
    files: Mapping[str, Path], pictures: Mapping[str, Path], config: FolderConfig, left_out: LeftOut
) -> Iterator[Found]:
    """What the rows of the folder's tables say of pictures.

    Left out: `no_picture`, `fields` (more or fewer than the header, or quotes that end nowhere), `no_row` (a line that
    is no JSON, or no object).

    Raises:
        DataError: a table is damaged, has no column of files or of captions, or no row that is one.
    """
    for table in filter(is_table, files):
        rows = list(_rows(table, files[table], config.encoding, left_out))
        meant = _meant([file_name for _, file_name, _ in rows], posixpath.dirname(table), pictures)
        for (place, file_name, captions), name in zip(rows, meant, strict=True):
            if name is None:
                shown = f"there is no picture {file_name}" if isinstance(file_name, str) else f"file_name={file_name!r}"
                left_out.add("no_picture", place, f"{shown}; names are relative to the table")
            else:
                parts = best(_in_encoding(caption, files[table], config.encoding) for caption in captions)
                yield name, *placed(parts, place)


def of_files(
    files: Mapping[str, Path], pictures: Collection[str], done: Collection[str], config: FolderConfig, left_out: LeftOut
) -> Iterator[Found]:
    """What files beside pictures say of them (`beside.found`)."""
    texts = list(filter(beside.is_text, files))
    yield from beside.found(pictures, texts, done, lambda name: _text(files[name], config), left_out)


def of_name(name: str, which: str) -> str:
    """A picture's file or folder name as words: `red_fox-2.jpg` says red fox 2."""
    words = posixpath.splitext(posixpath.basename(name))[0] if which == "file_name" else posixpath.dirname(name)
    return " ".join(re.split(r"[\s_-]+", posixpath.basename(words))).strip()


def about(file: Path, encoding: str) -> beside.About:
    """What a .json says, of not too many bytes: others are no picture's."""
    size = file.stat().st_size
    if size > TEXT_BYTES:
        return {}, ("too_big", f"it has {size:,} bytes, more than {TEXT_BYTES:,}")
    return beside.about(file.read_bytes(), lambda content: _letters(content, encoding))


def _text(file: Path, config: FolderConfig) -> Parts:
    try:
        if beside.is_json(file.name):
            return beside.captions(about(file, config.encoding))
        text = _letters(file.read_bytes(), config.encoding)
    except OSError as error:
        return [], [("unreadable", str(error))]
    except UnicodeError as error:
        return [], [("encoding", str(error))]
    joined = config.caption_lines == "joined"
    lines = [] if joined else [line for line in text.splitlines() if line.strip()]
    return parts_of(lines or text)


def _letters(content: bytes, encoding: str) -> str:
    """A text; UnicodeError says why it is none in its encoding, and which it may be in."""
    try:
        text = _decoded(content, encoding)
        if garbled(text):
            raise UnicodeError("it is full of control characters")
    except UnicodeError as error:
        raise UnicodeError(f"it is no text in {encoding} ({error}){_hint(content)}") from error
    return text


def _in_encoding(value: object, file: Path, encoding: str) -> Parts:
    """The captions in a value of a table; bytes that are no text have come as halves of characters."""
    if isinstance(value, str) and HALF.search(value):
        return [], [("encoding", f"its caption is no text in {encoding}{_hint(file.read_bytes())}")]
    return parts_of(value)


def _meant(file_names: Sequence[object], folder: str, pictures: Mapping[str, Path]) -> list[str | None]:
    """The pictures that the rows of a table mean; None where there is none.

    Absolute paths of several folders may end in the name of one picture (train/0.png, val/0.png): it is that of the
    folder of which most are here, then of which fewest are not; where nothing tells, of each.
    """
    found = [_found(name, folder, pictures) if isinstance(name, str) else None for name in file_names]
    most = Counter(once for _, once in filter(None, found))

    @cache
    def rank(once: str) -> tuple[bool, int, int]:
        every = sum(isinstance(name, str) and name.replace("\\", "/").startswith(once) for name in file_names)
        return not once, most[once], most[once] - every

    best: dict[str, str] = {}
    for name, once in filter(None, found):
        if best.setdefault(name, once) != once and rank(once) > rank(best[name]):
            best[name] = once
    return [one[0] if one and (best[one[0]] == one[1] or rank(best[one[0]]) == rank(one[1])) else None for one in found]


def _found(file_name: str, folder: str, pictures: Mapping[str, Path]) -> tuple[str, str] | None:
    """The picture that a table means, and where its folder lay once: "" of a name relative to the table."""
    written = unicodedata.normalize("NFC", file_name)
    for path in dict.fromkeys((written, written.replace("\\", "/"))):
        name = posixpath.normpath(posixpath.join(folder, path))
        if name in pictures:
            return name, ""
        if _ABSOLUTE.match(path):
            parts = path.split("/")[1:]
            ends = ("/".join(parts[start:]) for start in range(len(parts)))
            if end := next((end for end in ends if end in pictures), None):
                return end, path.removesuffix(end)
    return None


def _rows(name: str, file: Path, encoding: str, left_out: LeftOut) -> Iterator[Row]:
    """The rows of a table; one in which nothing has a caption is refused."""
    kind = posixpath.splitext(name)[1].lower()
    read = {".parquet": _of_parquet, ".jsonl": _of_json}.get(kind, _of_csv)
    try:
        yield from read(name, file, encoding, left_out)
    except (KeyError, TypeError, ValueError, csv.Error, pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["?"])[0]
        hint = _hint(file.read_bytes()) if isinstance(error, UnicodeError) else ""
        raise DataError(
            f"data.folder.path: {file} is no table of {FILE_COLUMN} and {CAPTION_COLUMNS[0]}: {reason}{hint}"
        ) from error


class _OtherColumns(ValueError):
    """A table, or a row of it, has no column of files or none of captions."""


def _decoded(content: bytes, encoding: str) -> str:
    """A text as `_lines` reads it: of UTF-16 with its mark, for without one any bytes are some letters."""
    return codecs.getincrementaldecoder(encoding)().decode(content, final=True)


def _hint(content: bytes) -> str:
    """The encoding that a text may be in, as the end of a sentence."""
    found = "latin-1"  # which all bytes are
    for encoding in reversed(("utf-16", "utf-8", "cp1252", "utf-16-le")):
        with contextlib.suppress(UnicodeError):
            found = found if garbled(_decoded(content, encoding)) else encoding
    return f"; give data.folder.encoding, such as {found}"


def _columns(names: list[str]) -> tuple[str, list[str]]:
    """A table's column of files and those of captions, by its own names."""
    theirs = {str(name).strip().lower(): name for name in reversed(names)}
    captions = [theirs[name] for name in CAPTION_COLUMNS if name in theirs]
    if FILE_COLUMN not in theirs or not captions:
        missing = FILE_COLUMN if FILE_COLUMN not in theirs else " or ".join(CAPTION_COLUMNS)
        raise _OtherColumns(f"it has no column {missing}, only {', '.join(map(str, names)) or 'none'}; call one so")
    return theirs[FILE_COLUMN], captions


def _of_csv(name: str, file: Path, encoding: str, left_out: LeftOut) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    with _lines(file, encoding) as lines:
        before, first = next(((number, line) for number, line in enumerate(lines) if line.strip()), (0, ""))
        first = first.removeprefix(BOM)
        if HALF.search(first) or garbled(first):  # its columns would seem to be missing
            raise UnicodeError(f"it is no text in {encoding}")
        delimiter = max(_DELIMITERS, key=lambda sign: _header(first, sign).count(FILE_COLUMN))
        header = next(csv.reader([first], delimiter=delimiter, skipinitialspace=True), [])
        file_column, caption_columns = _columns(header)
        file_at, captions_at = header.index(file_column), [header.index(column) for column in caption_columns]
        rows = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)  # else quotes would count
        row: list[str] | None = []
        while row is not None:
            start, unread = before + rows.line_num + 2, ""
            try:
                row = next(rows, None)
            except csv.Error as error:
                row, unread = [], f"its quotes do not match ({error}); close them, or double those that stand within"
            end = before + rows.line_num + 1
            where = f"{name} line {start}" if start == end else f"{name} lines {start} to {end}"
            if unread:
                left_out.add("fields", where, unread)
            elif row and len(row) == len(header):
                yield where, row[file_at], [row[place] for place in captions_at]
            elif row:
                told = f"it has {len(row)} fields, its header {len(header)}; put quotes around what holds the separator"
                left_out.add("fields", where, told if start == end else f"{told}, and two where one stands within")


def _header(line: str, delimiter: str) -> list[str]:
    return [field.strip().lower() for field in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])]


def _of_json(name: str, file: Path, encoding: str, left_out: LeftOut) -> Iterator[Row]:
    any_row, error = False, None
    with _lines(file, encoding) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{name} line {number}"
            if not line.strip(_BLANK):
                continue
            try:
                row = _parsed(line.removeprefix(BOM))
            except (TypeError, ValueError) as wrong:  # which costs a row, where others are whole
                error = error or type(wrong)(f"line {number}: {wrong}")
                left_out.add("no_row", where, str(wrong))
                continue
            try:
                file_column, caption_columns = _columns(list(row))
                any_row = True
            except _OtherColumns as missing:  # of this row; it may be the only one
                error = error or type(missing)(f"line {number}: {missing}")
                file_column, caption_columns = FILE_COLUMN, []
            yield where, row.get(file_column), [row[column] for column in caption_columns]
    if error is not None and not any_row:
        raise error


def _parsed(line: str) -> dict[str, object]:
    if HALF.search(line) or garbled(line):
        raise UnicodeError("it is no text in the encoding of its file")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error.msg}, at its character {error.pos + 1})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise TypeError("it is no object")
    return row


def _of_parquet(name: str, file: Path, encoding: str, left_out: LeftOut) -> Iterator[Row]:
    with pq.ParquetFile(file) as table:
        file_column, caption_columns = _columns(table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(columns=[file_column, *caption_columns]):
            columns = (laion.texts(batch[name]).to_pylist() for name in (file_column, *caption_columns))
            for called, *captions in zip(*columns, strict=True):
                number += 1
                yield f"{name} row {number}", os.fsdecode(called) if isinstance(called, bytes) else called, captions


def _lines(file: Path, encoding: str) -> TextIO:
    """The lines of a text; bytes that are none in the encoding come as halves of characters (PEP 383)."""
    return open(file, encoding=encoding, newline="", errors="surrogateescape")
