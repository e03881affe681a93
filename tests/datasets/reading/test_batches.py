"""Order of samples and joined reading: pure arithmetic, any rank, any step, damage refused."""

import dataclasses
import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets.config import DataError
from datasets.files import storage
from datasets.files.fence import unfenced
from datasets.files.storage import CorruptFile, FileEntry
from datasets.formats import shards
from datasets.formats.shard_table import Shards
from datasets.formats.shards import Clock, ImageRow
from datasets.reading import batches
from datasets.reading.batches import Batches, Source, mixed_rows, shard_windows

COUNTS = [5, 3, 0, 4, 1]  # rows of each shard: 13 in all
NUM_ROWS = sum(COUNTS)


def image_row(shard: int, row: int) -> ImageRow:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shard, row, 7)).save(buffer, "PNG")
    return ImageRow(row, f"{shard * 16 + row:032x}", "http://x.invalid/", "caption", "png", buffer.getvalue())


def publish(folder: str, shard: int, name: str, content: bytes, count: int) -> None:
    files = {name: storage.publish(content, storage.join(folder, name))}
    shards.publish_receipt(folder, shard, rows_in=count, rows_out=count, files=files, clock=Clock())


def source(folder: str, field: str) -> Source:
    return Source(field, Shards.gathered(folder))


@pytest.fixture
def sources(tmp_path) -> list[Source]:
    """Images, and `text` whose values are 16 * shard + row."""
    images, text = str(tmp_path / "images"), str(tmp_path / "text")
    for shard, count in enumerate(COUNTS):
        rows = [image_row(shard, row) for row in range(count)]
        values = np.array([[16 * shard + row] * 2 for row in range(count)], np.float16).reshape(-1, 2)
        publish(images, shard, shards.image_name(shard), shards.write_images(rows), count)
        publish(text, shard, shards.tensor_name(shard), shards.write_tensors(rows, "text", values), count)
    return [source(images, "image"), source(text, "text")]


def sequence(data: Batches, start: int, rows: int) -> list[int]:
    """Samples as 16 * shard + row, read from their keys."""
    return data.read(start, rows)["key"][:, -1].tolist()


def everything() -> set[int]:
    return {16 * shard + row for shard, count in enumerate(COUNTS) for row in range(count)}


def test_all_fields_of_a_sample_belong_together(sources):
    batch = Batches(sources, seed=0).read(0, NUM_ROWS)
    assert batch["image"].shape == (NUM_ROWS, 3, 8, 8)
    assert batch["image"].dtype == np.uint8
    assert batch["text"].shape == (NUM_ROWS, 2)
    assert batch["text"].dtype == np.float16
    samples = batch["key"][:, -1]
    np.testing.assert_array_equal(batch["text"][:, 0], samples)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], samples // 16)
    np.testing.assert_array_equal(batch["image"][:, 1, 7, 7], samples % 16)


@pytest.mark.parametrize("window", [1, 2, 8])
def test_every_epoch_holds_each_sample_once_in_another_order(sources, window):
    data = Batches(sources, seed=3, window=window)
    epochs = [sequence(data, epoch * NUM_ROWS, NUM_ROWS) for epoch in range(4)]
    assert all(len(epoch) == NUM_ROWS and set(epoch) == everything() for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_sequence_does_not_depend_on_the_number_of_ranks(sources, world):
    straight = sequence(Batches(sources, seed=0), 0, 8) + sequence(Batches(sources, seed=0), 8, 8)
    ranks = [Batches(sources, seed=0) for _ in range(world)]
    share = 4 // world
    read = [
        sample
        for step in range(4)
        for rank, data in enumerate(ranks)
        for sample in sequence(data, step * 4 + rank * share, share)
    ]
    assert read == straight


def test_reading_on_from_any_position_equals_reading_through(sources):
    straight = [sample for start in range(0, 60, 5) for sample in sequence(Batches(sources, seed=1), start, 5)]
    for start in range(50):
        assert sequence(Batches(sources, seed=1), start, 10) == straight[start : start + 10]


def test_the_seed_decides(sources):
    first, again, other = (sequence(Batches(sources, seed=seed), 0, NUM_ROWS) for seed in (5, 5, 6))
    assert first == again
    assert first != other


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 1000),
    window=st.integers(1, 15),
)
def test_windows_and_rows_are_permutations(counts, seed, epoch, window):
    windows = shard_windows(range(len(counts)), seed=seed, epoch=epoch, window=window)
    assert sorted(shard for group in windows for shard in group) == list(range(len(counts)))
    assert all(len(group) == window for group in windows[:-1])
    for index, group in enumerate(windows):
        rows = mixed_rows({shard: counts[shard] for shard in group}, seed=seed, epoch=epoch, index=index)
        assert sorted(map(tuple, rows.tolist())) == sorted(
            (shard, row) for shard in group for row in range(counts[shard])
        )


def test_rows_mix_within_a_window_only(sources):
    data = Batches(sources, seed=2, window=1)
    shards_in_order = [sample // 16 for sample in sequence(data, 0, NUM_ROWS)]
    changes = sum(one != other for one, other in pairwise(shards_in_order))
    assert changes == sum(count > 0 for count in COUNTS) - 1


def test_no_more_decoded_pictures_are_kept_than_allowed(sources, monkeypatch):
    monkeypatch.setattr(batches, "DECODED_BYTES", 100)  # less than one picture
    batch = Batches(sources, seed=0).read(0, NUM_ROWS)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["key"][:, -1] // 16)


def test_a_batch_larger_than_the_data_is_refused(sources):
    with pytest.raises(DataError, match=r"data\.limit"):
        Batches(sources, seed=0).read(0, NUM_ROWS + 1)


def test_an_artifact_without_rows_is_refused(tmp_path):
    publish(str(tmp_path), 0, shards.image_name(0), shards.write_images([]), 0)
    with pytest.raises(DataError, match=r"data\.limit"):
        Batches([source(str(tmp_path), "image")], seed=0)


@pytest.mark.parametrize("damage", ["flip", "cut"])
@pytest.mark.parametrize("which", [0, 1], ids=["tar", "Parquet"])
def test_every_damaged_shard_is_found(sources, which, damage):
    """100 random cases each."""
    generator = np.random.default_rng(which)
    name = shards.tensor_name(0) if which else shards.image_name(0)
    path = Path(sources[which].folder, name)
    whole = path.read_bytes()
    for _ in range(100):
        content = bytearray(whole)
        if damage == "flip":
            content[generator.integers(len(content))] ^= 1 << generator.integers(8)
        else:
            del content[generator.integers(len(content)) :]
        path.write_bytes(content)
        with pytest.raises(CorruptFile, match=name):
            Batches(sources, seed=0).read(0, NUM_ROWS)
    path.write_bytes(whole)
    assert len(Batches(sources, seed=0).read(0, NUM_ROWS)["key"]) == NUM_ROWS


def test_artifacts_with_other_keys_are_not_joined(sources):
    rows = [dataclasses.replace(image_row(0, row), key=f"{99 + row:032x}") for row in range(COUNTS[0])]
    content = shards.write_tensors(rows, "text", np.zeros((COUNTS[0], 2), np.float16))
    text = sources[1]
    name = shards.tensor_name(0)
    entry: FileEntry = storage.publish(content, storage.join(text.folder, name))
    told = dataclasses.replace(shards.receipt(text.folder, 0), files={name: entry})
    shards.put_receipt(text.folder, told, unfenced)
    with pytest.raises(CorruptFile, match="keys"):
        Batches([sources[0], source(text.folder, "text")], seed=0).read(0, NUM_ROWS)


def test_artifacts_with_other_shards_are_not_joined(sources):
    storage.remove(storage.join(sources[1].folder, shards.RECEIPTS, "00003.json"))
    with pytest.raises(CorruptFile, match="differ in their shards"):
        Batches([sources[0], source(sources[1].folder, "text")], seed=0)


def shards_in_order(seed: int) -> list[int]:
    """Shards of the first epoch, where a window is one shard."""
    numbers = [shard for shard, count in enumerate(COUNTS) if count]
    return [shard for (shard,) in shard_windows(numbers, seed=seed, epoch=0, window=1)]


def test_the_next_window_is_read_ahead_and_the_last_one_let_go(sources, monkeypatch):
    loaded: list[int] = []
    load = Batches._load
    monkeypatch.setattr(Batches, "_load", lambda self, shard: (loaded.append(shard), load(self, shard))[1])
    data = Batches(sources, seed=3, window=1)
    first, second, third, *_ = shards_in_order(seed=3)
    data.read(0, 1)
    data._shards[second]  # which nobody has asked for; waits for the thread
    assert loaded == [first, second]
    data.read(COUNTS[first], 1)
    assert set(data._shards._held) == {second, third}


def test_damage_ahead_is_told_when_it_is_reached(sources):
    data = Batches(sources, seed=3, window=1)
    first, second, *_ = shards_in_order(seed=3)
    Path(sources[0].folder, shards.image_name(second)).write_bytes(b"")
    data.read(0, COUNTS[first])
    with pytest.raises(CorruptFile, match=shards.image_name(second)):
        data.read(COUNTS[first], 1)
