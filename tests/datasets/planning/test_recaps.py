"""Captions from another table, joined by URL, origin or key."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.caption_settings import RecapConfig
from datasets.config import DataError
from datasets.planning import plan, recaps

KEY = "data.recaps.dense"


def names(shard, place, origin=None):
    url = f"https://example.org/{shard}/{place}.jpg"
    return plan.key_of(url), url, origin


STORED = [(shard, [names(shard, place) for place in range(3)]) for shard in (0, 2, 700)]


def joined(tmp_path, columns, stored=STORED, **settings):
    pq.write_table(pa.table(columns), tmp_path / "captions.parquet")
    read = Counter()
    config = RecapConfig(path=str(tmp_path / "captions.parquet"), **settings)
    return list(recaps.joined(stored, config, KEY, read)), dict(read)


def test_captions_find_their_pictures_by_url_however_it_is_spelt(tmp_path):
    urls = [
        "HTTPS://example.org:443/2/1.jpg#top",
        "https://example.org/0/2.jpg",
        "https://elsewhere.org/",
        "none",
        None,
    ]
    texts = ["a  red\nheart", "a fox", "unknown", "unknown", "unknown"]
    found, read = joined(tmp_path, {"url": urls, "re_caption": texts, "org_caption": ["old"] * 5})
    assert found == [(0, {2: ["a fox"]}), (2, {1: ["a red heart"]}), (700, {})]
    assert read == {"joined": 2, "unknown": 3}


def test_a_picture_may_have_several_each_once_and_blank_ones_are_counted(tmp_path):
    url = STORED[2][1][0][1]
    texts = [["a", "b", " "], ["b", "c"], [], None]
    found, read = joined(tmp_path, {"URL": [url] * 4, "dense": pa.array(texts)}, column="dense")
    assert found == [(0, {}), (2, {}), (700, {0: ["a", "b", "c"]})]
    assert read == {"joined": 2, "no_caption": 2}


def test_copies_of_a_picture_are_found_by_where_they_come_from(tmp_path):
    origin = "https://original.org/x.jpg"
    stored = [(0, [names(0, 0, origin), names(0, 1), names(0, 2, origin)])]
    found, _ = joined(tmp_path, {"url": [origin], "caption": ["x"]}, stored)
    assert found == [(0, {0: ["x"], 2: ["x"]})]


def test_keys_name_pictures_where_there_are_no_urls(tmp_path):
    found, read = joined(tmp_path, {"key": [STORED[1][1][2][0], "0" * 32], "text": ["x", "y"]})
    assert found == [(0, {}), (2, {2: ["x"]}), (700, {})]
    assert read == {"joined": 1, "unknown": 1}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 2)), max_size=40))
def test_all_shards_come_in_order_with_exactly_theirs(tmp_path_factory, asked):
    stored = [(shard, [names(shard, place) for place in range(3)]) for shard in range(0, 601, 7)]
    columns = {"url": [names(*it)[1] for it in asked], "caption": [f"{shard}/{place}" for shard, place in asked]}
    table = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    found, _ = joined(tmp_path_factory.mktemp("recaps"), table, stored)
    assert [shard for shard, _ in found] == [shard for shard, _ in stored]
    told = {(shard, place): texts for shard, captions in found for place, texts in captions.items()}
    assert told == {it: [f"{it[0]}/{it[1]}"] for it in asked if it[0] % 7 == 0}


@pytest.mark.parametrize(
    ("columns", "settings", "told"),
    [
        ({"caption": ["x"]}, {}, "has no column url or key or image_url, only caption"),
        ({"url": ["x"], "words": ["x"]}, {}, "re_caption or .* only url, words; give data.recaps.dense.column"),
        ({"url": ["x"], "words": ["x"]}, {"column": "word"}, "has no column word, only url, words"),
        ({"url": ["x"], "caption": [1.0]}, {}, "data.recaps.dense.column: caption of .* is double, no text"),
    ],
)
def test_tables_without_the_columns_are_refused_by_name(tmp_path, columns, settings, told):
    with pytest.raises(DataError, match=told):
        joined(tmp_path, columns, **settings)


def test_no_file_and_no_parquet_are_refused_by_name(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"nothing of the kind")
    for path, told in (("y", "there is no Parquet file at"), ("x.parquet", "cannot be read")):
        with pytest.raises(DataError, match=rf"^data.recaps.dense.path: .*{told}"):
            recaps.check(RecapConfig(path=str(tmp_path / path)), KEY)


def test_texts_that_are_no_utf_8_cost_their_rows_and_lists_have_any_kind(tmp_path):
    urls = [STORED[0][1][place][1] for place in range(3)]
    texts = pa.array([b"B\xe4r", b"a fox", "Привет".encode("utf-16-le")], pa.binary()).view(pa.string())
    found, read = joined(tmp_path, {"image_url": urls, "caption": texts})
    assert (found[0], read) == ((0, {1: ["a fox"]}), {"joined": 1, "no_caption": 2})
    pairs = pa.array([["a", "b"], ["c", "d"], ["e", "f"]], pa.list_(pa.string(), 2))
    assert joined(tmp_path, {"url": urls, "caption": pairs})[0][0] == (0, {0: ["a", "b"], 1: ["c", "d"], 2: ["e", "f"]})


@pytest.mark.parametrize("columns", [["url", "url", "caption"], ["url", "caption", "caption"]])
def test_two_columns_of_a_name_are_refused(tmp_path, columns):
    table = pa.table([pa.array(["x"])] * 3, names=columns)
    pq.write_table(table, tmp_path / "b.parquet")
    config = RecapConfig(path=str(tmp_path / "b.parquet"))
    with pytest.raises(DataError, match=r"^data.recaps.dense.path: .*b.parquet has several columns"):
        recaps.check(config, KEY)
    pq.write_table(pa.table({"url": ["x"], "caption": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"^data.recaps.dense.path: .*b.parquet has not one column url and one caption"):
        list(recaps.joined(STORED, RecapConfig(path=str(tmp_path)), KEY, Counter()))
