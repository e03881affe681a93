"""What is held out: pictures, with every row that shows one of them."""

from collections.abc import Iterator
from itertools import combinations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.formats import shards
from datasets.formats.shards import INDEX
from datasets.planning import plan
from datasets.planning.plan import key_of
from datasets.reading import holdout
from datasets.reading.views import View

Row = tuple[str, str, str | None]


def row(url: int, caption: int, body: int | None = None) -> Row:
    return key_of(f"http://x.invalid/{url}", str(caption)), f"http://x.invalid/{url}", body and f"{body:064x}"


def split(rows: list[Row], count: int = 3) -> list[list[Row]]:
    return [rows[start::count] for start in range(count)]


def held(view: View, parts: list[list[Row]]) -> set[str]:
    return {parts[shard][place][0] for shard in range(len(parts)) for place in view.places(shard)}


def holding(rows: list[Row], share: float, **others: object) -> set[str]:
    parts = split(rows)
    return held(holdout.hold_out(enumerate(parts), share, **others), parts)  # type: ignore[arg-type]


def groups(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """As the table of duplicates has them: each points to one that is kept."""
    return dict(pairs) | {kept: kept for _, kept in pairs}


@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 4), st.none() | st.integers(1, 9)), unique_by=lambda r: r[:2]
    ),
    st.floats(0, 0.9),
    st.randoms(use_true_random=False),
)
def test_no_training_sees_a_picture_that_is_held_out_under_any_caption_url_or_copy(found, share, random_):
    rows = [row(*one) for one in found]
    keys = [key for key, *_ in rows]
    pairs = [(key, kept) for kept, key in combinations(keys, 2) if random_.random() < 0.05 and key != kept]
    alike = groups([(key, kept) for key, kept in dict(pairs).items() if kept not in dict(pairs)])
    out = holding(rows, share, alike=alike)
    names = {key: {url, body or url, alike.get(key, key)} for key, url, body in rows}
    shown = set().union(*(names[key] for key in out))
    assert all(shown.isdisjoint(names[key]) for key in keys if key not in out)
    assert {key for key, url, _ in rows if holdout._place(url) < share} <= out
    random_.shuffle(rows)
    assert holding(rows, share, alike=alike) == out  # in whatever order and shard they lie
    assert out <= holding(rows, min(0.95, share + 0.1), alike=alike)


def test_five_captions_a_picture_leave_no_caption_of_a_held_out_one():
    rows = [row(url, caption, 1000 + url) for url in range(100) for caption in range(5)]
    out = holding(rows, 0.1)
    urls = {url for key, url, _ in rows if key in out}
    assert len(out) == 5 * len(urls)
    assert 3 <= len(urls) <= 20
    assert urls == {url for _, url, _ in rows if holdout._place(url) < 0.1}  # the same in every data set


def test_a_chain_of_copies_goes_together():
    """One URL's body is another's, whose look is that of a third."""
    chain = [row(1, 0, 7), row(2, 0, 7), row(2, 1, 8), row(3, 0, 8), row(4, 0, 9)]
    alike = groups([(chain[4][0], chain[3][0])])
    first = chain[0][0]
    assert holding(chain, 0.0, named={first}, alike=alike) == {key for key, *_ in chain}
    assert holding(chain, 0.0, named={first}) == {key for key, *_ in chain[:4]}
    assert holding(chain, 0.0) == set()


def test_shares_are_as_asked():
    rows = [row(url, 0) for url in range(20_000)]
    for share in (0.01, 0.25):
        assert len(holding(rows, share)) == pytest.approx(20_000 * share, rel=0.2)


def test_rows_are_those_that_are_stored_with_what_the_server_sent():
    planned = [(row(n, 0)[:2]) for n in range(4)]
    table = pa.Table.from_pylist([{"key": key, "url": url} for key, url in planned], schema=plan.SCHEMA)
    fates = [(2, "ok", "c" * 64), (0, "gone", None), (3, "ok", None)]

    def lines() -> Iterator[dict[str, object]]:
        for n, status, body in fates:
            yield dict.fromkeys(INDEX.names) | {"key": row(n, 0)[0], "status": status, "sha256": body}

    index = shards.table_bytes(list(lines()), INDEX)
    assert holdout.rows_of(table, index) == [(*row(2, 0)[:2], "c" * 64), (*row(3, 0)[:2], None)]
