"""What panels show: held-out samples first, then some that are trained on, each with its planned caption."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from datasets.buckets import Frame
from datasets.files import storage
from datasets.formats import shards
from datasets.formats.shard_table import Shards
from datasets.formats.shards import Clock, ImageRow
from datasets.planning import plan
from datasets.reading.batches import Batches, Source
from datasets.reading.views import View
from pipeline.models.training_data import HELD, EncodedBatches, TrainingData
from pipeline.store.artifacts import Artifact

ROWS, PER_SHARD = 30, 10
FRAME = Frame(64, 1.0)


def stored(folder: Path, width: int) -> list[Source]:
    """Thirty rows in three shards; the first number of each is its own."""
    for shard in range(ROWS // PER_SHARD):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        rows = [ImageRow(row, f"{number:032x}", "", "", "png", b"") for row, number in enumerate(numbers)]
        values = np.repeat(np.array(numbers, np.float32)[:, None], width, 1)
        entry = storage.publish(shards.write_tensors(rows, "x", values), f"{folder}/{shards.tensor_name(shard)}")
        about: dict[str, Any] = {"rows_in": PER_SHARD, "rows_out": PER_SHARD, "clock": Clock()}
        shards.publish_receipt(str(folder), shard, files={shards.tensor_name(shard): entry}, **about)
    return [Source("x", Shards.gathered(str(folder)))]


def planned(folder: Path) -> Artifact:
    """Their plan."""
    rows = [{"key": f"{n:032x}", "caption": f"number {n}", "shard": n // PER_SHARD} for n in range(ROWS)]
    table = pa.Table.from_pylist([{**row, "row": 0} for row in rows])
    entry = storage.publish(plan.parquet_bytes(table, PER_SHARD), f"{folder}/plan/00000.parquet")
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
