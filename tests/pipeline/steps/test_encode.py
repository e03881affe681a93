"""Encoding: how many captions a seeded tower is centred on at a time, and that a model waits for no storage."""

import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from datasets.buckets import Frame
from datasets.files import storage
from datasets.files.fence import unfenced
from datasets.formats import shards
from datasets.formats.shard_table import Shard, Shards
from datasets.formats.shards import Clock, ImageRow
from pipeline.cluster.mapping import ShardActor
from pipeline.models.encoders import Encoder
from pipeline.steps import encode
from stages.models.text import TextTower, seeded_tower
from stages.settings.models import SeededTextConfig

CAPTIONS = [f"{number} bears in a forest" for number in range(11)]
SHARDS, ROWS, BATCH = 6, 5, 2
PATIENCE_S = 60.0  # for what comes at once, or never


@pytest.fixture
def tower() -> TextTower:
    return seeded_tower(SeededTextConfig(model="seeded", width=32, layers=1, heads=2, context_length=16, seed=1))


def test_a_tower_is_centred_on_a_batch_at_a_time(tower: TextTower, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tower.encode(CAPTIONS)[0].mean(dim=(0, 1))
    assert torch.equal(encode._mean_state(tower, CAPTIONS), whole)  # of one batch to the bit, as it always was
    monkeypatch.setattr(encode, "CENTRED", 4)
    rows: list[int] = []

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows.append(len(inputs[0]))

    tower.register_forward_pre_hook(note)
    torch.testing.assert_close(encode._mean_state(tower, CAPTIONS), whole, rtol=1e-5, atol=1e-6)
    assert rows == [4, 4, 3]


# ------------------------------------------------------------------------------------------- shards at once


class Happened:
    """How often things have happened, for which others wait."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._changed = threading.Condition()

    def tell(self, what: str) -> int:
        with self._changed:
            self._counts[what] = self._counts.get(what, 0) + 1
            self._changed.notify_all()
            return self._counts[what]

    def wait(self, what: str, times: int) -> None:
        with self._changed:
            there = self._changed.wait_for(lambda: self._counts.get(what, 0) >= times, PATIENCE_S)
        assert there, f"{what} {self._counts.get(what, 0)} times, not {times}"


def stored(folder: Path) -> Shards:
    """Shards of pictures, each of one grey; of what is encoded, the grey is the mean."""
    for shard in range(SHARDS):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (shard, shard, shard)).save(buffer, "PNG")
        rows = [ImageRow(n, f"{shard * ROWS + n:032x}", "", "", "png", buffer.getvalue()) for n in range(ROWS)]
        name = shards.image_name(shard)
        files = {name: storage.publish(shards.write_images(rows), f"{folder}/{name}")}
        shards.publish_receipt(str(folder), shard, rows_in=ROWS, rows_out=ROWS, files=files, clock=Clock())
    return Shards.gathered(str(folder))


def actor(folder: Path, forward: Callable[[torch.Tensor], torch.Tensor]) -> ShardActor:
    encoder = Encoder("latents_c", "image", lambda where: forward, "fp32", BATCH, "", {})
    arguments = (encoder, "fp16", lambda: encode._pictures(Frame(8)), "cpu")
    made = ShardActor(encode.ShardEncoder, arguments, SHARDS * ROWS, "images", str(folder), unfenced, None)
    unheard: Any = SimpleNamespace(stopping=lambda: False, post=lambda message: None)
    made._board = unheard
    return made


def test_a_model_has_the_next_shard_when_it_is_done_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it works on a shard, the next one is read and the last one published: else this waits in vain."""
    happened, seen, at_work = Happened(), list[int](), threading.Lock()
    images = stored(tmp_path / "images")
    read, publish = Shard.read, storage.publish

    def reads(self: Shard, name: str) -> bytes:
        content = read(self, name)
        happened.tell("read")
        return content

    def publishes(content: bytes, path: str) -> storage.FileEntry:
        if path.endswith(".parquet"):
            happened.wait("begun", min(happened.tell("publishing") + 1, SHARDS))
        return publish(content, path)

    def forward(image: torch.Tensor) -> torch.Tensor:
        assert at_work.acquire(blocking=False), "one at a time"
        number = round(float(image.float().mean()))
        if number not in seen:
            seen.append(number)
            happened.tell("begun")
            happened.wait("read", min(len(seen) + 1, SHARDS))
        at_work.release()
        return image.float().mean((2, 3))[:, :, None, None]

    monkeypatch.setattr(Shard, "read", reads)
    monkeypatch.setattr(storage, "publish", publishes)
    made = actor(tmp_path / "codes", forward)
    with ThreadPoolExecutor(encode.AT_ONCE) as pool:
        list(pool.map(lambda number: made((number, encode.Work(images[number]))), range(SHARDS)))
    assert sorted(seen) == list(range(SHARDS))
    for shard, found in Shards.gathered(str(tmp_path / "codes")).items():
        keys, values = shards.read_tensors(found.read(shards.tensor_name(shard)), "latents_c")
        assert keys == [f"{shard * ROWS + row:032x}" for row in range(ROWS)]
        np.testing.assert_allclose(np.stack(list(values)), shard)


def test_what_is_made_ahead_comes_in_order_and_fails_where_it_is_needed() -> None:
    def make(number: int) -> float:
        return 12 / number

    assert list(encode._ahead(make, [1, 2, 3])) == [12, 6, 4]
    assert list(encode._ahead(make, [])) == []
    coming = encode._ahead(make, [4, 0, 1])
    assert next(coming) == 3
    with pytest.raises(ZeroDivisionError):
        next(coming)
