"""Rows that are pictures with all their captions, made of rows that are captions."""

from collections.abc import Hashable, Iterable

import pyarrow as pa
import pyarrow.compute as pc

WHOSE = "whose"  # the sources of `captions`


def firsts(values: Iterable[Hashable]) -> list[int]:
    """Places where each value comes for the first time, ascending."""
    seen: dict[Hashable, int] = {}
    for place, value in enumerate(values):
        seen.setdefault(value, place)
    return list(seen.values())


def grouped(rows: pa.Table) -> pa.Table:
    """A row for each key, in the order of their first rows, which give all values; `captions` has those of all rows.

    Which row is first is a matter of the order in which the source is read, as it is among copies of a row.
    """
    groups = _places(rows)
    heads = rows.take(pa.array([group[0] for group in groups.values()], pa.int64()))
    for name, column in {"captions": "caption", WHOSE: "source"}.items():
        values = rows[column].to_pylist()
        lists = [[values[place] for place in group] for group in groups.values()]
        heads = heads.append_column(name, pa.array(lists, pa.list_(pa.string())))
    return heads


def a_row_each(rows: pa.Table) -> pa.Table:
    """Planned rows by `key` and `caption`, of a picture with all its captions a row for each."""
    if "captions" not in rows.column_names:
        return rows.select(["key", "caption"])
    lists = rows["captions"].combine_chunks()
    keys = rows["key"].combine_chunks().take(pc.list_parent_indices(lists))
    return pa.table({"key": keys, "caption": pc.list_flatten(lists)})


def by_source(rows: pa.Table) -> dict[str, int]:
    """How many rows, or where they are pictures captions, come from each source."""
    names = pc.list_flatten(rows[WHOSE]) if WHOSE in rows.column_names else rows["source"]
    return {item["values"]: item["counts"] for item in pc.value_counts(names).to_pylist()}


def _places(rows: pa.Table) -> dict[str, list[int]]:
    """Places of each key's rows, in their order."""
    found: dict[str, list[int]] = {}
    for place, key in enumerate(rows["key"].to_pylist()):
        found.setdefault(key, []).append(place)
    return found
