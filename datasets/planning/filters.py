"""Filters on metadata: pure functions of tables, before a single picture is fetched.

A rule is named after its key in `data.filters` or in a view, and compares one measure of a row with that key's value. A
row is charged to the first rule that it fails, so the counts add up.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from datasets.left_out import LeftOut
from datasets.source_settings import FilterConfig, Thresholds


@dataclass(frozen=True)
class Rule:
    """A reason to reject a row: the columns it looks at, what a row must fulfil to stay, and that in words."""

    name: str
    columns: tuple[str, ...]
    keep: pc.Expression
    told: str


Measures = Mapping[str, tuple[tuple[str, ...], pc.Expression]]  # by rule: columns, what is compared

_SIDES = ("width", "height")
_SHORTER = pc.min_element_wise(pc.field("width"), pc.field("height"), skip_nulls=False)
_LONGER = pc.max_element_wise(pc.field("width"), pc.field("height"), skip_nulls=False)
_WORDS = pc.list_value_length(pc.utf8_split_whitespace(pc.field("caption")))

_OF_PICTURES: Measures = {
    "min_side": (_SIDES, _SHORTER),
    "max_side": (_SIDES, _LONGER),
    "max_aspect": (_SIDES, _LONGER / _SHORTER),
    "min_aesthetic": (("aesthetic",), pc.field("aesthetic")),
    "max_punsafe": (("punsafe",), pc.field("punsafe")),
    "max_pwatermark": (("pwatermark",), pc.field("pwatermark")),
    "min_similarity": (("similarity",), pc.field("similarity")),
}
_OF_CAPTIONS: Measures = {
    "min_words": (("caption",), _WORDS),
    "max_characters": (("caption",), pc.utf8_length(pc.field("caption"))),
}


def sized() -> Rule:
    """The rule of plans with buckets, which need every row's width and height."""
    return Rule("no_size", _SIDES, _SHORTER > 0, "its size is not known, which shapes by buckets need")


def picture_rules(config: Thresholds) -> list[Rule]:
    """Rules on sizes and scores that are switched on, for columns of floating-point numbers."""
    return _rules(config, _OF_PICTURES)


def caption_rules(config: FilterConfig) -> list[Rule]:
    """Rules on cleaned captions that are switched on."""
    return _rules(config, _OF_CAPTIONS)


def caps(config: FilterConfig, by_url: bool = True) -> list[tuple[str, tuple[str, int]]]:
    """Rules that take all rows together: name, column, and how many rows may have the same text in it.

    Without `by_url`, URLs are not counted: rows with the same one are a picture's, which is fetched once.
    """
    columns = {"max_same_caption": "caption"} | ({"max_same_url": "url"} if by_url else {})
    limits = [(name, column, getattr(config, name)) for name, column in columns.items()]
    return [(name, (column, limit)) for name, column, limit in limits if limit is not None]


def accept(rows: pa.Table, rules: Sequence[Rule], left_out: LeftOut | None = None) -> tuple[pa.Table, dict[str, int]]:
    """The rows that fulfil every rule, and how many each rule rejected; a null fulfils none.

    With `left_out`, rejected rows are counted there too, and named by their `url`. NaN must come as null: Arrow's
    smaller one of NaN and 900 is 900.
    """
    rejected = {}
    for rule in rules:
        kept = rows.filter(rule.keep)
        rejected[rule.name] = rows.num_rows - kept.num_rows
        if left_out and rejected[rule.name]:
            gone = rows.filter(pc.coalesce(~rule.keep, pc.scalar(True)))
            left_out.add_all(rule.name, urls(gone), gone.num_rows, rule.told)
        rows = kept
    return rows, rejected


def urls(rows: pa.Table) -> Iterator[str]:
    """The URLs of rows, as they were read or normalised; decoded one by one, as they are asked for."""
    for url in rows["url"]:
        value = url.as_py()
        yield value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")


def _rules(config: Thresholds, measures: Measures) -> list[Rule]:
    rules = []
    for name, (columns, measure) in measures.items():
        bound = getattr(config, name)
        if bound is not None:
            keep = measure >= bound if name.startswith("min_") else measure <= bound
            told = f"its {' and '.join(columns)} {'do' if columns[1:] else 'does'} not fulfil {name}={bound:g}"
            rules.append(Rule(name, columns, keep, told))
    return rules
