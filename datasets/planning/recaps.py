"""Captions from another table, joined to stored pictures by URL or key: such as Recap-DataComp-1B's.

A table may hold more than was planned by far. So it is the pictures' names, their URLs and those of what they were
copied from, that are hashed to 64 bits and lie sorted in a file that is mapped into memory; the table streams past
them, and what it has of a picture is put aside by shard.
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa

from datasets.caption_settings import RecapConfig, clean_caption
from datasets.config import DataError
from datasets.planning.spill import Spill
from datasets.planning.urls import normalised_url
from datasets.sources import laion
from datasets.sources.captions import parts_of
from datasets.sources.files_at import files_at

COLUMNS = ("re_caption", "recaption", "caption", "captions", "text")  # the first one that a table has
_NAMES = ("url", "key", "image_url")  # by which rows name their pictures, the first one that a table has
_BATCH_ROWS = 1 << 14
_SHIFT = 32  # bits of a picture's place in its shard

Names = tuple[str, str, str | None]  # a picture's key, URL and origin
Captions = dict[int, list[str]]  # by the place of their picture in its shard


def joined(
    stored: Iterable[tuple[int, list[Names]]], config: RecapConfig, key: str, read: Counter[str]
) -> Iterator[tuple[int, Captions]]:
    """Each shard's number with the captions of its pictures, clean, each once, in the order of the table's rows.

    Args:
        stored: number and pictures of each shard, ascending.
        key: of the config, where the table's settings stand.
        read: counts the table's rows as `joined`, `unknown` (of no picture here) and `no_caption` (which is blank),
            complete when the first shard comes.

    Raises:
        DataError: there is no such table, it lacks a column, or is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="recaps-") as folder, Spill(folder, "part") as found:
        by, column = check(config, key)
        pictures = _Pictures.of(stored, by, Path(folder))
        for rows in _rows(config, key, by, column):
            found.add(pictures.captioned(rows, by, read))
        numbers = iter(pictures.shards)
        for _, table in found.buckets():
            captions: dict[int, Captions] = {}
            for place, text in sorted(
                zip(table["place"].to_pylist(), table["caption"].to_pylist(), strict=True), key=itemgetter(0)
            ):
                texts = captions.setdefault(place >> _SHIFT, {}).setdefault(place % (1 << _SHIFT), [])
                if text not in texts:
                    texts.append(text)
            for shard, texts_of in captions.items():
                yield from ((other, {}) for other in takewhile(shard.__gt__, numbers))
                yield shard, texts_of
        yield from ((other, {}) for other in numbers)


def check(config: RecapConfig, key: str) -> tuple[str, str]:
    """By what the table's rows name their pictures, and its column of captions.

    Raises:
        DataError: as of `joined`, as far as its first file tells.
    """
    path = _files(config, key)[0]
    with laion.parquet(path, f"{key}.path") as file:
        schema = file.schema_arrow
    theirs = {name.lower(): name for name in reversed(schema.names)}
    by = next((name for name in _NAMES if name in theirs), None)
    if by is None:
        raise DataError(f"{key}.path: {path} has no column {' or '.join(_NAMES)}, only {', '.join(schema.names)}")
    column = config.column or next((theirs[name] for name in COLUMNS if name in theirs), None)
    if column is None or column not in schema.names:
        told = f"no column {config.column or ' or '.join(COLUMNS)}, only {', '.join(schema.names)}"
        raise DataError(f"{key}.path: {path} has {told}; give {key}.column")
    if twice := [name for name in (theirs[by], column) if schema.names.count(name) > 1]:
        raise DataError(f"{key}.path: {path} has several columns {twice[0]}; give a table with one of each name")
    kind = schema.field(column).type
    if pa.types.is_null(kind) or not laion.fits(kind, "caption"):
        raise DataError(f"{key}.column: {column} of {path} is {kind}, no text and no list of texts; give another")
    return by, column


def _files(config: RecapConfig, key: str) -> list[str]:
    give = "a file, a folder, a pattern or a URI"
    return list(files_at(config.path, f"{key}.path", ".parquet", "Parquet file", give).values())


def _rows(config: RecapConfig, key: str, by: str, column: str) -> Iterator[pa.Table]:
    """The table's rows as `name` and `caption`."""
    for path in _files(config, key):
        with laion.parquet(path, f"{key}.path") as file:
            theirs = {name.lower(): name for name in reversed(file.schema_arrow.names)}
            taken = {"name": theirs.get(by), "caption": column}
            if any(file.schema_arrow.names.count(name) != 1 for name in taken.values()):
                told = f"has not one column {by} and one {column} each, as the first file has"
                raise DataError(f"{key}.path: {path} {told}")
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(taken.values())):
                yield pa.table({ours: laion.texts(batch[name]) for ours, name in taken.items()})


@dataclass(frozen=True)
class _Pictures:
    """The stored pictures by the hashes of their names, ascending, and where they lie: uint64 (N,), from files.

    A place is a shard's number << `_SHIFT` | the picture's there.
    """

    hashes: np.ndarray
    places: np.ndarray
    shards: list[int]

    @classmethod
    def of(cls, stored: Iterable[tuple[int, list[Names]]], by: str, folder: Path) -> "_Pictures":
        """The pictures by key, or by URL and origin."""
        numbers, files = list[int](), (folder / "hashes", folder / "places")
        with Spill(str(folder), "hash") as spill, files[0].open("wb") as hashes, files[1].open("wb") as places:
            for shard, pictures in stored:
                numbers.append(shard)
                names = [
                    ({key} if by == "key" else {name for name in (url, origin) if name})
                    for key, url, origin in pictures
                ]
                pairs = [(name, shard << _SHIFT | place) for place, known in enumerate(names) for name in known]
                found = _hashes(name for name, _ in pairs)
                spill.add(pa.table({"hash": found, "place": pa.array([place for _, place in pairs], pa.uint64())}))
            for _, rows in spill.buckets():
                rows = rows.sort_by([("hash", "ascending"), ("place", "ascending")])
                hashes.write(rows["hash"].to_numpy().tobytes())
                places.write(rows["place"].to_numpy().tobytes())
        if not files[0].stat().st_size:
            return cls(np.empty(0, np.uint64), np.empty(0, np.uint64), numbers)
        return cls(np.memmap(files[0], np.uint64, "r"), np.memmap(files[1], np.uint64, "r"), numbers)

    def captioned(self, rows: pa.Table, by: str, read: Counter[str]) -> pa.Table:
        """The captions of a table's rows, a row each: `place` of the picture, `part` by which they are put aside."""
        wanted = _hashes(_name(name, by) for name in rows["name"].to_pylist())
        starts, ends = (np.searchsorted(self.hashes, wanted, side=side).tolist() for side in ("left", "right"))
        found: list[tuple[int, str]] = []
        for start, end, value in zip(starts, ends, rows["caption"].to_pylist(), strict=True):
            texts = [text for part in (value if isinstance(value, list) else [value]) if (text := _clean(part))]
            read["unknown" if start == end else "joined" if texts else "no_caption"] += 1
            found += [(place, text) for place in self.places[start:end].tolist() for text in texts]
        places = np.array([place for place, _ in found], np.uint64)
        parts = (places >> np.uint64(_SHIFT)) * np.uint64(256) // np.uint64(self.shards[-1] + 1) << np.uint64(56)
        texts = pa.array([text for _, text in found], pa.string())
        return pa.table({"part": parts, "place": places, "caption": texts})


def _name(value: object, by: str) -> str:
    """What a row calls its picture, as we spell it; nothing, which no picture is called, where that cannot be."""
    try:
        text = value.decode() if isinstance(value, bytes) else str(value or "")
        return text if by == "key" else normalised_url(text)
    except ValueError:
        return ""


def _clean(value: object) -> str:
    texts, _ = parts_of(value if isinstance(value, bytes) else str(value or ""))
    return clean_caption(texts[0]) if texts else ""


def _hashes(names: Iterable[str]) -> np.ndarray:
    """blake2b-64 of each name, uint64 (N,)."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)
