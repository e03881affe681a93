"""What panels show: held-out samples first, then some that are trained on, each with its planned caption. What
trainings see: the same on any number of ranks, and pictures that are augmented as latents of them are."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from datasets.buckets import Frame
from datasets.files import storage
from datasets.formats import shards
from datasets.formats.shard_table import Shards
from datasets.formats.shards import Clock, ImageRow
from datasets.planning import plan_files
from datasets.reading import views
from datasets.reading.batches import Batches, Source
from datasets.reading.views import View
from pipeline.models.encoders import Encoder
from pipeline.models.training_data import HELD, EncodedBatches, Reading, TrainingData
from pipeline.settings.resources import Cache
from pipeline.store.artifacts import Artifact
from stages.settings.training import TrainingConfig

ROWS, PER_SHARD = 30, 10
FRAME = Frame(64, 1.0)


def stored(folder: Path, width: int, bucket: str | None = None) -> list[Source]:
    """Thirty rows in three shards; the first number of each is its own."""
    for shard in range(ROWS // PER_SHARD):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        rows = [ImageRow(row, f"{number:032x}", "", "", "png", b"") for row, number in enumerate(numbers)]
        values = np.repeat(np.array(numbers, np.float32)[:, None], width, 1)
        entry = storage.publish(shards.write_tensors(rows, "x", values), f"{folder}/{shards.tensor_name(shard)}")
        about: dict[str, Any] = {"rows_in": PER_SHARD, "rows_out": PER_SHARD, "clock": Clock(), "bucket": bucket}
        shards.publish_receipt(str(folder), shard, files={shards.tensor_name(shard): entry}, **about)
    return [Source("x", Shards.gathered(str(folder)))]


def planned(folder: Path) -> Artifact:
    """Their plan."""
    rows = [{"key": f"{n:032x}", "caption": f"number {n}", "shard": n // PER_SHARD} for n in range(ROWS)]
    table = pa.Table.from_pylist([{**row, "row": 0} for row in rows])
    entry = storage.publish(plan_files.parquet_bytes(table, PER_SHARD), f"{folder}/plan/00000.parquet")
    return Artifact("metadata", str(folder), {"files": {"plan/00000.parquet": vars(entry)}})


def batches(sources: list[Source], view: View) -> EncodedBatches:
    return EncodedBatches(Batches(sources, 0, view=view), FRAME, ("x",), [])


@pytest.mark.parametrize("held", [0, 3, 20])
def test_held_out_samples_come_first_and_are_labelled(tmp_path: Path, held: int) -> None:
    bits = np.arange(ROWS) < held
    view = View({s: (PER_SHARD, np.packbits(bits[s * PER_SHARD :][:PER_SHARD]).tobytes()) for s in range(3)})
    sources = stored(tmp_path / "x", width=4)
    trained = {(FRAME, None): batches(sources, ~view)}
    data = TrainingData(trained, batches(sources, view) if held else None, planned(tmp_path / "plan"))
    numbers = data.shown.fields["x"][:, 0].astype(int).tolist()
    first = min(held, 12)
    assert len(numbers) == len(set(numbers)) == 16
    assert [number < held for number in numbers] == [True] * first + [False] * (16 - first)
    assert data.shown.captions == [f"{HELD if n < held else ''}number {n}" for n in numbers]


def test_without_a_plan_there_are_no_captions(tmp_path: Path) -> None:
    sources = stored(tmp_path / "x", width=4)
    every = View({s: (PER_SHARD, np.packbits(np.ones(PER_SHARD, bool)).tobytes()) for s in range(3)})
    assert set(TrainingData({(FRAME, None): batches(sources, every)}, None).shown.captions) == {""}


def test_samples_of_another_size_are_left_out(tmp_path: Path) -> None:
    """Held-out ones are as the last phase sees pictures, which need not be the largest."""
    half = View({s: (PER_SHARD, np.packbits(np.arange(PER_SHARD) < 2).tobytes()) for s in range(3)})
    large, small = stored(tmp_path / "large", width=8), stored(tmp_path / "small", width=4)
    data = TrainingData({(FRAME, None): batches(large, ~half)}, batches(small, half))
    assert data.shown.fields["x"].shape == (6, 4)
    assert len(data.shown.captions) == 6


# -------------------------------------------------------------------------------- what ranks make of the driver's words


def training(*batches: int, aspect: float = 1.0, lanes: int = 1) -> TrainingConfig:
    phases = [{"steps": 6, "batch_size": batch, "size": 128, "max_aspect": aspect} for batch in batches]
    pace = {"learning_rate": 0.1, "warmup_steps": 0, "log_every": 1, "checkpoint_every": 1}
    return TrainingConfig.model_validate({"phases": phases, "lanes": lanes, **pace})


def reading(folder: Path, aspect: float = 1.0, cache: Path | None = None, held: int = 0) -> Reading:
    """Of the thirty rows, the first of which may be held out."""
    frame, held_out = Frame(128, aspect), None
    if held:
        bits = np.arange(ROWS) < held
        chosen = View.of({shard: bits[shard * PER_SHARD :][:PER_SHARD] for shard in range(3)})
        entry = storage.publish(views.dump(chosen), f"{folder}/held/{views.FILE}")
        held_out = Artifact("held_out", f"{folder}/held", {"files": {views.FILE: vars(entry)}})
    sources = stored(folder / "x", 4, None if frame.square else "128x128")
    kept = Cache(folder=str(cache) if cache else None, gib=1)
    return Reading(("x",), [], {frame: sources}, [(frame, None)], {}, held_out, seed=0, cache=kept)


def numbers(batch: dict[str, np.ndarray]) -> list[int]:
    return batch["x"][:, 0].astype(int).tolist()


@pytest.mark.parametrize("aspect", [1.0, 2.0])
def test_what_was_read_once_lies_in_the_node_s_cache(tmp_path: Path, aspect: float) -> None:
    """Batches and held-out samples of any kind: they can be read when the files are gone."""
    told = reading(tmp_path, aspect, tmp_path / "cache", held=6)

    def everything() -> list[list[int]]:
        data = told.data(training(8, aspect=aspect), [])
        assert data.held_out
        (batches,) = data.batches.values()
        return [numbers(data.held_out.read(0, 6)), *(numbers(batches.read(8 * step, 8)) for step in range(6))]

    before = everything()
    for file in (tmp_path / "x").glob("*.parquet"):
        file.unlink()
    assert everything() == before


@pytest.mark.parametrize("aspect", [1.0, 2.0])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_training_in_lanes_has_the_same_batches_on_any_number_of_ranks(
    tmp_path: Path, aspect: float, world: int
) -> None:
    told, config = reading(tmp_path, aspect), training(8, 16, aspect=aspect, lanes=64)
    assert config.shared_lanes == 8

    def batches(rank: int, of: int) -> list[list[int]]:
        (data,) = told.data(config, []).batches.values()
        found = []
        for step in range(config.num_steps):
            rows = config.phase_at(step).batch_size // of
            found.append(numbers(data.read(config.images_after(step) + rank * rows, rows)))
        return found

    straight = batches(0, 1)
    ranks = [batches(rank, world) for rank in range(world)]
    assert [[number for part in parts for number in part] for parts in zip(*ranks, strict=True)] == straight
    seen = [number for batch in straight for number in batch]
    assert {seen.count(number) for number in range(ROWS)} <= {4, 5}  # 144 samples of 30 rows
    plain = told.data(training(8, 16, aspect=aspect), [])
    assert numbers(next(iter(plain.batches.values())).read(0, 8)) != straight[0]


def pictures(folder: Path) -> Source:
    """Thirty pictures in three shards, each of one colour."""
    for shard in range(ROWS // PER_SHARD):
        rows = []
        for row in range(PER_SHARD):
            buffer, number = io.BytesIO(), shard * PER_SHARD + row
            Image.new("RGB", (128, 128), (8 * number, 255, 0)).save(buffer, "PNG")
            rows.append(ImageRow(row, f"{number:032x}", "", "", "png", buffer.getvalue()))
        name = shards.image_name(shard)
        entry = storage.publish(shards.write_images(rows), f"{folder}/{name}")
        about: dict[str, Any] = {"rows_in": PER_SHARD, "rows_out": PER_SHARD, "clock": Clock()}
        shards.publish_receipt(str(folder), shard, files={name: entry}, **about)
    return Source("image", Shards.gathered(str(folder)))


def mean(where: torch.device) -> Any:
    """An encoder for the tests: the mean colour (B, 3) of pictures."""
    return lambda image: image.float().mean((2, 3))


def test_what_is_encoded_on_the_way_is_made_of_the_augmented_pictures(tmp_path: Path) -> None:
    """On any number of ranks; held-out pictures stay as they are."""
    online = [Encoder("latents_a", "image", mean, "fp32", 16, "", {})]
    told = replace(reading(tmp_path, held=6), fields=("image", "latents_a"), online=online)
    told = replace(told, sources={Frame(128, 1.0): [pictures(tmp_path / "images")]})
    plain = training(8)
    loaded = told.loaded(torch.device("cpu"))
    as_they_are = told.data(plain, loaded)
    changed = told.data(TrainingConfig.model_validate({**plain.model_dump(), "augment": {"hue": 0.5}}), loaded)
    before, after = as_they_are.largest.read(8, 8), changed.largest.read(8, 8)
    np.testing.assert_array_equal(after["key"], before["key"])
    other = (after["image"] != before["image"]).any((1, 2, 3))
    assert 0 < other.sum() < 8
    np.testing.assert_allclose(after["latents_a"], after["image"].mean((2, 3)), rtol=1e-5)
    parts = [changed.largest.read(8 + at, 2) for at in range(0, 8, 2)]
    for field, whole in after.items():
        np.testing.assert_array_equal(np.concatenate([part[field] for part in parts]), whole)
    seen = changed.largest.seen(8, 8)
    assert set(seen) == {"key", "image"}
    there = {name: torch.from_numpy(values) for name, values in seen.items()}
    kept = changed.largest.encoded(there)
    assert kept["image"] is there["image"]
    for field, whole in after.items():
        np.testing.assert_array_equal(kept[field], whole)
    assert as_they_are.held_out
    assert changed.held_out
    np.testing.assert_array_equal(changed.held_out.read(0, 6)["image"], as_they_are.held_out.read(0, 6)["image"])
