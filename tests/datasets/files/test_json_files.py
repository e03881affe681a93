"""JSON files of ours among others: whatever lies there, what is ours is read and the rest is told."""

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.files import json_files, notices
from datasets.files.errors import StoreRefuses
from datasets.files.json_files import NUMBER
from datasets.files.notices import Notice
from datasets.files.storage import CorruptFile

OTHERS = {
    "empty.json": b"",
    "blank.json": b" \n",
    "torn.json": b'{"name": "x", "nu',
    "list.json": b"[1, 2]",
    "null.json": b"null",
    "lacking.json": b'{"name": "x"}',
    "wrong.json": b'{"name": "x", "number": "many"}',
    "bytes.json": b"\xff\xfe\x00\x01",
    "._1.json": b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X",
    ".DS_Store": b"\x00\x00\x00\x01Bud1",
    "notes.txt": b"do not delete",
    "below/1.json": b'{"name": "x", "number": 1}',
}


def make(told: dict[str, Any]) -> tuple[str, int]:
    return told["name"], int(told["number"])


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for name, content in OTHERS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for number in (2, 1, 10):
        (tmp_path / f"{number:02d}.json").write_text(json.dumps({"name": "ours", "number": number}))
    return str(tmp_path)


@pytest.fixture
def heard(folder: str) -> Any:
    found: list[Notice] = []
    with notices.heard_by(found.append):
        yield found


def names(heard: list[Notice], folder: str) -> list[str]:
    return sorted(notice.path.removeprefix(f"{folder}/") for notice in heard)


def test_ours_are_read_in_order_and_each_other_is_told(folder, heard):
    found = json_files.read_each(folder, r"[^./][^/]*\.json", make)
    assert found == {f"{number:02d}.json": ("ours", number) for number in (1, 2, 10)}
    assert names(heard, folder) == sorted(OTHERS)


def test_what_belongs_there_too_is_not_told(folder, heard):
    assert len(json_files.read_each(folder, r"\d+\.json", make, also=r"below/.*|.*\.txt|[a-z]*\.json")) == 3
    assert names(heard, folder) == [".DS_Store", "._1.json"]


def test_only_the_last_are_read_where_that_is_enough(folder, heard):
    assert list(json_files.read_each(folder, r"\d+\.json", make, last=2)) == ["02.json", "10.json"]
    assert list(json_files.read_each(folder, r"\d+\.json", make, last=9)) == ["01.json", "02.json", "10.json"]


def test_a_damaged_one_of_ours_is_refused_where_all_are_needed(folder):
    assert len(json_files.read_every(folder, r"\d+\.json", make)) == 3
    for name in ("empty.json", "torn.json", "list.json", "lacking.json", "wrong.json", "bytes.json"):
        with pytest.raises(CorruptFile, match=f"^{folder}/{name} is damaged: .+"):
            json_files.read_every(folder, name.replace(".", r"\."), make)


def test_one_file_is_read_or_is_not_there_or_is_told(folder, heard):
    assert json_files.read(f"{folder}/01.json", make) == ("ours", 1)
    assert json_files.read(f"{folder}/none.json", make) is None
    assert json_files.read(f"{folder}/01.json/below.json", make) is None
    assert heard == []
    assert json_files.read(f"{folder}/empty.json", make) is None
    assert json_files.read(f"{folder}/lacking.json", make) is None
    assert [str(notice) for notice in heard] == [
        f"passed over {folder}/empty.json: damaged: it is empty",
        f"passed over {folder}/lacking.json: damaged: it has no 'number'",
    ]


def test_what_is_no_file_is_told_and_what_nobody_may_read_is_refused(tmp_path):
    """A folder; links in a circle; and a file of somebody else's, which may be whole."""
    (tmp_path / "folder").mkdir()
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one).symlink_to(tmp_path / other)
    found: list[Notice] = []
    with notices.heard_by(found.append):
        assert json_files.read(f"{tmp_path}/folder", make) is None
        assert json_files.read(f"{tmp_path}/a", make) is None
    assert [notice.reason.partition(": ")[0] for notice in found] == ["no file", "no file"]
    with pytest.raises(StoreRefuses):
        json_files.read(f"{tmp_path}/{'n' * 300}", make)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"name": "x", "number": 1e999}', b'{"name": "x", "number": NaN}']
)
def test_what_json_can_hold_and_we_cannot_is_damage(content):
    with pytest.raises(CorruptFile, match=r"^x is damaged: .+"):
        json_files.parse("x", content, make)


def test_values_of_another_kind_are_damage_and_so_are_numbers_that_are_none():
    told = {"a": 1, "b": 1.5, "c": "x", "d": {}, "e": float("nan"), "f": float("inf"), "g": None}
    json_files.require(told, NUMBER, "a", "b")
    json_files.require(told, str, "c")
    json_files.require(told, dict, "d")
    json_files.require(told, dict)
    for kind, key in ((NUMBER, "c"), (int, "b"), (str, "a"), (NUMBER, "e"), (NUMBER, "f"), (str, "g")):
        with pytest.raises(TypeError, match=f"^its {key} is "):
            json_files.require(told, kind, key)
    with pytest.raises(KeyError, match="h"):
        json_files.require(told, str, "c", "h")


class Part(TypedDict):
    size: int
    share: NotRequired[float | None]


@dataclass
class Exact:
    name: str
    parts: dict[str, Part]
    sizes: Sequence[int] = ()
    measured: Real = 0  # type: ignore[assignment]
    about: Any = None


WHOLE = {"name": "x", "parts": {"a": {"size": 1, "share": 2, "more": []}}, "sizes": [1, 2], "measured": float("nan")}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"about": {"x": [None]}}, None),
        ({"parts": {}, "sizes": []}, None),
        ({"parts": {"a": {"size": 1, "share": None}}}, None),
        ({"parts": {"a": {"size": 1}, "b": {"size": "1"}}}, "its parts.b.size is '1'"),
        ({"parts": {"a": {"size": 1, "share": "x"}}}, "its parts.a.share is 'x'"),
        ({"parts": {"a": {"size": 1, "share": float("inf")}}}, "its parts.a.share is 'inf'"),
        ({"parts": {"a": {"share": 1}}}, "it has no parts.a.size"),
        ({"parts": {"a": 7}}, "its parts.a is '7'"),
        ({"parts": [{"size": 1}]}, "its parts is "),
        ({"sizes": [1, 2.5]}, "its sizes.1 is '2.5'"),
        ({"sizes": "12"}, "its sizes is '12'"),
        ({"measured": "x"}, "its measured is 'x'"),
        ({"extra": 1}, "it has a extra"),
    ],
)
def test_values_are_of_their_kinds_all_the_way_down(changes, told):
    whole = {**WHOLE, **changes}
    if told is None:
        assert json_files.of(Exact, whole) is whole
    else:
        with pytest.raises(TypeError, match=f"^{re.escape(told)}"):
            json_files.of(Exact, whole)


def test_what_lacks_is_told_by_its_place():
    with pytest.raises(TypeError, match=r"^it has no name$"):
        json_files.of(Exact, {"parts": {}})
    with pytest.raises(TypeError, match=r"^its files\.a is '\[\]'"):
        json_files.require({"files": {"a": []}}, dict[str, Part | None], "files")
    json_files.require({"files": {"a": None, "b": {"size": 1}}}, dict[str, Part | None], "files")


def test_a_line_that_is_cut_off_costs_itself_alone():
    content = b'{"name": "x", "number": 1}\n{"name": "x", "numb\n\n7\n{"name": "y", "number": 2}\n{"na'
    assert list(json_files.lines(content, make)) == [("x", 1), None, None, None, ("y", 2), None]


@given(st.binary(max_size=40) | st.from_type(dict).map(lambda value: repr(value).encode()))
def test_no_content_is_an_error_of_the_program(content):
    with notices.heard_by(lambda notice: None), contextlib.suppress(CorruptFile):
        json_files.parse("x", content, make)
