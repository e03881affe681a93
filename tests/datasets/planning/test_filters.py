"""Filters: what each rule rejects and keeps."""

import math

import pyarrow as pa
import pytest

from datasets.config import DataError
from datasets.planning import filters
from datasets.source_settings import FilterConfig
from tests.datasets.planning.planned import laion_row, made


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("min_side", {"HEIGHT": 1023}),
        ("min_side", {"WIDTH": None}),
        ("min_side", {"WIDTH": math.nan}),
        ("max_side", {"WIDTH": 5000}),
        ("max_aspect", {"WIDTH": 3000}),
        ("min_aesthetic", {"AESTHETIC_SCORE": 4.9}),
        ("min_aesthetic", {"AESTHETIC_SCORE": None}),
        ("max_punsafe", {"punsafe": 0.5}),
        ("max_punsafe", {"punsafe": math.nan}),
        ("max_pwatermark", {"pwatermark": 0.9}),
        ("min_similarity", {"similarity": 0.1}),
        ("min_words", {"TEXT": "photograph"}),
        ("max_characters", {"TEXT": "a " * 2000}),
        ("caption", {"TEXT": None}),
        ("caption", {"TEXT": " \x00\u202e\n"}),
        ("url", {"URL": None}),
        ("url", {"URL": "file:///etc/passwd"}),
        ("url", {"URL": "https://user:secret@example.org/x.jpg"}),
        ("url", {"URL": "https://[::1"}),
        ("url", {"URL": "https://example.org:99999999/x.jpg"}),
        ("url", {"URL": "not a url"}),
    ],
)
def test_each_rule_rejects_what_it_names(tmp_path, rule, change):
    result = made(tmp_path, [laion_row(0), laion_row(1, **change)], filters__min_similarity=0.2)
    assert result.rows["url"].to_pylist() == ["https://example.org/0.jpg"]
    assert {reason: count for reason, count in result.rejected.items() if count} == {rule: 1}


def test_a_rule_at_its_bound_keeps_the_row(tmp_path):
    row = laion_row(0, WIDTH=2048, HEIGHT=1024, AESTHETIC_SCORE=5.0, punsafe=0.1, pwatermark=0.5)
    spotless = laion_row(1, punsafe=0.0, pwatermark=0.0)  # zero is a value, not a missing one
    assert made(tmp_path, [row, spotless]).rows.num_rows == 2


def test_a_rule_that_is_off_needs_no_column(tmp_path):
    row = laion_row(0)
    del row["punsafe"]
    with pytest.raises(DataError, match=r"data\.metadata.*no column punsafe"):
        made(tmp_path, [row])
    assert made(tmp_path, [row], filters__max_punsafe=None).rows["punsafe"].to_pylist() == [None]


def test_a_row_is_charged_to_one_rule_only():
    table = pa.table({name: [1.0, 900.0] for name in ("width", "height", "aesthetic")})
    config = FilterConfig(min_side=512, min_aesthetic=1000)
    kept, rejected = filters.accept(table, filters.picture_rules(config))
    assert kept.num_rows == 0
    assert rejected == {"min_side": 1, "min_aesthetic": 1}
