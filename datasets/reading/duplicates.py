"""Duplicates among stored pictures: equal pixels, or perceptual hashes that differ in at most four bits.

The hash is pHash (Zauner, 2010): 64 signs of a grey picture's lowest DCT coefficients against their median. It knows no
colours, so the mean colours must agree too. Pairs are found without comparing all with all: of seven bands of bits at
least three are the same where only four bits differ, so pictures that agree in no three bands need no comparison.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from datasets.formats.shards import ImageRow, parquet_bytes

FILE = "duplicates.parquet"
BITS = 4  # most bits in which the hashes of duplicates differ
LEVELS = 16  # most levels of 255 by which a channel's mean differs
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


def find(tables: Mapping[int, bytes]) -> pa.Table:
    """All duplicates (`SCHEMA`) among the pictures of tables by shard, each with the key of the one that is kept.

    In the order of the shards each picture is a duplicate of the first kept one that it looks like, so every one that
    is left out looks like one that stays. `kind` is `exact` where the pixels are the same, else `perceptual`.
    """
    parts = [pq.read_table(pa.BufferReader(content), schema=HASHES) for _, content in sorted(tables.items())]
    rows = pa.concat_tables([HASHES.empty_table(), *parts]).combine_chunks()
    shards = np.repeat(sorted(tables), [part.num_rows for part in parts])
    colours = np.array(rows["colour"].to_pylist(), np.uint8).reshape(-1, 3)
    looks = np.rec.fromarrays([rows["hash"].to_numpy(), *colours.T])
    _, first, look = np.unique(looks, return_index=True, return_inverse=True)
    kept = _kept(rows["hash"].to_numpy()[first], colours[first], first)
    of = first[kept[look]]
    places = np.flatnonzero(of != np.arange(len(of)))
    keys, pixels = rows["key"].to_pylist(), rows["pixels"].to_pylist()
    columns = [
        shards[places],
        [keys[place].hex() for place in places],
        [keys[of[place]].hex() for place in places],
        ["exact" if pixels[place] == pixels[of[place]] else "perceptual" for place in places],
    ]
    return pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)


def alike(content: bytes, keys: Set[str]) -> set[str]:
    """Keys of the other pictures in the groups that some pictures belong to, from the bytes of `FILE`."""
    table = pq.read_table(pa.BufferReader(content))
    named = pc.field("key").isin(list(keys)) | pc.field("of").isin(list(keys))
    groups = pc.field("of").isin(table.filter(named)["of"].unique())
    found = table.filter(groups)
    return {*found["key"].to_pylist(), *found["of"].to_pylist()} - keys


def by_shard(content: bytes) -> dict[int, pa.Array]:
    """Keys of the duplicates of each shard that has any, from the bytes of their file."""
    table = pq.read_table(pa.BufferReader(content), schema=SCHEMA).sort_by("shard").combine_chunks()
    numbers, starts, counts = np.unique(table["shard"].to_numpy(), return_index=True, return_counts=True)
    keys = pa.concat_arrays([pa.array([], pa.string()), *table["key"].chunks])
    return {int(n): keys.slice(int(at), int(count)) for n, at, count in zip(numbers, starts, counts, strict=True)}


def near(values: np.ndarray) -> np.ndarray:
    """All pairs of places, int64 (pairs, 2), whose hashes, uint64, differ in at most `BITS` bits; lower place first."""
    found = [np.empty((0, 2), np.int64)]
    for bands in combinations(BANDS, len(BANDS) - BITS):
        mask = np.bitwise_or.reduce(np.uint64(1) << np.concatenate(bands))
        order = np.argsort(values & mask, kind="stable")
        keys = values[order] & mask
        apart = 1
        while (same := np.flatnonzero(keys[apart:] == keys[:-apart])).size:
            one, other = order[same], order[same + apart]
            close = np.bitwise_count(values[one] ^ values[other]) <= BITS
            found.append(np.sort(np.stack([one[close], other[close]], axis=1), axis=1))
            apart += 1
    return np.unique(np.concatenate(found), axis=0)


def _kept(values: np.ndarray, colours: np.ndarray, first: np.ndarray) -> np.ndarray:
    """For each look the one that is kept of those like it: itself, or one that occurs earlier (`first`)."""
    pairs = near(values)
    alike = (np.abs(colours[pairs[:, 0]].astype(int) - colours[pairs[:, 1]]) <= LEVELS).all(axis=1)
    earlier: defaultdict[int, list[int]] = defaultdict(list)
    for one, other in pairs[alike].tolist():
        before, after = sorted((one, other), key=lambda look: first[look])
        earlier[after].append(before)
    kept = np.arange(len(values))
    for look in sorted(earlier, key=lambda look: first[look]):
        staying = [other for other in earlier[look] if kept[other] == other]
        if staying:
            kept[look] = min(staying, key=lambda other: first[other])
    return kept
