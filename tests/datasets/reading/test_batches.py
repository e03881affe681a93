"""Order of samples and joined reading: pure arithmetic, any rank, any step, damage refused."""

import dataclasses
import io
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.config import DataError
from datasets.files import storage
from datasets.files.fence import unfenced
from datasets.files.storage import CorruptFile, FileEntry
from datasets.formats import shards
from datasets.formats.shard_table import Shards
from datasets.formats.shards import Clock, ImageRow, Receipt
from datasets.reading import batches
from datasets.reading.batches import Batches, Source
from datasets.reading.order import Order, Span

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
    order = Order({shard: count for shard, count in enumerate(COUNTS) if count}, seed, window=1)
    return [window.shards[0] for window in order.needed(0, 0, NUM_ROWS)[:-1]]


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


# ------------------------------------------------------------------------------------------------------- in lanes


SPANS = [Span(0, 48, 8), Span(48, 96, 12)]  # phases of other batches
STEPS = [(span.start + number * span.batch_size, span.batch_size) for span in SPANS for number in range(4)]


def in_lanes(sources: list[Source]) -> Batches:
    return Batches(sources, seed=3, window=1, lanes=4, spans=SPANS)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_lanes_give_the_same_batches_to_any_number_of_ranks(sources, world):
    whole = in_lanes(sources)
    ranks = [in_lanes(sources) for _ in range(world)]
    for start, size in STEPS:
        batch = whole.read(start, size)
        share = size // world
        parts = [data.read(start + rank * share, share) for rank, data in enumerate(ranks)]
        for field, values in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[field] for part in parts]), values)
        np.testing.assert_array_equal(batch["text"][:, 0], batch["key"][:, -1])


def test_ranks_of_which_none_has_whole_lanes_get_the_same_batches_too(sources):
    whole, ranks = in_lanes(sources), [in_lanes(sources) for _ in range(3)]
    read = [sample for rank, data in enumerate(ranks) for sample in sequence(data, 48 + 4 * rank, 4)]
    assert read == sequence(whole, 48, 12)


def test_a_training_in_lanes_goes_on_from_any_step(sources):
    through = in_lanes(sources)
    straight = [sequence(through, start, size) for start, size in STEPS]
    assert [sequence(in_lanes(sources), start, size) for start, size in STEPS] == straight


def test_all_lanes_together_give_each_sample_once_a_pass(sources):
    spans = [Span(0, 4 * NUM_ROWS, 4)]
    data = Batches(sources, seed=1, window=1, lanes=4, spans=spans)
    read = [sample for start in range(0, 4 * NUM_ROWS, 4) for sample in sequence(data, start, 4)]
    assert {read.count(sample) for sample in everything()} == {4}


def test_the_first_samples_in_lanes_are_all_there_are(sources):
    data = Batches(sources, seed=1, lanes=4)
    assert set(data.first(NUM_ROWS + 5)["key"][:, -1].tolist()) == everything()
    assert len(set(data.first(6)["key"][:, -1].tolist())) == 6
    assert data.first_shards(NUM_ROWS) == {shard for shard, count in enumerate(COUNTS) if count}


def test_eight_ranks_ask_a_store_for_each_shard_about_once_a_pass(s3, s3_root):
    """Counted by the store: at most 1.1 times the data, what is read ahead included."""
    folder, num_shards, world = f"{s3_root}/text", 250, 8
    rows_of = np.random.default_rng(0).integers(3, 7, num_shards).tolist()
    receipts, contents = [], {}
    for shard, count in enumerate(rows_of):
        rows = [ImageRow(row, f"{shard * 16 + row:032x}", "", "", "png", b"") for row in range(count)]
        name = shards.tensor_name(shard)
        contents[name] = shards.write_tensors(rows, "text", np.full((count, 2), shard, np.float16))
        files = {name: storage.entry_of(contents[name])}
        receipts.append(Receipt(shard, count, count, {}, files, 1.0, 1, "host"))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda item: storage.publish(item[1], f"{folder}/{item[0]}"), contents.items()))
    text = Source("text", Shards.told(folder, receipts))
    total, size, before = sum(rows_of), 16, len(s3.asked)
    spans = [Span(0, 10**6, size)]
    ranks = [Batches([text], seed=0, window=2, lanes=8, spans=spans) for _ in range(world)]
    for start in range(0, 2 * total - size, size):
        for rank, data in enumerate(ranks):
            data.read(start + rank * size // world, size // world)
    for data in ranks:
        data._shards.close()
    asked = Counter(path.rpartition("/")[2] for method, path in s3.asked[before:] if method == "GET")
    assert len(asked) == num_shards
    read = sum(count * len(contents[name]) for name, count in asked.items())
    assert read <= 1.1 * 2 * sum(map(len, contents.values()))


def test_several_shards_are_asked_for_at_once_on_a_store(s3, s3_root):
    """Each answer waits until another shard has been asked for, too."""
    folder, asked, others = f"{s3_root}/text", set[str](), threading.Event()
    for shard in range(4):
        rows = [image_row(shard, 0)]
        content = shards.write_tensors(rows, "text", np.zeros((1, 2), np.float16))
        publish(folder, shard, shards.tensor_name(shard), content, 1)
    data = Batches([source(folder, "text")], seed=0)

    def fault(method: str, path: str) -> None:
        asked.add(path)
        if len(asked) > 1:
            others.set()
        together.append(others.wait(5))

    together: list[bool] = []
    s3.fault = fault
    assert set(sequence(data, 0, 4)) == {0, 16, 32, 48}
    assert all(together)
