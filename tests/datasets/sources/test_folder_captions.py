"""Captions as they lie in folders: files beside pictures, tables in all spellings, names; each used or named."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datasets.config import DataError
from datasets.left_out import LeftOut
from datasets.source_settings import FolderConfig
from datasets.sources import folder


@pytest.fixture
def mine(tmp_path):
    """A folder of two pictures, one in a sub-folder."""
    for number, name in enumerate(("x.png", "red_foxes/y-2.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8 + number)).save(tmp_path / name)
    return tmp_path


def read(path, **changes):
    """Captions by the picture's name, in their order, and what is left out."""
    left_out = LeftOut()
    found: dict[str, list[str]] = {}
    for table in folder.tables(FolderConfig(path=str(path), **changes), left_out):
        for row in table.to_pylist():
            found.setdefault(row["URL"].removeprefix("http://folder.invalid/"), []).append(row["TEXT"].decode())
    return found, left_out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name;text\nx.png;a cat\nred_foxes/y-2.png;foxes, two\n"),
        ("metadata.csv", 'File_Name,caption\r\nx.png,a cat\r\nred_foxes\\y-2.png,"foxes, two"\r\n'),
        ("metadata.csv", "\ufefftext\tfile_name\na cat\t/data/there/x.png\nfoxes, two\tD:\\p\\red_foxes\\y-2.png\n"),
        ("metadata.tsv", "file_name\ttext\nx.png\ta cat\nred_foxes/y-2.png\tfoxes, two\n"),
        (
            "metadata.jsonl",
            '\ufeff{"file_name": "x.png", "caption": "a cat"}\n\n'
            '{"file_name": "./red_foxes/y-2.png", "caption": ["foxes, two"]}\n',
        ),
    ],
)
def test_tables_as_people_write_them(mine, name, content):
    (mine / name).write_text(content)
    found, left_out = read(mine)
    assert found == {"x.png": ["a cat"], "red_foxes/y-2.png": ["foxes, two"]}
    assert not left_out.counts


def test_lists_and_parquet_give_a_row_a_caption(mine):
    rows = {"file_name": ["x.png", "red_foxes/y-2.png"], "captions": [["a cat", "a kitten"], ["foxes"]]}
    pq.write_table(pa.table(rows), mine / "metadata.parquet")
    assert read(mine)[0] == {"x.png": ["a cat", "a kitten"], "red_foxes/y-2.png": ["foxes"]}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_of_several_columns_of_captions_the_first_that_says_something_in_a_row_counts(mine, kind):
    names = ["x.png", "red_foxes/y-2.png"]
    rows = [
        {"caption": said, "text": text, "file_name": name} for said, text, name in zip("ab", "A ", names, strict=True)
    ]
    rows[1]["text"] = " " if kind == "csv" else None
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), mine / "metadata.parquet")
    elif kind == "jsonl":
        (mine / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        lines = [",".join(row.values()) for row in rows]
        (mine / "metadata.csv").write_text("\n".join(["caption,text,file_name", *lines]))
    found, left_out = read(mine)
    assert found == {"x.png": ["A"], "red_foxes/y-2.png": ["b"]}
    assert not left_out.counts


def test_a_caption_with_half_a_character_is_told_and_not_written_otherwise(mine):
    rows = [{"file_name": "x.png", "text": "a \ud83d"}, {"file_name": "red_foxes/y-2.png", "text": "a \U0001f98a"}]
    (mine / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, left_out = read(mine)
    assert found == {"red_foxes/y-2.png": ["a \U0001f98a"]}
    assert left_out.counts == {"encoding": 1}
    (mine / "metadata.jsonl").unlink()
    Image.new("RGB", (8, 12)).save(mine / os.fsdecode(b"B\xe4r.png"))
    found, left_out = read(mine, uncaptioned="file_name")
    assert found == {"x.png": ["x"], "red_foxes/y-2.png": ["y 2"]}
    assert left_out.counts == {"encoding": 1}


def test_what_is_wrong_with_the_only_table_is_told_before_how_captions_are_given(mine):
    (mine / "metadata.csv").write_text('file_name,text\nx.png,"a cat\nred_foxes/y-2.png,foxes\n')
    with pytest.raises(DataError, match=r"can be used \(fields 1, .*\); the first: metadata.csv lines 2 to 3: its"):
        read(mine)


def test_what_is_no_caption_is_counted_and_named_by_its_line(mine):
    rows = [{"file_name": "x.png", "text": 3}, {"file_name": None, "text": "nobody's"}, {"file_name": "gone.png"}]
    rows.append({"file_name": "red_foxes/y-2.png", "text": "foxes"})
    (mine / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, left_out = read(mine)
    assert found == {"red_foxes/y-2.png": ["foxes"]}
    assert left_out.counts == {"no_text": 1, "no_picture": 2}
    assert "metadata.jsonl line 1: its caption is no text but int 3" in left_out.examples(1)


def test_lines_of_more_or_fewer_fields_than_the_header_train_nothing(mine):
    (mine / "metadata.csv").write_text("file_name,text\nx.png,1girl, red hair\nred_foxes/y-2.png,foxes\nx.png\n")
    found, left_out = read(mine)
    assert found == {"red_foxes/y-2.png": ["foxes"]}
    assert left_out.counts == {"fields": 2, "no_caption": 1}
    assert "metadata.csv line 2: it has 3 fields, its header 2" in left_out.examples(1)[0]


@pytest.mark.parametrize(("suffix", "encoding"), [(".txt", "cp1252"), (".caption", "utf-16")])
def test_text_files_in_other_encodings_by_declaration(mine, suffix, encoding):
    (mine / "x.txt").write_bytes("a cat".encode(encoding))
    (mine / "red_foxes" / f"y-2{suffix}").write_bytes("zwei Füchse".encode(encoding))
    assert read(mine, encoding=encoding)[0] == {"x.png": ["a cat"], "red_foxes/y-2.png": ["zwei Füchse"]}
    (mine / "x.txt").write_text("a cat")
    found, left_out = read(mine)
    assert found == {"x.png": ["a cat"]}
    assert left_out.counts == {"encoding": 1}
    assert "data.folder.encoding" in left_out.examples(1)[0]


def test_each_line_may_be_a_caption_and_names_may_stand_in_for_one(mine):
    (mine / "x.caption").write_text("a cat\n\na kitten\n")
    assert read(mine)[0] == {"x.png": ["a cat\n\na kitten\n"]}
    assert read(mine, caption_lines="each")[0] == {"x.png": ["a cat", "a kitten"]}
    assert read(mine, uncaptioned="file_name")[0]["red_foxes/y-2.png"] == ["y 2"]
    assert read(mine, uncaptioned="folder_name")[0]["red_foxes/y-2.png"] == ["red foxes"]
    (mine / "x.caption").unlink()
    assert read(mine, uncaptioned="folder_name")[1].counts == {"no_caption": 1}  # the folder itself has no name


def test_every_file_is_used_or_named(mine):
    for name in ("a.jfif", "b.avif", "c.heic", "d.JPE"):
        kind = {"b.avif": "AVIF", "c.heic": "JPEG"}.get(name, "JPEG")
        Image.new("RGB", (9, 9), "red").save(mine / name, kind)
        (mine / name).with_suffix(".txt").write_text(name)
    (mine / "c.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    for name in ("notes.pdf", "old.PDF", "README", ".DS_Store", "metadata.xml"):
        (mine / name).write_text("")
    found, left_out = read(mine, uncaptioned="file_name")
    assert found.keys() == {"x.png", "red_foxes/y-2.png", "a.jfif", "b.avif", "d.JPE"}
    assert left_out.counts == {"unreadable": 1}
    assert "pillow-heif" in left_out.examples(1)[0]
    assert left_out.others == {".pdf": 2, "no suffix": 1, "hidden": 1, ".xml": 1}


def test_a_broken_line_costs_a_row_and_not_the_table(mine):
    lines = [b'{"file_name": "x.png", "text": "a cat"}', b'{"file_name": "x.png", ', b'["x.png"]', b"\xff\xfe", b"  "]
    lines += [b"[" * 100_000, b'{"file_name": "red_foxes/y-2.png", "text": "two foxes"}', b'{"text": "B\xe4r"}']
    (mine / "metadata.jsonl").write_bytes(b"\n".join(lines))
    found, left_out = read(mine)
    assert found == {"x.png": ["a cat"], "red_foxes/y-2.png": ["two foxes"]}
    assert left_out.counts == {"no_row": 5}
    assert left_out.examples(1)[0].startswith("metadata.jsonl line 2: it is no JSON (Expecting ")


def test_quotes_that_end_elsewhere_cost_the_rows_between_by_their_lines(mine):
    rows = [
        "file_name,text",
        'x.png,"a 5"" cat"',
        'x.png,"5 inch',
        "x.png,lost,too",
        'x.png,end"',
        "red_foxes/y-2.png,fox",
    ]
    (mine / "metadata.csv").write_text("\n".join(rows))
    found, left_out = read(mine)
    assert {name: sorted(texts) for name, texts in found.items()} == {
        "x.png": ["5 inch\nx.png,lost,too\nx.png,end", 'a 5" cat'],
        "red_foxes/y-2.png": ["fox"],
    }
    (mine / "metadata.csv").write_text("\n".join([rows[0], rows[1], rows[2], rows[3], 'x.png,e"nd', rows[5]]))
    found, left_out = read(mine)
    assert found["x.png"] == ['a 5" cat']
    assert left_out.counts["fields"] == 1
    assert found["red_foxes/y-2.png"] == ["fox"]
    told = "metadata.csv lines 3 to 5: its quotes do not match ("
    assert any(example.startswith(told) for example in left_out.examples(9))


def test_a_blank_caption_leaves_the_place_to_the_next(mine):
    (mine / "metadata.csv").write_text("file_name,text\nx.png,\nred_foxes/y-2.png,\n")
    (mine / "x.txt").write_text(" \n")
    (mine / "x.caption").write_text("a cat")
    found, left_out = read(mine)
    assert found == {"x.png": ["a cat"]}
    assert left_out.counts == {"no_caption": 1}  # a picture is lost; of the other, two that say nothing are told
    assert left_out.others == {"captions": 2}
    assert "its caption is blank" in {sentence for _, _, _, sentence in left_out.rows("folder")}
    assert read(mine, uncaptioned="file_name")[0] == {"x.png": ["a cat"], "red_foxes/y-2.png": ["y 2"]}


@pytest.mark.parametrize(
    ("content", "given", "told"),
    [
        ("größer".encode("utf-16"), "utf-8", "utf-16"),
        ("größer".encode(), "utf-16", "utf-8"),  # which as UTF-16 without its mark would be some letters
        ("größer".encode("cp1252"), "utf-8", "cp1252"),
        ("größer".encode("utf-16-le"), "utf-8", "utf-16-le"),
        ("красный кот".encode("utf-16-le"), "utf-8", "utf-16-le"),  # as UTF-8 it would be some letters
        (b"gr\x81", "utf-8", "latin-1"),
    ],
)
def test_the_encoding_that_is_told_is_one_that_the_text_is_in(mine, content, given, told):
    (mine / "x.txt").write_bytes(content)
    (mine / "red_foxes" / "y-2.txt").write_bytes("a fox".encode(given))
    left_out = read(mine, encoding=given)[1]
    assert left_out.counts == {"encoding": 1}
    assert left_out.examples(1)[0].endswith(f"; give data.folder.encoding, such as {told}")
    (mine / "metadata.csv").write_bytes(content)
    with pytest.raises(DataError, match=f"(encoding, such as {told}|no column file_name.*)$"):
        read(mine, encoding=given)


def test_a_picture_is_lost_once_whatever_does_not_caption_it(mine):
    (mine / "metadata.csv").write_text("file_name,text\nx.png,\nx.png,\n")
    (mine / "x.txt").write_bytes(b"\x81\xff")
    (mine / "x.caption").write_text(" ")
    (mine / "red_foxes" / "y-2.txt").write_text("a fox")
    found, left_out = read(mine)
    assert found == {"red_foxes/y-2.png": ["a fox"]}
    assert (left_out.counts, left_out.others) == ({"encoding": 1}, {"captions": 3})
    found, left_out = read(mine, uncaptioned="file_name")
    assert found == {"x.png": ["x"], "red_foxes/y-2.png": ["a fox"]}
    assert (left_out.counts, left_out.others) == ({}, {"captions": 4})


def test_half_a_character_of_utf_16_is_told_as_any_other(mine):
    text = "file_name,text\nx.png,a cat\nred_foxes/y-2.png,".encode("utf-16") + b"\x80\xd8" + "a\n".encode("utf-16-le")
    (mine / "metadata.csv").write_bytes(text)
    found, left_out = read(mine, encoding="utf-16")
    assert found == {"x.png": ["a cat"]}
    assert left_out.counts == {"encoding": 1}


def test_lines_are_counted_from_the_first_of_the_file(mine):
    (mine / "metadata.csv").write_text("\n\nfile_name,text\nx.png,a cat\nred_foxes/y-2.png,two, foxes\n")
    assert read(mine)[1].examples(1)[0].startswith("metadata.csv line 5: it has 3 fields")


def test_names_may_be_bytes_and_one_text_that_is_no_utf_8_costs_its_row(mine):
    rows = {"file_name": pa.array([b"x.png", b"red_foxes/y-2.png"], pa.binary())}
    rows["text"] = pa.array([b"a cat", b"F\xfcchse"], pa.binary()).view(pa.string())
    pq.write_table(pa.table(rows), mine / "metadata.parquet")
    found, left_out = read(mine)
    assert found == {"x.png": ["a cat"]}
    assert left_out.examples(1) == ["metadata.parquet row 2: its caption is no UTF-8 (invalid start byte at byte 1)"]


def test_of_paths_of_several_folders_those_count_that_lay_where_most_did(tmp_path):
    """A table of all splits lies in one of them: another's picture of the same name has another caption."""
    for number in range(3):
        Image.new("RGB", (8, 8 + number)).save(tmp_path / f"{number}.png")
    rows = [f"/data/{split}/{number}.png,{split} {number}\n" for split in ("val", "train") for number in range(3)]
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "".join(rows[1:]))
    found, left_out = read(tmp_path)
    assert found == {f"{number}.png": [f"train {number}"] for number in range(3)}
    assert left_out.counts == {"no_picture": 2}
    more = "".join(f"/data/val/{number}.png,val {number}\n" for number in range(3, 6))
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "".join(rows) + more)
    assert read(tmp_path)[0] == found  # as many of either are here, but all of this one
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "".join(rows[3:]) + "0.png,here\n")
    assert read(tmp_path)[0]["0.png"] == ["here"]


def test_a_blank_after_the_separator_is_none_of_the_field(mine):
    """Quotes after it are quotes, as in `x.png, "a cat, a dog"`."""
    (mine / "metadata.csv").write_text('file_name, text\nx.png, "a cat, a dog"\nred_foxes/y-2.png, "foxes"\n')
    found, left_out = read(mine)
    assert found == {"x.png": ["a cat, a dog"], "red_foxes/y-2.png": ["foxes"]}
    assert not left_out.counts


@pytest.mark.parametrize("blank", [" \u200b ", "\u2060", "\ufeff\u200d\t"])
def test_what_nobody_sees_is_no_caption(mine, blank):
    (mine / "x.txt").write_text(blank)
    (mine / "red_foxes/y-2.txt").write_text("fox\u200bes")
    found, left_out = read(mine)
    assert found == {"red_foxes/y-2.png": ["fox\u200bes"]}
    assert left_out.counts == {"no_caption": 1}
