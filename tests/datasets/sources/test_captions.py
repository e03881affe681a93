"""Captions of foreign values: texts, lists of them, and everything else by cause."""

import pytest

from datasets.left_out import LeftOut
from datasets.sources.captions import captions, first, text


@pytest.mark.parametrize(
    ("value", "texts", "causes"),
    [
        ("a cat", ["a cat"], {}),
        (b"a cat", ["a cat"], {}),
        (b"\xef\xbb\xbfa cat", ["a cat"], {}),
        ("\ufeff ", [], {"no_caption": 1}),
        (["a cat", "a kitten"], ["a cat", "a kitten"], {}),
        (["a cat", 3, " "], ["a cat"], {"no_text": 1, "no_caption": 1}),
        (None, [], {"no_caption": 1}),
        ([], [], {"no_caption": 1}),
        (float("nan"), [], {"no_caption": 1}),
        (" \n", [], {"no_caption": 1}),
        (42, [], {"no_text": 1}),
        (True, [], {"no_text": 1}),
        ({"raw": "a cat"}, [], {"no_text": 1}),
        ([["a cat"]], [], {"no_text": 1}),
        (b"B\xe4r", [], {"encoding": 1}),
        ("half a character \ud83d", [], {"encoding": 1}),
        (["a \U0001f98a fox", "B\udce4r"], ["a \U0001f98a fox"], {"encoding": 1}),
        ("красный кот".encode("utf-16-le"), [], {"encoding": 1}),  # which is UTF-8 too, of other letters
        ("a cat".encode("utf-16-be"), [], {"encoding": 1}),
        ("a cat" + "\0" * 59, ["a cat" + "\0" * 59], {}),
        ("\x1b[31ma red cat\x07", ["\x1b[31ma red cat\x07"], {}),
    ],
)
def test_a_text_is_a_caption_a_list_gives_several_and_the_rest_is_counted(value, texts, causes):
    left_out = LeftOut()
    assert captions(value, left_out, "line 1") == texts
    assert left_out.counts == causes
    assert all(example.startswith("line 1: ") for example in left_out.examples(9))


@pytest.mark.parametrize(
    ("values", "texts", "causes"),
    [
        (["", float("nan"), "a cat", "a dog"], ["a cat"], {}),
        ([b"B\xe4r", ["a cat", 3], "a dog"], ["a cat"], {"no_text": 1}),
        ([None, 42, " "], [], {"no_text": 1}),
        ([" ", None], [], {"no_caption": 1}),
        ([], [], {"no_caption": 1}),
    ],
)
def test_the_first_value_that_says_something_counts(values, texts, causes):
    left_out = LeftOut()
    assert first(values, left_out, "line 1") == texts
    assert left_out.counts == causes


def test_what_is_no_text_does_not_become_one():
    values = ["cc0", 4, "", None, True, ["cc0"], {"name": "cc0"}, float("nan")]
    assert [text(value) for value in values] == ["cc0", "4", *[None] * 6]
