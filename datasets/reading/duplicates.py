"""Duplicates among stored pictures: equal pixels, or perceptual hashes that differ in at most four bits.

The hash is pHash (Zauner, 2010): 64 signs of a grey picture's lowest DCT coefficients against their median. It knows no
colours, so the mean colours must agree too. Pairs are found without comparing all with all: of seven bands of bits at
least three are the same where only four bits differ, so pictures that agree in no three bands need no comparison. Where
very many agree in three, as pictures of next to nothing do, not all are compared; how many these are is counted.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from datasets.formats.shards import ImageRow, parquet_bytes

FILE = "duplicates.parquet"
BITS = 4  # most bits in which the hashes of duplicates differ
LEVELS = 16  # most levels of 255 by which a channel's mean differs
CROWD, NEXT = 64, 4  # hashes with the same bands: as many are compared each with all, of more each with so many
BANDS = np.array_split(np.arange(64, dtype=np.uint64), BITS + 3)
HASHES = pa.schema(
    [
        ("key", pa.binary(16)),
        ("pixels", pa.binary(32)),  # sha256
        ("hash", pa.uint64()),
        ("colour", pa.list_(pa.uint8(), 3)),  # means of red, green and blue
    ]
)
SCHEMA = pa.schema([("shard", pa.int32()), ("key", pa.string()), ("of", pa.string()), ("kind", pa.string())])
_STEPS = np.array([1 << 16, 1 << 8, 1])  # from a colour, or a cell of colours, to the next by each channel
_AROUND = [int(np.dot(step, _STEPS)) for step in product((-1, 0, 1), repeat=3)]  # to a cell itself and those around it
_DCT = np.cos(np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1))  # the first rows of DCT-II's matrix


def perceptual_hash(pixels: np.ndarray) -> int:
    """pHash of a picture, uint8 (H, W, 3): the 8x8 lowest coefficients row by row, the first one in the highest bit."""
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    low = np.round(_DCT @ grey @ _DCT.T, 3)  # or rounding decided about flat pictures
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def hashes(rows: Sequence[ImageRow]) -> bytes:
    """The table of what pictures look like (`HASHES`), in their order."""
    lines = []
    for row in rows:
        pixels = row.pixels()
        sha256 = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
        colour = np.round(pixels.mean(axis=(0, 1))).astype(int).tolist()
        values = (bytes.fromhex(row.key), sha256, perceptual_hash(pixels), colour)
        lines.append(dict(zip(HASHES.names, values, strict=True)))
    return parquet_bytes(pa.Table.from_pylist(lines, schema=HASHES))


@dataclass(frozen=True)
class Duplicates:
    """What `find` has found: a table (`SCHEMA`), and of how many pictures not all that may be near were compared."""

    table: pa.Table
    crowded: int


def find(tables: Mapping[int, bytes]) -> Duplicates:
    """All duplicates among the pictures of tables by shard, each with the key of the one that is kept.

    In the order of the shards each picture is a duplicate of the first kept one that it looks like, so every one that
    is left out looks like one that stays. `kind` is `exact` where the pixels are the same, else `perceptual`.
    """
    parts = [pq.read_table(pa.BufferReader(content), schema=HASHES) for _, content in sorted(tables.items())]
    rows = pa.concat_tables([HASHES.empty_table(), *parts])
    shards = np.repeat(np.array(sorted(tables), np.int32), [part.num_rows for part in parts])
    colours = pc.list_flatten(rows["colour"]).to_numpy().reshape(-1, 3)
    values, hashed = np.unique(rows["hash"].to_numpy(), return_inverse=True)
    first, look = _looks(hashed, colours)
    pairs, crowded = near(values)
    of = first[_kept(hashed[first], colours[first], first, pairs)[look]]
    places = np.flatnonzero(of != np.arange(len(of)))
    ours, theirs = rows.take(places), rows.take(of[places])
    columns = [
        shards[places],
        [key.hex() for key in ours["key"].to_pylist()],
        [key.hex() for key in theirs["key"].to_pylist()],
        np.where(pc.equal(ours["pixels"], theirs["pixels"]).to_numpy(), "exact", "perceptual"),
    ]
    table = pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)
    return Duplicates(table, int(crowded[hashed].sum()))


def alike(content: bytes, keys: Set[str]) -> set[str]:
    """Keys of the other pictures in the groups that some pictures belong to, from the bytes of `FILE`."""
    table = pq.read_table(pa.BufferReader(content))
    named = pc.field("key").isin(list(keys)) | pc.field("of").isin(list(keys))
    groups = pc.field("of").isin(table.filter(named)["of"].unique())
    found = table.filter(groups)
    return {*found["key"].to_pylist(), *found["of"].to_pylist()} - keys


def stand_ins(content: bytes) -> dict[str, str]:
    """For pictures that look like others, and for those, the key of the one that is kept; from the table's bytes."""
    table = pq.read_table(pa.BufferReader(content), schema=SCHEMA)
    kept = table["of"].to_pylist()
    return dict(zip(table["key"].to_pylist(), kept, strict=True)) | {key: key for key in kept}


def by_shard(content: bytes) -> dict[int, pa.Array]:
    """Keys of the duplicates of each shard that has any, from the bytes of their file."""
    table = pq.read_table(pa.BufferReader(content), schema=SCHEMA).sort_by("shard").combine_chunks()
    numbers, starts, counts = np.unique(table["shard"].to_numpy(), return_index=True, return_counts=True)
    keys = pa.concat_arrays([pa.array([], pa.string()), *table["key"].chunks])
    return {int(n): keys.slice(int(at), int(count)) for n, at, count in zip(numbers, starts, counts, strict=True)}


def near(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of places, int64 (pairs, 2), whose hashes, uint64, differ in at most `BITS` bits; lower place first.

    They are all there are, but for those of hashes that agree with more than `CROWD` others in the same bands: such a
    one is compared with the `NEXT` that follow it. Also returned is which these are, bool (places,).
    """
    count = len(values)
    found, crowded = np.empty(0, np.int64), np.zeros(count, bool)
    for bands in combinations(BANDS, len(BANDS) - BITS):
        mask = np.bitwise_or.reduce(np.uint64(1) << np.concatenate(bands))
        order = np.lexsort((values, values & mask))
        keys = values[order] & mask
        _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        many = sizes[group] > CROWD
        crowded[order[many]] = True
        close, places = [found], np.arange(count)
        for apart in range(1, CROWD):
            places = places[: np.searchsorted(places, count - apart)]
            places = places[(keys[places + apart] == keys[places]) & ((apart <= NEXT) | ~many[places])]
            one, other = order[places], order[places + apart]
            alike = np.bitwise_count(values[one] ^ values[other]) <= BITS
            close.append((np.minimum(one, other) * count + np.maximum(one, other))[alike])
            if not places.size:
                break
        found = np.unique(np.concatenate(close))
    return np.stack(np.divmod(found, max(1, count)), axis=1), crowded


def _looks(hashed: np.ndarray, colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pictures with the same hash and mean colours: the first of each such look, and each picture's look, a number."""
    tints = colours.astype(np.int64) @ _STEPS
    order = np.lexsort((tints, hashed))  # stable: the first of the same comes first
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(hashed[order]) != 0) | (np.diff(tints[order]) != 0)
    look = np.empty(len(order), np.int64)
    look[order] = np.cumsum(new) - 1
    return order[new], look


def _kept(hashed: np.ndarray, colours: np.ndarray, first: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """For each look the one that is kept of those like it: itself, or one that occurs earlier (`first`).

    `hashed` numbers the looks' hashes, `pairs` are near ones among these. Of one hash at most one look is kept in a
    cell of colours whose sides are `LEVELS`, since it is like all others in there: so a picture that is flat, and has
    the hash of all flat ones, is compared with those of its colour alone.
    """
    both = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)
    starts = np.searchsorted(both[:, 0], np.arange(int(hashed.max(initial=0)) + 2))
    alone = (np.bincount(hashed, minlength=1)[hashed] == 1) & (np.diff(starts)[hashed] == 0)
    kept = np.arange(len(hashed))
    cells = (colours // (LEVELS + 1) + 1).astype(np.int64) @ _STEPS
    staying = defaultdict[int, dict[int, int]](dict)  # looks by cell and hash
    for look in sorted(np.flatnonzero(~alone).tolist(), key=first.__getitem__):
        own, cell = int(hashed[look]), int(cells[look])
        near_ones = {own, *both[starts[own] : starts[own + 1], 1].tolist()}
        there = [found for step in _AROUND if (found := staying.get(cell + step))]
        others = [found[number] for found in there for number in near_ones & found.keys()]
        like = np.array(others, np.int64)
        like = like[(np.abs(colours[like].astype(np.int64) - colours[look]) <= LEVELS).all(axis=1)]
        if like.size:
            kept[look] = like[np.argmin(first[like])]
        else:
            staying[cell][own] = look
    return kept
