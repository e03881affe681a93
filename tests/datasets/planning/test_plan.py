"""Config, sources and the plan: what is kept, why the rest is not, and what the user is told."""

import hashlib
import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from datasets import left_out
from datasets.caption_settings import clean_caption
from datasets.config import DataError
from datasets.planning import layout, plan, plan_files
from datasets.sources import laion, openmoji
from tests.datasets.planning.planned import CONF, data_config, laion_row, made, make, metadata

# ---------------------------------------------------------------------------------------------------- config


def test_committed_configs_are_valid():
    assert data_config("openmoji").expected_rows == 64
    assert data_config("openmoji", limit=8).expected_rows == 8
    assert data_config("openmoji", openmoji__captions=None).expected_rows is None
    assert data_config("laion_aesthetic", metadata="x.parquet").expected_rows is None
    assert data_config("laion_aesthetic", metadata="x.parquet", limit=10).expected_rows == 10


def test_laion_needs_metadata():
    with pytest.raises(ValidationError, match=r"data\.metadata is not set.*data\.metadata=/"):
        data_config("laion_aesthetic")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("limit", 0),
        ("shard_rows", -1),
        ("image__size", "large"),
        ("image__format", "webp"),
        ("download__max_lost", 1.5),
        ("download__timeout_s", math.inf),
        ("filters__max_aspect", 0.5),
        ("filters__max_aesthetic", 3),
    ],
)
def test_wrong_values_and_unknown_keys_are_refused(key, value):
    with pytest.raises(ValidationError, match=key.split("__")[-1]):
        data_config("openmoji", **{key: value})


def test_config_filters_and_plan_import_nothing_heavy():
    heavy = {"torch", "img2dataset", "webdataset", "pandas", "cv2", "ray"}
    code = "import sys, datasets.config, datasets.planning.filters, datasets.planning.plan; print(*sys.modules)"
    root = CONF.parent.parent
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert not heavy & set(found.stdout.split())


# -------------------------------------------------------------------------------------------------- openmoji


def test_the_embedded_source_has_the_committed_captions():
    config = data_config("openmoji")
    rows = make(config).rows
    assert config.openmoji is not None
    urls = dict(zip(rows["caption"].to_pylist(), rows["url"].to_pylist(), strict=True))
    assert set(urls) == set(config.openmoji.captions or ())
    assert len(urls) == 64
    assert {"blue circle", "green square"} <= set(urls)
    assert urls["red heart"] == "http://openmoji.invalid/2764.png"
    assert set(rows["aesthetic"].to_pylist()) == {config.openmoji.aesthetic}


def test_every_named_picture_without_a_skin_tone_can_be_had():
    captions = openmoji.pictures()
    assert len(captions) > 1900
    assert len(set(captions.values())) == len(captions)
    assert not any("skin tone" in caption or "_" in caption for caption in captions)
    assert make(data_config("openmoji", openmoji__captions=None)).rows.num_rows == len(captions)


def test_an_unknown_caption_is_refused_with_the_nearest():
    with pytest.raises(DataError, match=r"data\.openmoji\.captions.*'red hart'.*did you mean 'red heart'"):
        make(data_config("openmoji", openmoji__captions=["red hart"]))


def test_a_caption_named_twice_is_refused():
    with pytest.raises(DataError, match="'red heart' twice"):
        make(data_config("openmoji", openmoji__captions=["red heart", "red heart"]))


def test_a_larger_picture_is_planned_for_a_larger_size():
    config = data_config("openmoji", image__size=256)
    assert set(make(config).rows["width"].to_pylist()) == {256.0}


# ------------------------------------------------------------------------------------------------------ plan


def test_the_plan_lays_rows_out_in_shards_and_reads_back(tmp_path):
    result = made(tmp_path, [laion_row(number) for number in range(10)], shard_rows=4)
    content = plan_files.parquet_bytes(result.rows, shard_rows=4)
    shards = dict(plan_files.shards(content))
    assert {shard: rows["row"].to_pylist() for shard, rows in shards.items()} == {
        0: [0, 1, 2, 3],
        1: [0, 1, 2, 3],
        2: [0, 1],
    }
    assert pa.concat_tables(shards.values()).equals(result.rows)
    assert pq.ParquetFile(io.BytesIO(content)).num_row_groups == 3
    assert content == plan_files.parquet_bytes(result.rows, shard_rows=4)


def test_parts_are_handed_over_when_they_are_full(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SHARDS_PER_PART", 2)
    rows = [laion_row(number) for number in range(300)]
    parts = made(tmp_path, rows, shard_rows=7).parts
    assert [part.num_rows for part in parts] == [14] * 21 + [6]
    assert pa.concat_tables(parts).equals(made(tmp_path, rows, shard_rows=7).rows)
    assert [part["shard"][0].as_py() for part in parts] == list(range(0, 43, 2))


def test_captions_are_found_by_the_shards_of_their_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SHARDS_PER_PART", 2)
    found = made(tmp_path, [laion_row(number) for number in range(40)], shard_rows=7)
    files = {f"plan/{place:05d}.parquet": plan_files.parquet_bytes(part, 7) for place, part in enumerate(found.parts)}
    read = []

    def opened(name):
        read.append(name)
        return files[name]

    rows = found.rows.to_pylist()
    told = plan_files.captions(opened, [*files, "left_out.parquet"], [1, 5])
    assert told == {row["key"]: row["caption"] for row in rows if row["shard"] in (1, 5)}
    assert read == ["plan/00000.parquet", "plan/00002.parquet"]  # and no other
    assert plan_files.captions(opened, files, []) == {}


def test_exact_duplicates_are_dropped_and_counted(tmp_path):
    same = "HTTPS://Example.org:443/1.jpg#top"
    rows = [laion_row(1), laion_row(0), laion_row(1, URL=same, punsafe=0.05), laion_row(1, TEXT="another caption")]
    result = made(tmp_path, rows)
    assert result.rejected["duplicate"] == 1
    assert set(result.rows["caption"].to_pylist()) == {
        "a photograph, number 1",
        "a photograph, number 0",
        "another caption",
    }
    assert len(set(result.rows["key"].to_pylist())) == 3
    assert set(result.rows["punsafe"].to_pylist()) == {0.01}  # the first one stays


def test_of_rows_that_come_again_those_that_are_dropped_are_listed(tmp_path):
    config = data_config("laion_aesthetic", metadata=metadata(tmp_path, [laion_row(1)] * 3 + [laion_row(0)]))
    (tally,) = plan.make(config, 0, lambda part: None).sources
    listed = left_out.table({"metadata": tally.left_out})
    rows = pq.read_table(pa.BufferReader(listed)).to_pylist()
    assert [(row["place"], row["cause"]) for row in rows] == [(laion_row(1)["URL"], "duplicate")] * 2


def test_the_layout_is_a_function_of_rows_and_seed(tmp_path, monkeypatch):
    rows = [laion_row(number) for number in range(50)]
    straight, other = made(tmp_path, rows, 1), made(tmp_path, rows, 2)
    assert made(tmp_path, rows[::-1], 1).rows.equals(straight.rows)
    monkeypatch.setattr(laion, "_BATCH_ROWS", 3)
    assert made(tmp_path, rows, 1).rows.equals(straight.rows)
    keys = straight.rows["key"].to_pylist()
    assert keys != other.rows["key"].to_pylist()
    assert set(keys) == set(other.rows["key"].to_pylist())
    lots = [hashlib.blake2b(key.encode(), digest_size=8, key=(1).to_bytes(8, "little")).digest() for key in keys]
    assert lots == sorted(lots)


def test_the_draw_is_a_function_of_the_seed_and_grows_with_the_limit(tmp_path):
    rows = [laion_row(number) for number in range(50)]
    ten, other, twenty = (
        made(tmp_path, rows, 1, limit=10),
        made(tmp_path, rows, 2, limit=10),
        made(tmp_path, rows, 1, limit=20),
    )
    assert ten.rejected["limit"] == 40
    assert set(ten.rows["key"].to_pylist()) != set(other.rows["key"].to_pylist())
    assert ten.rows["key"].to_pylist() == twenty.rows["key"].to_pylist()[:10]


@pytest.mark.parametrize(("rule", "field"), [("max_same_caption", "TEXT"), ("max_same_url", "URL")])
def test_a_text_stays_as_often_as_its_cap_allows(tmp_path, rule, field):
    same = {"TEXT": "buy this now", "URL": "https://example.org/same.jpg"}[field]
    rows = [laion_row(number, **({field: same} if number % 3 else {})) for number in range(60)]
    rows += [rows[1], rows[2]]  # copies count once
    result = made(tmp_path, rows, 5, **{f"filters__{rule}": 7})
    assert {reason: count for reason, count in result.rejected.items() if count} == {rule: 33, "duplicate": 2}
    free = made(tmp_path, rows, 5, filters__max_same_caption=None, filters__max_same_url=None)
    column = {"TEXT": "caption", "URL": "url"}[field]
    firsts = [row["key"] for row in free.rows.to_pylist() if row[column] == same][:7]
    assert [row["key"] for row in result.rows.to_pylist() if row[column] == same] == firsts
    assert made(tmp_path, rows[::-1], 5, **{f"filters__{rule}": 7}).rows.equals(result.rows)


def test_what_is_on_the_removal_list_is_not_planned(tmp_path):
    gone = plan.key_of("https://example.org/2.jpg", "a photograph, number 2")
    (tmp_path / "removed.txt").write_text(f"# asked for in May\n\nHTTPS://example.org/0.jpg#x\n{gone}\n")
    rows = [laion_row(number) for number in range(4)]
    result = made(tmp_path, rows, removed=str(tmp_path / "removed.txt"))
    assert set(result.rows["url"].to_pylist()) == {"https://example.org/1.jpg", "https://example.org/3.jpg"}
    assert result.rejected["removed"] == 2


def test_a_removal_list_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "removed.txt").write_text("https://example.org/0.jpg\n0.jpg\n")
    with pytest.raises(DataError, match=r"^data.removed: line 2 of .*removed.txt is neither a key nor a URL: '0.jpg'"):
        made(tmp_path, [laion_row(0)], removed=str(tmp_path / "removed.txt"))
    with pytest.raises(DataError, match=r"data.removed: there is no file"):
        made(tmp_path, [laion_row(0)], removed=str(tmp_path / "missing.txt"))


def test_a_removal_list_may_come_from_any_editor_and_is_told_where_it_cannot(tmp_path):
    path = tmp_path / "removed.txt"
    path.write_bytes("\ufeffhttp://A.org/x.jpg\r\n# why\r\n\r\nABCDEF0123456789abcdef0123456789\r\n".encode())
    assert plan.removals(str(path)) == {"http://a.org/x.jpg", "abcdef0123456789" * 2}
    path.write_bytes("http://a.org/größe.jpg".encode("utf-16"))
    with pytest.raises(DataError, match=r"^data.removed: .*removed.txt is not in UTF-8; save it in that encoding"):
        plan.removals(str(path))
    with pytest.raises(DataError, match=r"^data.removed: there is no file"):
        plan.removals(str(tmp_path))


def test_rows_of_which_none_is_one_are_told_with_the_first(tmp_path):
    data = data_config("laion_aesthetic", metadata=metadata(tmp_path, [laion_row(URL="ftp://a.org/x.jpg")]))
    with pytest.raises(
        DataError, match=r"url removed 1; mend the rows, or give others; the first: b'ftp://a.org/x.jpg'"
    ):
        plan.make(data, 0, lambda part: None)


def test_folders_and_patterns_are_read_in_the_order_of_names(tmp_path):
    for number, name in enumerate(["b.parquet", "a.parquet", "sub"]):
        if name == "sub":
            metadata(tmp_path / "in" / name, [laion_row(number)], "c.parquet")
        else:
            metadata(tmp_path / "in", [laion_row(number)], name)

    def urls(path: Path) -> list[str]:
        tables = laion.tables(str(path), {"url"})
        return [url[-5:-4].decode() for table in tables for url in table["url"].to_pylist()]

    assert urls(tmp_path / "in") == ["1", "0", "2"]
    assert urls(tmp_path / "in" / "*.parquet") == ["1", "0"]
    assert urls(tmp_path / "in" / "*" / "*.parquet") == ["2"]


def test_other_spellings_and_number_types_are_read(tmp_path):
    row = {name.lower(): value for name, value in laion_row(0).items()}
    row["width"], row["height"] = float(row["width"]), np.float32(row["height"])
    assert made(tmp_path, [row]).rows["width"].to_pylist() == [1500.0]


def test_text_that_is_not_utf_8_costs_its_row_only(tmp_path):
    good, *bad = laion_row(0), laion_row(1), laion_row(2)
    table = pa.table({name: [good[name], *(row[name] for row in bad)] for name in good})
    utf_16 = "Привет, лиса".encode("utf-16-le")  # whose bytes are UTF-8 of other signs
    texts = pa.array([good["TEXT"].encode(), b"two\xff words", utf_16]).view(pa.string())  # as Parquet files may hold
    pq.write_table(table.set_column(1, "TEXT", texts), tmp_path / "x.parquet")
    result = make(data_config("laion_aesthetic", metadata=str(tmp_path / "x.parquet")))
    assert result.rejected["caption"] == 2
    assert result.rows.num_rows == 1


def test_metadata_of_no_rows_no_file_or_no_parquet_is_refused(tmp_path):
    def refused(path: str) -> str:
        with pytest.raises(DataError) as caught:
            make(data_config("laion_aesthetic", metadata=path))
        return str(caught.value)

    (tmp_path / "bad.parquet").write_text("URL,TEXT")
    assert "holds no rows" in refused(metadata(tmp_path, []))
    assert "no Parquet file" in refused(str(tmp_path / "missing.parquet"))
    assert "no Parquet file" in refused(str(tmp_path / "x*.parquet"))
    assert "cannot be read" in refused(str(tmp_path / "bad.parquet"))


def test_filters_that_leave_nothing_say_how_many_each_removed(tmp_path):
    rows = [laion_row(0, HEIGHT=10), laion_row(1, HEIGHT=10), laion_row(2, punsafe=1.0)]
    with pytest.raises(DataError, match=r"data\.filters.*3 rows.*min_side removed 2, max_punsafe removed 1"):
        made(tmp_path, rows)


def test_openmoji_takes_the_users_metadata_too(tmp_path):
    path = metadata(tmp_path, [laion_row(0)])
    assert make(data_config("openmoji", metadata=path)).rows.num_rows == 1
    with pytest.raises(DataError, match="holds no rows"):
        make(data_config("openmoji", metadata=metadata(tmp_path, [])))


@given(st.text(max_size=60))
@example("a\u200e\u0301")  # an accent that finds its letter only when the control between them is gone
def test_clean_captions_are_stable_and_storable(text):
    clean = clean_caption(text)
    assert clean_caption(clean) == clean
    assert clean == clean.strip()
    assert not any(ord(letter) < 32 or 0x7F <= ord(letter) < 0xA0 for letter in clean)


def test_a_key_tells_url_and_caption_apart():
    assert plan.key_of("http://x/", "a b") == plan.key_of("http://x/", "a b")
    assert plan.key_of("http://x/", "ab") != plan.key_of("http://x/a", "b")
    assert len(plan.key_of("http://x/", "a")) == 32
    assert plan.key_of("http://a.b/c.png", "a fox") == "a8734b5a4a9022d9b2c52e0420909f1a"  # as in roots and on lists
    assert plan.key_of("http://a.b/ü?x=1", "Fuß") == "641a421db3d9ef3767aa3670d72246e6"


def test_tables_come_in_batches_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(laion, "_BATCH_ROWS", 3)
    path = metadata(tmp_path, [laion_row(number) for number in range(10)])
    sizes = [table.num_rows for table in laion.tables(path, {"url", "caption"})]
    assert sum(sizes) == 10
    assert max(sizes) == 3
