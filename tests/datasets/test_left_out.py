"""What is left out: counts, a list by cause, and the file of it."""

import pyarrow as pa
import pyarrow.parquet as pq

from datasets import left_out
from datasets.left_out import SCHEMA, LeftOut


def test_a_list_names_the_first_of_each_cause_and_counts_all(monkeypatch):
    monkeypatch.setattr(left_out, "LISTED", 2)
    found = LeftOut()
    for number in range(3):
        found.add("no_caption", f"{number}.png", "it has no caption")
        found.pass_over(".pdf", f"{number}.pdf", "neither picture nor caption")
    found.add_all("min_side", iter(["http://a/\udc00"]), 1, "its width")
    assert found.counts == {"no_caption": 3, "min_side": 1}
    assert found.others == {".pdf": 3}
    assert found.told() == "no_caption 3, min_side 1"
    assert found.examples(1) == ["0.png: it has no caption", "http://a/?: its width"]
    table = pq.read_table(pa.BufferReader(left_out.table({"folder": found})))
    assert table.schema == SCHEMA
    assert [(row["cause"], row["place"], row["sentence"]) for row in table.to_pylist()] == [
        ("no_caption", "0.png", "it has no caption"),
        ("no_caption", "1.png", "it has no caption"),
        ("no_caption", "", "1 more are not listed"),
        ("passed_over", "0.pdf", "neither picture nor caption"),
        ("passed_over", "1.pdf", "neither picture nor caption"),
        ("passed_over", "", "1 more are not listed"),
        ("min_side", "http://a/?", "its width"),
    ]


def test_a_place_is_one_field_of_a_line_whatever_a_file_is_called():
    found = LeftOut()
    found.add("no_caption", "new\nline\t.png", "it is\rnone")
    assert found.examples(1) == [r"new\nline\t.png: it is\rnone"]
    table = pq.read_table(pa.BufferReader(left_out.table({"folder": found})))
    assert table["place"].to_pylist() == ["new\nline\t.png"]


def test_nothing_left_out_is_an_empty_file():
    assert pq.read_table(pa.BufferReader(left_out.table({"folder": LeftOut()}))).num_rows == 0
