"""What goes onto a terminal cannot drive it, whoever wrote it; JSON stays the document that it is."""

import io
import json

import pytest
from rich.table import Table

from pipeline import terminal
from pipeline.terminal import Console, print_json, print_table, printable

WILD = "a\x1b[2J\x1b]0;title\x07b\r\x9b1mc\u202ed\u2066e\x7f"
TAME = r"a\x1b[2J\x1b]0;title\x07b\r\x9b1mc\u202ed\u2066e\x7f"


def test_only_what_a_terminal_heeds_is_escaped():
    assert printable(WILD) == TAME
    harmless = "Würstchen\n\t\u3000日本 \U0001f469\u200d\U0001f373 [bold] \\x1b"
    assert printable(harmless) == harmless


@pytest.mark.parametrize("markup", [True, False])
def test_whatever_is_printed_is_tame(markup):
    file = io.StringIO()
    Console(file=file, soft_wrap=True, markup=markup).print(WILD, "and", WILD)
    assert file.getvalue() == f"{TAME} and {TAME}\n"


def test_so_is_a_table():
    table, file = Table(WILD, box=None), io.StringIO()
    table.add_row(WILD)
    print_table(table, file)
    assert [line.strip() for line in file.getvalue().splitlines()] == [TAME, TAME]


def test_nothing_in_a_text_or_a_table_is_taken_for_markup_or_a_picture():
    """Names of folders and users may hold anything."""
    odd = "a[b]c [/d] [red]e[/] :heart:"
    table, file = Table(odd, box=None), io.StringIO()
    table.add_row(odd)
    print_table(table, file)
    Console(file=file, soft_wrap=True, markup=False).print(odd)
    assert [line.strip() for line in file.getvalue().splitlines()] == [odd] * 3


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_says_the_same_and_is_tame(encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
    monkeypatch.setattr(terminal.sys, "stdout", stream)
    print_json({WILD: [f"ü {WILD}"]})
    said = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert json.loads(said) == {WILD: [f"ü {WILD}"]}
    assert not terminal.HEEDED.search(said)
