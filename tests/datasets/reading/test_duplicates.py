"""Duplicates: the hash against its definition, pairs against all pairs, and what is kept of those that look alike."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter
from scipy.fft import dctn

from datasets.formats import shards
from datasets.formats.shards import ImageRow
from datasets.reading import duplicates
from datasets.reading.duplicates import BITS, HASHES, near, perceptual_hash


def noise(seed: int, side: int = 64) -> Image.Image:
    """A picture with some structure, another one for each seed."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC)


def stored(number: int, picture: Image.Image, kind: str = "PNG", **options: int) -> ImageRow:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return ImageRow(number, f"{number:032x}", "", f"caption {number}", "png", buffer.getvalue())


def found(*tables: list[ImageRow]) -> list[tuple[int, int, int, str]]:
    """Shard, number, number of the one that is kept, and kind."""
    table = duplicates.find({shard: duplicates.hashes(rows) for shard, rows in enumerate(tables)}).table
    return [(row["shard"], int(row["key"], 16), int(row["of"], 16), row["kind"]) for row in table.to_pylist()]


@pytest.mark.parametrize("seed", range(5))
def test_the_hash_is_the_signs_of_scipys_dct_against_their_median(seed):
    picture = noise(seed)
    grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
    low = dctn(grey, type=2)[:8, :8]
    assert perceptual_hash(np.asarray(picture)) == sum(
        int(bit) << place for place, bit in enumerate((low > np.median(low)).ravel()[::-1])
    )


def test_the_banded_index_finds_exactly_the_pairs_that_comparing_all_with_all_finds():
    generator = np.random.default_rng(0)
    values = generator.integers(0, 2**64, 100, np.uint64)
    for _ in range(6):  # near ones, of 0 to 12 flipped bits
        flips = [generator.choice(64, count, replace=False) for count in generator.integers(0, 13, 100)]
        masks = np.array([sum(1 << int(bit) for bit in bits) for bits in flips], np.uint64)
        values = np.concatenate([values, values[generator.integers(0, len(values), 100)] ^ masks])
    distances = np.bitwise_count(values[:, None] ^ values[None])
    expected = np.argwhere(np.triu(distances <= BITS, k=1))
    assert len(expected) > 100
    pairs, crowded = near(values)
    np.testing.assert_array_equal(pairs, expected)
    assert not crowded.any()


def test_equal_pixels_and_small_changes_are_duplicates_of_the_first_and_others_are_not():
    pictures = [noise(seed) for seed in range(4)]
    copy, lossy = stored(10, pictures[0], "PNG", compress_level=1), stored(11, pictures[1], "JPEG", quality=80)
    blurred = stored(12, pictures[1].filter(ImageFilter.GaussianBlur(1)))
    first = [stored(number, picture) for number, picture in enumerate(pictures)]
    assert found(first, [copy, lossy, blurred]) == [
        (1, 10, 0, "exact"),
        (1, 11, 1, "perceptual"),
        (1, 12, 1, "perceptual"),
    ]


def test_every_picture_that_is_left_out_looks_like_one_that_stays():
    """A chain, each near its neighbours alone: the middle one goes, and both ends stay."""
    rows = [
        {"key": number.to_bytes(16, "big"), "pixels": bytes([number] * 32), "hash": value, "colour": [9, 9, 9]}
        for number, value in enumerate((0, 0b1111, 0b1111_1111))
    ]
    content = shards.parquet_bytes(pa.Table.from_pylist(rows, schema=HASHES))
    left_out = duplicates.find({0: content}).table.to_pylist()
    assert [(int(row["key"], 16), int(row["of"], 16)) for row in left_out] == [(1, 0)]


def test_flat_pictures_of_other_colours_are_no_duplicates():
    rows = [stored(number, Image.new("RGB", (32, 32), colour)) for number, colour in enumerate(("red", "blue", "red"))]
    assert found(rows) == [(0, 2, 0, "exact")]


def looking(hashes: np.ndarray, colours: np.ndarray) -> bytes:
    """A table of pictures with these hashes and mean colours."""
    rows = [
        {"key": number.to_bytes(16, "big"), "pixels": bytes([0] * 32), "hash": value, "colour": colour}
        for number, (value, colour) in enumerate(zip(hashes.tolist(), colours.tolist(), strict=True))
    ]
    return shards.parquet_bytes(pa.Table.from_pylist(rows, schema=HASHES))


def test_what_is_kept_is_what_comparing_all_with_all_keeps():
    """Most of one hash, as flat pictures are, some near it, some elsewhere; of all colours."""
    generator = np.random.default_rng(0)
    hashes = np.full(600, 1 << 63, np.uint64)
    hashes[400:500] ^= np.uint64(1) << generator.integers(0, 8, 100).astype(np.uint64)
    hashes[500:] = generator.integers(0, 2**64, 100, np.uint64)
    generator.shuffle(hashes)
    colours = generator.integers(0, 80, (600, 3))
    kept: list[int] = []
    expected = {}
    for number in range(600):
        bits = np.bitwise_count(hashes[kept] ^ hashes[number]) <= BITS
        like = bits & (np.abs(colours[kept] - colours[number]) <= duplicates.LEVELS).all(axis=1)
        if like.any():
            expected[number] = kept[np.flatnonzero(like)[0]]
        else:
            kept.append(number)
    found = duplicates.find({0: looking(hashes, colours)})
    assert {int(row["key"], 16): int(row["of"], 16) for row in found.table.to_pylist()} == expected
    assert len(expected) > 200
    assert found.crowded == 0


def test_flat_pictures_are_compared_with_those_of_their_colour_alone(monkeypatch):
    compared: list[int] = []
    monkeypatch.setattr(duplicates, "near", lambda values: compared.append(len(values)) or near(values))
    colours = np.random.default_rng(0).integers(0, 256, (2000, 3))
    assert duplicates.find({0: looking(np.full(2000, 1 << 63, np.uint64), colours)}).crowded == 0
    assert compared == [1]


def test_a_crowd_costs_no_more_than_a_few_comparisons_each_and_is_counted(monkeypatch):
    compared: list[int] = []
    count = np.bitwise_count
    monkeypatch.setattr(np, "bitwise_count", lambda bits: compared.append(bits.size) or count(bits))
    values = np.arange(1 << 12, dtype=np.uint64) << np.uint64(40)  # alike in all bands but two
    pairs, crowded = near(values)
    assert crowded.all()
    assert len(pairs) > len(values)
    masks = len(duplicates.BANDS) * 5  # ways to choose three bands of seven
    assert sum(compared) <= masks * duplicates.CROWD * len(values)
    found = duplicates.find({0: looking(values, np.zeros((len(values), 3), int))})
    assert found.crowded == len(values)
    assert found.table.num_rows > len(values) // 2


def test_the_keys_come_back_by_shard():
    table = duplicates.find({shard: duplicates.hashes([stored(shard, noise(0))]) for shard in range(3)}).table
    by_shard = duplicates.by_shard(shards.parquet_bytes(table))
    assert {shard: keys.to_pylist() for shard, keys in by_shard.items()} == {1: [f"{1:032x}"], 2: [f"{2:032x}"]}
    assert duplicates.by_shard(shards.parquet_bytes(table.slice(0, 0))) == {}
    assert duplicates.find({0: duplicates.hashes([])}).table.num_rows == 0
    assert pq.read_table(io.BytesIO(duplicates.hashes([]))).schema.equals(HASHES)
