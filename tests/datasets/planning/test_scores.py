"""Scores of pictures from tables beside the metadata: joined by URL, what has none counted, what is none refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets.config import DataError
from datasets.left_out import LeftOut
from datasets.planning import scores
from tests.datasets.sources.published import CAPTIONS, NAMES, laion, planned


def rows_of(urls: list[str | None]) -> pa.Table:
    return pa.table(
        {"url": pa.array([url and url.encode() for url in urls], pa.large_binary()), "aesthetic": [1.0] * len(urls)}
    )


def table_of(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_scores_are_joined_by_url_and_what_has_none_is_counted(tmp_path):
    path = table_of(
        tmp_path / "s.parquet",
        URL=["http://a/", "http://b/", "http://b/", "http://c/", "http://d/", None],
        AESTHETIC_SCORE=[5.0, 6.0, 7.0, None, float("nan"), 8.0],
    )
    unmatched = LeftOut()
    tables = [rows_of(["http://b/", None, "http://a/ "]), rows_of(["http://c/", "http://d/", "http://e/"])]
    joined = pa.concat_tables(scores.joined(tables, path, unmatched))
    assert dict(zip(joined["url"].to_pylist(), joined["aesthetic"].to_pylist(), strict=True)) == {
        b"http://b/": 6.0,
        b"http://a/ ": 5.0,
    }
    assert unmatched.counts == {"no_score": 4}


def test_a_large_table_of_scores_is_joined_as_a_dictionary_would(tmp_path):
    generator = np.random.default_rng(0)
    known = {f"http://x/{number}": float(score) for number, score in enumerate(generator.random(20_000))}
    path = table_of(tmp_path / "s.parquet", URL=list(known), AESTHETIC_SCORE=list(known.values()))
    asked: list[str | None] = [f"http://x/{number}" for number in generator.integers(0, 40_000, 5_000)]
    unmatched = LeftOut()
    joined = pa.concat_tables(scores.joined([rows_of(asked)], path, unmatched))
    expected = [known[url] for url in asked if url in known]
    assert joined["aesthetic"].to_pylist() == expected
    assert unmatched.counts["no_score"] == len(asked) - len(expected) > 0


def test_scores_replace_the_column_and_feed_the_filter(tmp_path):
    data = laion(tmp_path)
    path = table_of(
        tmp_path / "scores.parquet",
        URL=[f"http://images.cocodataset.org/{name}.jpg" for name in NAMES[:4]],
        AESTHETIC_SCORE=[5.0, 6.0, 4.9, 7.0],
    )
    rows, rejected = planned(data)
    assert data.scores == path
    assert dict(zip(rows["caption"].to_pylist(), rows["aesthetic"].to_pylist(), strict=True)) == {
        CAPTIONS[0]: 5.0,
        CAPTIONS[1]: 6.0,
        CAPTIONS[3]: 7.0,
    }
    assert rejected == {"min_aesthetic": 1, "no_score": 1}


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value)


def test_scores_that_cannot_be_joined_are_refused(tmp_path):
    data = laion(tmp_path)
    table_of(tmp_path / "scores.parquet", URL=["http://a/"], score=[5.0])
    told = refused(lambda: planned(data))
    assert "data.scores: " in told
    assert "no column AESTHETIC_SCORE, only URL, score; give files with URL and AESTHETIC_SCORE" in told
    table_of(tmp_path / "scores.parquet", URL=["http://a/"], AESTHETIC_SCORE=pa.array([None], pa.float64()))
    assert refused(lambda: planned(data)).endswith("scores.parquet holds no scores")
    (tmp_path / "scores.parquet").unlink()
    assert refused(lambda: planned(data)).startswith("data.scores: there is no Parquet file at ")
    without = data.model_copy(update={"scores": None})
    assert "no column AESTHETIC_SCORE" in refused(lambda: planned(without))
    assert "data.scores brings" in refused(lambda: planned(without))


def test_unmatched_rows_alone_are_no_plan(tmp_path):
    data = laion(tmp_path)
    table_of(tmp_path / "scores.parquet", URL=["http://a/"], AESTHETIC_SCORE=[5.0])
    assert "none of 5 rows passes: no_score removed 5" in refused(lambda: planned(data))
