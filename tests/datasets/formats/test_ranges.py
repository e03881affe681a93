"""Few pictures of a shard are read by ranges, verified; whatever does not fit is read whole, as ever."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets.files import notices, storage
from datasets.files.storage import CorruptFile
from datasets.formats import ranges, removal, shards
from datasets.formats.shard_table import Shard
from datasets.formats.shards import INDEX, ImageRow

ROWS, LOST = 40, {0, 7, 8, 39}  # of which the last ones were lost
KEPT = [row for row in range(ROWS) if row not in LOST]


def key(row: int) -> str:
    return f"{row * 77:032x}"


def stored_rows(extension: str) -> list[ImageRow]:
    sizes = np.random.default_rng(0).integers(1, 3000, ROWS)
    return [
        ImageRow(row, key(row), "http://x.invalid/", f"{row} ü", extension, bytes([row]) * int(sizes[row]))
        for row in KEPT
    ]


def stored(folder: str, extension: str = "jpg", told: bool = True) -> Shard:
    tar = shards.write_images(stored_rows(extension))
    places = ranges.of_tar(tar) if told else {}
    index = [
        {"key": key(row), "row": row, "status": "gone" if row in LOST else "ok"} | places.get(key(row), {})
        for row in range(ROWS)
    ]
    schema = INDEX if told else pa.schema([field for field in INDEX if field.name not in ranges.COLUMNS])
    contents = {shards.image_name(3): tar, shards.index_name(3): shards.table_bytes(index, schema)}
    files = {name: storage.publish(content, f"{folder}/{name}") for name, content in contents.items()}
    return Shard(folder, 3, len(KEPT), None, files)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards that are read whole."""
    found: list[int] = []
    images = Shard.images
    monkeypatch.setattr(Shard, "images", lambda self: (found.append(self.number), images(self))[1])
    return found


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_few_pictures_are_those_of_the_whole(tmp_path, extension, whole):
    """A picture comes before or after its JSON, as their names are sorted."""
    shard = stored(str(tmp_path), extension)
    rows = stored_rows(extension)
    for places in ([0], [35], [0, 1], [5, 12, 34, 35], []):
        assert ranges.read(shard, places) == [rows[place] for place in places]
    keys = {key(9), key(20), key(7), "f" * 32}
    assert ranges.by_keys(shard, keys) == [row for row in rows if row.key in keys]
    assert whole == []


def test_few_pictures_are_a_request_each_and_few_bytes(s3, s3_root):
    shard = stored(s3_root)
    before = len(s3.asked)
    assert len(ranges.read(shard, [3, 20, 30])) == 3
    asked = [(method, re.sub(r".*\.", "", path)) for method, path in s3.asked[before:]]
    assert sorted(asked) == [("GET", "parquet")] + [("GET", "tar")] * 3


def test_many_pictures_are_read_with_all_others(tmp_path, whole):
    shard = stored(str(tmp_path))
    assert len(ranges.read(shard, range(20))) == 20
    assert whole == [3]
    assert ranges.by_keys(shard, {key(row) for row in range(20)}) is None


def test_where_nobody_says_where_pictures_lie_all_are_read(tmp_path, whole):
    rows = stored_rows("jpg")
    before_there_were = stored(str(tmp_path / "old"), told=False)
    alone = stored(str(tmp_path / "alone"))
    alone = Shard(alone.folder, 3, alone.rows, None, {shards.image_name(3): alone.files[shards.image_name(3)]})
    for shard in (before_there_were, alone):
        assert ranges.read(shard, [4]) == [rows[4]]
        assert ranges.by_keys(shard, {rows[4].key}) is None
    assert whole == [3, 3]


def damaged(content: bytes, where: int) -> bytes:
    return content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :]


def test_damage_is_found_in_what_is_read(tmp_path):
    shard = stored(str(tmp_path))
    tar = Path(tmp_path, shards.image_name(3))
    content, told = tar.read_bytes(), ranges.of_tar(tar.read_bytes())[stored_rows("jpg")[9].key]
    for where in (told["offset"], told["offset"] + 600, told["offset"] + told["bytes"] - 1):
        tar.write_bytes(damaged(content, where))
        with pytest.raises(CorruptFile, match=r"00003\.tar"):
            ranges.read(shard, [9])
        assert len(ranges.read(shard, [10])) == 1


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("s3_root") if request.param == "s3" else tmp_path)


@pytest.mark.parametrize("left", [-5, 5], ids=["beyond", "within"])
def test_a_tar_that_ends_before_a_picture_or_within_it_is_damaged_wherever_it_lies(folder, left):
    """The store is not away: it is asked once, and the whole tar is looked at, whose checksum tells."""
    shard, wanted = stored(folder), stored_rows("jpg")[20].key
    name = storage.join(folder, shards.image_name(3))
    content = storage.read(name)
    storage.publish(content[: ranges.of_tar(content)[wanted]["offset"] + left], name)
    heard: list[notices.Notice] = []
    with notices.heard_by(heard.append), pytest.raises(CorruptFile, match=r"00003\.tar"):
        ranges.read(shard, [20])
    assert heard == []
    assert ranges.by_keys(shard, {wanted}) is None
    assert len(ranges.read(shard, [10])) == 1


@pytest.mark.parametrize("taken", [{1}, {1, 2, 20}, {38}, {5, 7}, set(KEPT)])
def test_what_is_left_of_a_table_says_where_what_is_left_of_the_tar_lies(tmp_path, taken):
    shard, keys = stored(str(tmp_path)), {key(row) for row in taken}
    change: dict[str, Callable[..., bytes]] = {
        shards.image_name(3): removal.from_images,
        shards.index_name(3): removal.from_index,
    }
    left = {name: changed(shard.read(name), keys) for name, changed in change.items()}
    places = ranges.of_tar(left[shards.image_name(3)])
    table: list[dict[str, Any]] = pq.read_table(pa.BufferReader(left[shards.index_name(3)])).to_pylist()
    told = {row["key"]: {name: row[name] for name in ranges.COLUMNS} for row in table if row["status"] == "ok"}
    assert told == places
    assert {row["bytes"] for row in table if row["status"] != "ok"} == {None}
