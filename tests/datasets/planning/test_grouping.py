"""Plans whose rows are pictures with all their captions."""

import json

import pyarrow as pa
import pytest

from datasets.config import DataError
from datasets.planning import grouping, plan
from tests.datasets.planning.planned import data_config, laion_row, metadata

WEIGHTS = {"alt": 1.0}
URLS = [f"https://example.org/{number}.jpg" for number in range(6)]
FIVE = [laion_row(URL=url, TEXT=f"caption {which} of it") for which in range(5) for url in URLS]


def planned(tmp_path, rows, seed=0, **changes):
    parts: list[pa.Table] = []
    config = data_config("laion_aesthetic", metadata=metadata(tmp_path, rows), captions=WEIGHTS, **changes)
    counts = plan.make(config, seed, parts.append)
    found = pa.concat_tables(parts).to_pylist()
    assert counts.planned == len(found)
    assert counts.captions == sum(len(row["captions"]) for row in found)
    assert counts.captions + sum(counts.rejected.values()) == counts.read == len(rows)
    return found, counts


def test_five_captions_of_a_picture_are_one_row(tmp_path):
    rows, counts = planned(tmp_path, FIVE)
    assert (counts.planned, counts.captions) == (6, 30)
    assert {row["url"] for row in rows} == set(URLS)
    for row in rows:
        assert row["captions"] == [f"caption {which} of it" for which in range(5)]
        assert row["caption"] == row["captions"][0]
        assert row["key"] == plan.key_of(row["url"])


def test_where_no_captions_are_weighted_each_is_a_row_as_before(tmp_path):
    parts: list[pa.Table] = []
    config = data_config("laion_aesthetic", metadata=metadata(tmp_path, FIVE), filters__max_same_url=None)
    counts = plan.make(config, 0, parts.append)
    assert counts.planned == counts.captions == 30
    assert pa.concat_tables(parts).schema == plan.SCHEMA


def test_the_same_caption_twice_is_a_duplicate_and_those_beyond_the_limit_are_counted(tmp_path):
    _, counts = planned(tmp_path, [*FIVE, FIVE[0]], limit=4)
    assert (counts.planned, counts.captions) == (4, 20)
    assert {cause: count for cause, count in counts.rejected.items() if count} == {"duplicate": 1, "limit": 10}


def test_rows_of_a_url_are_one_picture_whatever_its_cap_and_captions_that_many_have_are_capped(tmp_path):
    rows, counts = planned(tmp_path, FIVE, filters__max_same_url=1, filters__max_same_caption=4)
    assert counts.rejected["max_same_caption"] == 5 * 2
    assert (counts.captions, counts.rejected.get("max_same_url", 0)) == (20, 0)
    again, _ = planned(tmp_path, FIVE[::-1], filters__max_same_url=1, filters__max_same_caption=4)
    assert {row["key"]: set(row["captions"]) for row in rows} == {row["key"]: set(row["captions"]) for row in again}


def test_a_removal_list_may_name_a_picture_or_one_of_its_captions(tmp_path):
    keys = plan.key_of(URLS[0]), plan.key_of(URLS[1], "caption 3 of it")
    (tmp_path / "removed.txt").write_text("\n".join(keys))
    rows, counts = planned(tmp_path / "rows", FIVE, removed=str(tmp_path / "removed.txt"))
    assert counts.rejected["removed"] == 6
    assert {row["url"]: len(row["captions"]) for row in rows} == {URLS[1]: 4} | dict.fromkeys(URLS[2:], 5)


def test_every_caption_of_a_picture_is_named_by_key():
    rows = pa.table({"key": ["a", "b"], "caption": ["x", "y"], "captions": [["x", "z"], ["y"]]})
    assert grouping.a_row_each(rows).to_pylist() == [
        {"key": "a", "caption": "x"},
        {"key": "a", "caption": "z"},
        {"key": "b", "caption": "y"},
    ]
    rows = rows.append_column("source", pa.array(["one", "two"]))
    assert grouping.by_source(rows) == {"one": 1, "two": 1}
    assert grouping.by_source(rows.append_column("whose", pa.array([["one", "two"], ["two"]]))) == {"one": 1, "two": 2}
    assert grouping.by_source(rows.slice(2)) == {}


def test_coco_s_captions_and_a_list_in_a_table_are_of_one_picture(tmp_path):
    images = [{"id": n, "coco_url": f"http://coco.org/{n}.jpg", "width": 500, "height": 400} for n in range(3)]
    texts = [{"id": 10 * n + k, "image_id": n, "caption": f"{n} by {k}"} for k in range(5) for n in range(3)]
    (tmp_path / "captions_1.json").write_text(json.dumps({"images": images, "annotations": texts}))
    listed = metadata(tmp_path / "list", [laion_row(n, TEXT=[f"{n} by {k}" for k in range(5)]) for n in range(3)])
    for config in (
        data_config("coco_captions", coco_captions__annotations=str(tmp_path), image__size=64, captions=WEIGHTS),
        data_config("laion_aesthetic", metadata=listed, captions=WEIGHTS),
    ):
        parts: list[pa.Table] = []
        assert plan.make(config, 0, parts.append).planned == 3
        assert sorted(row["captions"] for row in pa.concat_tables(parts).to_pylist()) == [
            [f"{n} by {k}" for k in range(5)] for n in range(3)
        ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"captions": {"dense": 1.0}}, "give data.recaps.dense.path or data.captioners.dense.weights"),
        ({"captions": {"alt": 0.0}}, "all weights are 0"),
        ({"recaps": {"dense": {"path": "x"}}}, "recaps.dense has no weight; give data.captions="),
        ({"recaps": {"alt": {"path": "x"}}, "captions": {"alt": 1}}, "other captions are called alt"),
        ({"captions": {"alt": -1.0}}, "greater than or equal to 0"),
    ],
)
def test_weights_and_captions_belong_together(changes, told):
    with pytest.raises(ValueError, match=told):
        data_config("openmoji", **changes)


def test_no_caption_that_passes_is_told_as_before(tmp_path):
    with pytest.raises(DataError, match="none of 30 rows passes: min_words removed 30"):
        planned(tmp_path, FIVE, filters__min_words=9)
