"""Sampling: which pictures of a shard are decoded for the prompts of a chunk."""

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datasets.buckets import Size
from datasets.formats import shards
from datasets.formats.shards import ImageRow
from pipeline.steps.sample import Painter

SIDE = 16


def picture(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def test_only_the_pictures_of_the_prompts_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [ImageRow(row, f"{row:032x}", "", "", "png", picture(row)) for row in range(40)]
    files = {shards.image_name(shard): shards.write_images(rows[20 * shard :][:20]) for shard in (0, 1)}
    decoded: list[str] = []
    pixels = ImageRow.pixels

    def noted(row: ImageRow, *arguments: Any) -> np.ndarray:
        decoded.append(row.key)
        return pixels(row, *arguments)

    monkeypatch.setattr(ImageRow, "pixels", noted)
    painter = Painter.__new__(Painter)  # whose making loads models
    painter.images, painter.square = SimpleNamespace(read=files.__getitem__), Size(SIDE, SIDE)  # type: ignore[assignment]
    prompts = [{"key": rows[row].key, "shard": row // 20} for row in (3, 19, 20)]
    found = painter._originals(prompts)
    assert decoded == [prompt["key"] for prompt in prompts]
    assert {key: values[0, 0, 0] for key, values in found.items()} == {rows[row].key: row for row in (3, 19, 20)}
