"""Filters on metadata: pure functions of a table with LAION's columns, before a single picture is fetched."""

import pyarrow as pa
import pyarrow.compute as pc

from datasets.config import FilterConfig


def accept(rows: pa.Table, filters: FilterConfig) -> tuple[pa.Table, dict[str, int]]:
    """Keep the rows that pass every filter; count the others by the first filter that rejects them.

    `rows` has the columns caption, width, height, similarity, punsafe, pwatermark, aesthetic. Null and NaN fail a
    threshold on their column.
    """
    rejected: dict[str, int] = {}
    for reason, passes in _tests(rows, filters).items():
        if passes is None:
            continue
        kept = pc.fill_null(passes, False)
        rejected[reason] = 0
        rows = rows.append_column(reason, kept)
    for reason in rejected:
        before = rows.num_rows
        rows = rows.filter(rows[reason])
        rejected[reason] = before - rows.num_rows
    return rows.drop_columns(list(rejected)), rejected


def _tests(rows: pa.Table, filters: FilterConfig) -> dict[str, pa.ChunkedArray | None]:
    """For each filter a column of booleans (null where the value is missing), or None where it is switched off."""
    shorter = pc.min_element_wise(rows["width"], rows["height"], skip_nulls=False)
    longer = pc.max_element_wise(rows["width"], rows["height"], skip_nulls=False)
    caption = rows["caption"]

    def at_least(column: pa.ChunkedArray, least: float | None) -> pa.ChunkedArray | None:
        return None if least is None else pc.greater_equal(column, least)

    def at_most(column: pa.ChunkedArray, most: float | None) -> pa.ChunkedArray | None:
        return None if most is None else pc.less_equal(column, most)

    return {
        "min_side": at_least(shorter, filters.min_side),
        "max_side": at_most(longer, filters.max_side),
        "max_aspect": at_most(pc.divide(pc.cast(longer, pa.float64()), shorter), filters.max_aspect),
        "min_aesthetic": at_least(rows["aesthetic"], filters.min_aesthetic),
        "max_punsafe": at_most(rows["punsafe"], filters.max_punsafe),
        "max_pwatermark": at_most(rows["pwatermark"], filters.max_pwatermark),
        "min_similarity": at_least(rows["similarity"], filters.min_similarity),
        "min_words": at_least(pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(caption))), filters.min_words),
        "max_characters": at_most(pc.utf8_length(caption), filters.max_characters),
    }
