"""LAION's Parquet as it comes: other names and types of columns, damaged pages, hidden files, links."""

from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets.config import DataError
from datasets.files import storage
from datasets.files.errors import StoreAway
from datasets.left_out import LeftOut
from datasets.sources import laion

RE_LAION = {  # its own columns
    "url": ["http://a/1.jpg", "http://a/2.jpg"],
    "caption": ["a cat", "a dog"],
    "similarity": [0.3, 0.4],
    "hash": [1, 2],
    "punsafe": [0.01, float("nan")],
    "pwatermark": [0.1, None],
    "width": [640, 320],
    "height": [480, 240],
}


def written(path, columns, **options):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def rows(path, left_out=None):
    tables = laion.tables(path, {"url", "caption"}, left_out=left_out)
    return [row for table in tables for row in table.to_pylist()]


def test_re_laions_columns_are_taken_and_told(tmp_path):
    path = written(tmp_path / "part.parquet", RE_LAION)
    first, second = rows(path)
    assert (first["url"], first["caption"], first["width"]) == (b"http://a/1.jpg", b"a cat", 640.0)
    assert (second["punsafe"], second["pwatermark"], second["aesthetic"]) == (None, None, None)
    taken = laion.read_as(path)
    assert taken == {"URL": "url", "TEXT": "caption", "WIDTH": "width", "HEIGHT": "height"} | {
        name: name for name in ("similarity", "punsafe", "pwatermark")
    }
    assert laion.is_other(taken)
    assert "TEXT from caption, " in laion.told(taken)
    assert laion.told(taken).endswith("; not there: AESTHETIC_SCORE, LICENSE, ORIGINAL_URL")


def test_laions_own_name_of_a_column_counts_before_others(tmp_path):
    path = written(tmp_path / "x.parquet", {"URL": ["http://a/"], "caption": ["generated"], "TEXT": ["alt"]})
    assert rows(path)[0]["caption"] == b"alt"
    assert laion.read_as(path) == {"URL": "URL", "TEXT": "TEXT"}
    assert not laion.is_other(laion.read_as(path))


@pytest.mark.parametrize("nothing", [pa.nulls(2), pa.nulls(2, pa.string())])
def test_a_column_that_holds_nothing_leaves_its_place_to_one_of_another_name(tmp_path, nothing):
    path = written(tmp_path / "x.parquet", {"URL": ["http://a/", "http://b/"], "TEXT": nothing, "caption": ["a", "b"]})
    assert [row["caption"] for row in rows(path)] == [b"a", b"b"]
    assert laion.read_as(path)["TEXT"] == "caption"
    path = written(tmp_path / "y.parquet", {"URL": ["http://a/", "http://b/"], "TEXT": nothing, "caption": nothing})
    assert laion.read_as(path)["TEXT"] == "TEXT"


def test_columns_of_other_types(tmp_path):
    columns = {"URL": ["http://a/", "http://b/", "http://c/"], "LICENSE": [4, None, 7]}
    columns["TEXT"] = [["a cat", "a kitten"], [], ["a dog"]]
    left_out = LeftOut()
    found = rows(written(tmp_path / "x.parquet", columns), left_out)
    assert [(row["url"], row["caption"], row["licence"]) for row in found] == [
        (b"http://a/", b"a cat", b"4"),
        (b"http://a/", b"a kitten", b"4"),
        (b"http://c/", b"a dog", b"7"),
    ]
    assert left_out.counts == {"no_caption": 1}
    assert left_out.examples(1) == ["http://b/: its list of captions is empty"]
    coded = pa.table({"URL": ["http://a/"], "TEXT": pa.array(["a cat"]).dictionary_encode()})
    assert rows(written(tmp_path / "y.parquet", coded))[0]["caption"] == b"a cat"


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"URL": ["http://a/"], "TEXT": [3]}, "the column TEXT of .*b.parquet is int64, no text"),
        (
            {"URL": ["http://a/"], "TEXT": ["a"], "WIDTH": [[1]]},
            "the column WIDTH of .*b.parquet is list.*, no number",
        ),
        ({"URL": ["http://a/"]}, "b.parquet has no column TEXT, only URL"),
    ],
)
def test_a_schema_that_does_not_fit_is_told_with_its_file_before_a_row_is_read(tmp_path, columns, told):
    written(tmp_path / "in" / "a.parquet", RE_LAION)
    written(tmp_path / "in" / "b.parquet", columns)
    with pytest.raises(DataError, match=rf"data\.metadata: .*{told}"):
        laion.columns(str(tmp_path / "in"), {"url", "caption"})


def test_a_damaged_page_is_the_files_fault_and_told_with_its_name(tmp_path):
    path = written(tmp_path / "x.parquet", RE_LAION | {"caption": ["cats " * 300, "dogs " * 300]}, compression="zstd")
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    start = pq.read_metadata(path).row_group(0).column(1).data_page_offset
    content[start : start + 60] = bytes(60)
    (tmp_path / "x.parquet").write_bytes(content)
    assert laion.columns(path)["caption"] == "caption"  # the schema does not tell
    with pytest.raises(DataError, match=r"data\.metadata: .*x\.parquet cannot be read as LAION's Parquet"):
        rows(path)


def test_texts_that_are_no_numbers_are_numbers_that_are_not_there(tmp_path):
    sides = ["640", " 1e3 ", "abc", "", None, "12px", ".5", "nan"]
    texts = pa.array(["x"] * len(sides), pa.string_view())
    columns = {"URL": [f"http://a/{n}" for n in range(len(sides))], "TEXT": texts, "WIDTH": sides}
    found = rows(written(tmp_path / "x.parquet", columns))
    assert [row["width"] for row in found] == [640.0, 1000.0, None, None, None, None, 0.5, None]
    assert {row["caption"] for row in found} == {b"x"}


def test_hidden_files_are_none_and_links_keep_their_names(tmp_path):
    blob = written(tmp_path / "blobs" / "c0ffee", RE_LAION)
    folder = tmp_path / "in"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("._part-0.parquet", ".ipynb_checkpoints/part-0.parquet"):
        (folder / name).write_bytes(b"of a Mac")
    (folder / "part-0.parquet").symlink_to(blob)
    assert list(storage.matching(str(folder), ".parquet")) == ["part-0.parquet"]
    for path in (folder, folder / "part-0.parquet", f"{folder}/*.parquet", blob):
        assert len(rows(str(path))) == 2
    assert storage.absolute(str(folder / "part-0.parquet")) == str(folder / "part-0.parquet")


@pytest.mark.parametrize("name", ["part.pq", "part.parquet.gz", "part", "a*b", "[1].parquet"])
def test_a_file_that_is_named_is_told_by_its_content(tmp_path, name):
    assert len(rows(written(tmp_path / name, RE_LAION))) == 2
    (tmp_path / name).write_bytes(b"URL,TEXT\nhttp://a/,a cat\n")
    with pytest.raises(DataError, match=r"cannot be read as LAION's Parquet"):
        rows(str(tmp_path / name))


@pytest.mark.parametrize("folder", ["a*b", "[a]", "a?c", "{a}", "$a"])
def test_only_a_star_makes_a_pattern_and_only_where_nothing_is_called_so(tmp_path, folder):
    for name in ("x[1]-a.parquet", "x1-a.parquet"):
        written(tmp_path / folder / name, RE_LAION)
    for path, names in ((folder, ["x1-a.parquet", "x[1]-a.parquet"]), (f"{folder}/x[1]-*", ["x[1]-a.parquet"])):
        found = storage.matching(f"{tmp_path}/{path}", ".parquet")
        assert [name.rpartition("/")[2] for name in found] == names


def test_lists_of_all_kinds_hold_captions(tmp_path):
    for kind in (
        pa.list_(pa.string(), 2),
        pa.large_list(pa.binary()),
        pa.list_(pa.dictionary(pa.int32(), pa.string())),
    ):
        texts = pa.array([["a cat", "a kitten"], ["a dog", None]], kind)
        path = written(tmp_path / "x.parquet", {"URL": ["http://a/", "http://c/"], "TEXT": texts})
        found = [(row["url"], row["caption"]) for row in rows(path)]
        assert found == [
            (b"http://a/", b"a cat"),
            (b"http://a/", b"a kitten"),
            (b"http://c/", b"a dog"),
            (b"http://c/", None),
        ]


def test_a_side_of_nothing_is_a_size_that_is_not_known(tmp_path):
    sides = {"WIDTH": [0, -5, 640], "HEIGHT": [0.0, 4.0, 480.0]}
    columns = {"URL": [f"http://a/{n}" for n in range(3)], "TEXT": ["x"] * 3, **sides}
    found = rows(written(tmp_path / "x.parquet", columns))
    assert [(row["width"], row["height"]) for row in found] == [(None, None), (None, 4.0), (640.0, 480.0)]


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([pa.array(["http://a/"]), pa.array(["http://b/"]), pa.array(["x"])], names=["url", "url", "TEXT"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet has several columns url"):
        rows(str(tmp_path / "x.parquet"))


def test_suffixes_have_any_case_and_what_writers_keep_in_their_folders_is_none(tmp_path):
    for name in (
        "a.PARQUET",
        "y=1/b.Parquet",
        "_c.parquet",
        "_delta_log/1.checkpoint.parquet",
        "y=1/_temporary/d.parquet",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        written(tmp_path / name, RE_LAION)
    assert list(storage.matching(str(tmp_path), ".parquet")) == ["_c.parquet", "a.PARQUET", "y=1/b.Parquet"]


@pytest.mark.parametrize("read", [rows, laion.columns, laion.count])
def test_a_store_that_is_away_is_no_damaged_file(tmp_path, monkeypatch, read):
    """What it holds may be read later: it is told as the store's, which is waited for, and not as the file's."""
    path = written(tmp_path / "part.parquet", RE_LAION)

    @contextmanager
    def away(place):
        raise StoreAway(None, "no answer", place)
        yield

    monkeypatch.setattr(storage, "opened", away)
    with pytest.raises(StoreAway, match="no answer"):
        read(path)


def test_numbers_that_nobody_can_mean_cost_no_other_row(tmp_path):
    """Whole ones beyond 2^53, which float64 has not all; what is not finite passes no threshold."""
    many = {**RE_LAION, "width": pa.array([640, 2**63 - 1], pa.int64()), "punsafe": [float("-inf"), 0.1]}
    path = written(tmp_path / "part.parquet", {**many, "LICENSE": pa.array([float("nan"), 4.0])})
    first, second = rows(path)
    assert (first["width"], second["width"]) == (640.0, float(2**63))
    assert (first["punsafe"], first["licence"]) == (None, None)
