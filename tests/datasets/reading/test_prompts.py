"""Prompt files of every form: what is taken of them, what comes again, what is drawn, and what is refused."""

import json
from pathlib import Path

import pytest

from datasets.config import DataError
from datasets.reading.prompts import Prompt, read

PARTI = """\
Prompt\tCategory\tChallenge\tNote
"G I G G L E" painted\tIllustrations\tWriting\t
a cat\tAnimals\tBasic\tx
""".replace("\n", "\r\n")
FILES = {
    "parti.tsv": PARTI,
    "mine.txt": "\ufeffa  cat \n\nÜber Köln\na cat\n",
    "captions.json": json.dumps({"annotations": [{"caption": "a cat "}, {"caption": "a dog"}, {"caption": "a cat"}]}),
    "narratives.jsonl": '{"caption": "In this image, a cat."}\n\n{"caption": "A dog."}\n',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, "utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "texts", "repeated"),
    [
        ("parti.tsv", ['"G I G G L E" painted', "a cat"], 0),  # nothing is quoted there
        ("mine.txt", ["a cat", "Über Köln"], 1),
        ("captions.json", ["a cat", "a dog"], 1),
        ("narratives.jsonl", ["In this image, a cat.", "A dog."], 0),
    ],
)
def test_every_form_is_read(folder, name, texts, repeated):
    found = read(str(folder / name), None, 0, "k")
    assert [prompt.text for prompt in found.prompts] == texts
    assert (found.read, found.repeated, found.blank) == (len(texts) + repeated, repeated, 0)


@pytest.mark.parametrize(
    ("name", "text", "first"),
    [
        ("x.tsv", "Category\tPrompt\n\nAnimals\t \nAnimals\ta cat\nAnimals\t\n", "line 3"),
        ("x.json", '{"annotations": [{"caption": "a cat"}, {"caption": ""}, {"caption": "\\ud83d"}]}', "annotation 2"),
        ("x.jsonl", '{"caption": "\\n"}\n\n{"caption": "a cat"}\n{"caption": "half \\ud83d"}', "line 1"),
    ],
)
def test_a_row_without_a_prompt_is_left_out_and_counted_and_a_blank_line_is_none(tmp_path, name, text, first):
    (tmp_path / name).write_text(text)
    found = read(str(tmp_path / name), None, 0, "k")
    assert [prompt.text for prompt in found.prompts] == ["a cat"]
    assert (found.read, found.repeated, found.blank, found.first_blank) == (1, 0, 2, first)


def test_partis_categories_come_along(folder):
    first, second = read(str(folder / "parti.tsv"), None, 0, "k").prompts
    assert (first.category, first.challenge) == ("Illustrations", "Writing")
    assert second == Prompt("a cat", "Animals", "Basic")
    assert second.key == Prompt("a cat").key  # of the text alone: 32 hex digits of its sha256
    assert (len(second.key), second.key[:8]) == (32, "51e46741")


def test_a_draw_is_the_seeds_whatever_the_order_of_the_file(tmp_path):
    lines = [f"prompt {number}" for number in range(100)]
    for name, some in (("a.txt", lines), ("b.txt", lines[::-1]), ("c.txt", lines + lines)):
        (tmp_path / name).write_text("\n".join(some))
    a, b, c = (read(str(tmp_path / name), 30, 7, "k").prompts for name in ("a.txt", "b.txt", "c.txt"))
    assert len(a) == 30
    assert list(a) == [prompt for prompt in read(str(tmp_path / "a.txt"), None, 7, "k").prompts if prompt in a]
    assert set(a) == set(b) == set(c)
    assert set(read(str(tmp_path / "a.txt"), 30, 8, "k").prompts) != set(a)
    assert set(read(str(tmp_path / "a.txt"), 20, 7, "k").prompts) < set(a)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("none.txt", None, "there is no prompt file at"),
        ("empty.txt", "\n \n", "holds no prompt"),
        ("empty.json", '{"annotations": []}', "holds no prompt"),
        ("prompts.csv", "a", "is no prompt file by its name; give one that ends in .tsv, .txt, .json, .jsonl"),
        ("other.tsv", "Text\tKind\na\tb\n", "its first line, cut at tabs, has no column Prompt, but text, kind"),
        ("commas.tsv", "Prompt,Category\na,b\n", "cut at tabs, has no column Prompt, but prompt,category"),
        ("short.tsv", "Category\tPrompt\nAnimals\n", "line 2 is cut short"),
        ("instances.json", '{"annotations": [{"bbox": []}]}', "annotation 1 has no caption"),
        ("torn.json", '{"annotations": [', "is no prompt file of its form"),
        ("list.json", "[1]", "it has no list of annotations"),
        ("null.json", '{"annotations": null}', "it has no list of annotations"),
        ("number.json", '{"annotations": [{"caption": "a"}, {"caption": 7}]}', "annotation 2 has no caption"),
        ("torn.jsonl", '{"caption": "a"}\n\n{nope\n', "line 3 is no JSON"),
        ("list.jsonl", "[1]\n", "line 1 has no caption"),
        ("deep.json", "[" * 100_000, "is no prompt file of its form"),
        ("deep.jsonl", '{"a":' * 100_000, "is no prompt file of its form"),
    ],
)
def test_what_is_no_prompt_file_is_refused_in_a_sentence(tmp_path, name, text, told):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"^eval\.prompts\.x: ") as error:
        read(str(tmp_path / name), None, 0, "eval.prompts.x")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
@pytest.mark.parametrize("name", ["x.txt", "x.tsv", "x.json", "x.jsonl"])
def test_other_encodings_are_named(tmp_path, name, encoding):
    """Also UTF-16 without a byte order mark, of which English is valid UTF-8: every second character is a zero."""
    text = "Würstchen" if encoding == "latin-1" else "a cat"
    (tmp_path / name).write_bytes(f'{{"caption": "{text}"}}\n'.encode(encoding))
    with pytest.raises(
        DataError,
        match=r"^eval\.prompts\.x: .* is not in UTF-8, or has zero bytes; save it in that encoding, without them$",
    ):
        read(str(tmp_path / name), None, 0, "eval.prompts.x")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_end_as_any_system_ends_them(tmp_path, end, mark):
    forms = {"x.txt": "a cat\na dog\n", "x.tsv": PARTI.replace("\r\n", "\n"), "x.jsonl": FILES["narratives.jsonl"]}
    for name, text in forms.items():
        (tmp_path / name).write_bytes((mark + text.replace("\n", end)).encode())
        assert len(read(str(tmp_path / name), None, 0, "k").prompts) == 2, name


def test_a_folder_is_no_prompt_file(tmp_path):
    (tmp_path / "x.txt").mkdir()
    with pytest.raises(DataError, match=r"^eval\.prompts\.x: there is no prompt file at .*; give another path$"):
        read(str(tmp_path / "x.txt"), None, 0, "eval.prompts.x")


def test_of_a_file_that_is_no_table_little_is_told(tmp_path):
    (tmp_path / "x.tsv").write_text("x" * 100_000)
    with pytest.raises(DataError) as error:
        read(str(tmp_path / "x.tsv"), None, 0, "eval.prompts.x")
    assert len(str(error.value)) < 600
