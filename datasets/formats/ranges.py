"""Where each picture lies in its tar, so that who needs few of a shard reads these alone.

The table beside a tar has of each picture the place of its files there, picture and JSON, which follow each other, and
the sha256 of these bytes. Tables from before tell none of it: then a shard is read whole, as it is where much of it is
needed.
"""

import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets.files import parts, storage
from datasets.formats import shards
from datasets.formats.shard_table import Shard
from datasets.formats.shards import ImageRow
from datasets.outcomes import Outcome

COLUMNS = ("offset", "bytes", "stored")  # in the tar: first byte, how many, their sha256 in hex
WHOLE = 8  # a shard is read whole where this times the wanted pictures are more than it holds


def of_tar(content: bytes) -> dict[str, dict[str, Any]]:
    """`COLUMNS` by key of each picture of a tar that `shards.write_images` made."""
    found: dict[str, tuple[int, int]] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            key = member.name.partition(".")[0]
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            found[key] = found.get(key, (member.offset, 0))[0], end
    return {key: _entry(content[start:end], start) for key, (start, end) in found.items()}


def _entry(content: bytes, start: int) -> dict[str, Any]:
    return dict(zip(COLUMNS, (start, len(content), hashlib.sha256(content).hexdigest()), strict=True))


def without(rows: Sequence[Mapping[str, Any]], keys: Set[str]) -> list[dict[str, Any]]:
    """Rows of a table, in the order of its tar, where these now lie once those of some keys are taken out of that."""
    gone, found = 0, []
    for row in rows:
        size = row.get("bytes")
        taken = row["key"] in keys
        found.append({**row, "offset": row["offset"] - gone} if size and not taken else dict(row))
        gone += size if size and taken else 0
    return found


def read(shard: Shard, places: Sequence[int]) -> list[ImageRow]:
    """The pictures at some places of a shard of images, ascending; verified.

    Raises:
        CorruptFile: the shard is not what its manifest says.
    """
    if (found := _some(shard, places, None)) is not None:
        return found
    rows = shard.images()
    return [rows[place] for place in places]


def by_keys(shard: Shard, keys: Set[str]) -> list[ImageRow] | None:
    """The pictures of some keys, verified; None where the shard is to be read whole."""
    if (index := _index(shard)) is None:
        return None
    places = [place for place, key in enumerate(index["key"].to_pylist()) if key in keys]
    return _some(shard, places, index)


def _some(shard: Shard, places: Sequence[int], index: pa.Table | None) -> list[ImageRow] | None:
    """The pictures at some places; None where these are many, or nobody says where they lie."""
    if not places:
        return []
    if WHOLE * len(places) > shard.rows:
        return None
    index = _index(shard) if index is None else index
    if index is None or not set(COLUMNS) <= set(index.column_names) or index["bytes"].null_count:
        return None
    tar = _read(shard, index.select(COLUMNS).take(places).to_pylist())
    return None if tar is None else shards.read_images(tar, len(places))


def _index(shard: Shard) -> pa.Table | None:
    """The rows of a shard's table whose pictures are in the tar, in its order; None where it has no table."""
    name = shards.index_name(shard.number)
    if name not in shard.files:
        return None
    return pq.read_table(pa.BufferReader(shard.read(name))).filter(pc.field("status") == str(Outcome.OK))


def _read(shard: Shard, told: Sequence[Mapping[str, Any]]) -> bytes | None:
    """A tar of the pictures that lie there; None where other bytes do, as after half a removal, or in a damaged one."""
    path = storage.join(shard.folder, shards.image_name(shard.number))
    found = list(storage.ahead(partial(parts.read, path, one["offset"], one["bytes"]) for one in told))
    if any(hashlib.sha256(part).hexdigest() != one["stored"] for part, one in zip(found, told, strict=True)):
        return None
    return b"".join(found) + bytes(2 * tarfile.BLOCKSIZE)
