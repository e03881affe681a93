"""Sampling: which pictures of a shard are decoded for the prompts of a chunk."""

import io
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
    read: list[str] = []

    class Images:
        def read(self, name: str) -> bytes:
            read.append(name)
            return files[name]

    painter = Painter.__new__(Painter)  # whose making loads models
    painter.images, painter.square, painter._last = Images(), Size(SIDE, SIDE), (-1, [])  # type: ignore[assignment]
    found = {}
    for chunk in ((3, 5), (7, 19, 20), (21, 22)):
        found |= painter._originals([{"key": rows[row].key, "shard": row // 20} for row in chunk])
    wanted = (3, 5, 7, 19, 20, 21, 22)
    assert decoded == [rows[row].key for row in wanted]
    assert {key: values[0, 0, 0] for key, values in found.items()} == {rows[row].key: row for row in wanted}
    assert read == [*files]  # each shard once
