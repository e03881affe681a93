"""What a download says of its losses, and the ways to go on that it names."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from datasets.formats.shards import Receipt
from pipeline.errors import BudgetExceeded
from pipeline.settings.words import parse
from pipeline.steps import download as steps
from pipeline.steps.download import _among, _budget, _Told


@pytest.mark.parametrize(
    ("dropped", "planned", "ways"),
    [
        ({"gone": 1}, 10, None),
        ({"forgotten": 9}, 10, None),  # which nobody wants
        ({"gone": 3}, 10, ["data.download.max_lost=0.3"]),
        ({"dns": 1, "gone": 1}, 3, [None, "data.download.max_lost=0.67"]),
        ({"dns": 10}, 10, [None]),
        ({"gone": 10}, 10, []),
    ],
)
def test_too_many_losses_come_with_the_ways_to_go_on(dropped, planned, ways):
    found = _budget(Counter(dropped), planned, 0.2, {"dns": [(0, "http://a.example/x (no such name)")]})
    assert (found and [override for _, override in found.ways]) == ways
    assert found is None or ("http://a.example/x (no such name)" in str(found) and "data lost" in str(found))


@pytest.mark.parametrize("bounds", [[], ["--until", "download"]])
def test_the_ways_are_commands_of_the_same_words(bounds, monkeypatch):
    from pipeline import __main__ as main

    def refuse(_: object) -> None:
        raise BudgetExceeded("too many", [("again", None), ("without", "data.download.max_lost=0.5")])

    monkeypatch.setattr("pipeline.verbs.run.handle", refuse)
    words = ["run", "conf=stage_c", "root=a b", "data.limit=3", *bounds]
    with pytest.raises(BudgetExceeded) as caught:
        main._handle(parse(words))
    same, end = "python -m pipeline run conf=stage_c 'root=a b' data.limit=3", "".join(f" {word}" for word in bounds)
    assert str(caught.value) == f"too many; again: {same}{end}; without: {same} data.download.max_lost=0.5{end}"


def test_a_task_is_told_of_its_own_rows_that_are_forgotten_and_of_all_hashes():
    rows = pa.Table.from_pylist([{"key": "k", "url": "http://a.example/x", "origin": None}])
    assert _among(frozenset({"k", "other", "a" * 64}))(rows) == {"k", "a" * 64}
    assert _among(frozenset({"http://a.example/./x"}))(rows) == {"http://a.example/x"}  # as it is planned
    assert not _among(frozenset())(rows)


def test_progress_is_told_now_and_then_and_adds_up(monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr("pipeline.steps.download.time.monotonic", lambda: now[0])
    progress = _Told(told.append, 10)
    for moment, count in ((0.1, 3), (2.0, 1), (2.1, 4), (2.2, 2)):
        now[0] = moment
        progress(count)
    assert told == [4, 6]


def receipt(shard: int, **dropped: int) -> Receipt:
    rows = 2 if dropped == {"dns": 2} else 10
    return Receipt(shard, rows, rows - sum(dropped.values()), dropped, {}, 0.0, 1, "here")


@pytest.mark.parametrize(
    ("before", "asked", "answers", "ways"),
    [
        ({}, [{0, 1, 2}], [{0: {}, 1: {"gone": 6}, 2: {"dns": 1}}], None),  # links that are dead, one by one
        ({}, [{0, 1, 2}, {1}], [{0: {}, 1: {"dns": 9}, 2: {"dns": 1}}, {1: {"dns": 1}}], None),  # away for a moment
        ({}, [{0, 1, 2}, {1}], [{0: {}, 1: {"dns": 9}, 2: {}}, {1: {"dns": 9}}], [None, "data.download.max_lost=1.0"]),
        ({0: {}, 1: {"timeout": 10}, 2: {}}, [set(), {1}], [{}, {1: {}}], None),  # by an earlier run
        ({0: {"dns": 1}, 1: {}}, [{2}], [{2: {}}], None),  # few enough: `data retry` is there for these
        ({}, [{0, 1, 2}], [{0: {}, 1: {}, 2: {"dns": 2}}], None),  # a last shard of two rows, whose links are dead
        ({0: {"dns": 5}, 1: {"dns": 5}}, [{2}, {0, 1}], [{2: {"gone": 10}}, {0: {}, 1: {}}], None),
    ],
)
def test_what_an_outage_took_is_asked_for_again_and_never_final(monkeypatch, before, asked, answers, ways):
    calls: list[set[int]] = []
    told: list[str] = []

    def ask(build: object, finished: dict[int, Receipt], wanted: set[int], earlier: object, lost: steps.Lost) -> None:
        for shard, dropped in answers[len(calls)].items():
            finished[shard] = receipt(shard, **dropped)
            for cause in dropped:
                lost[cause].append((shard, f"picture {len(calls)} of {shard}"))
        calls.append(set(wanted))

    monkeypatch.setattr(steps, "_ask", ask)
    metadata = SimpleNamespace(manifest={"rows": 30, "notes": {}})
    build: Any = SimpleNamespace(
        inputs={"metadata": metadata},
        config=SimpleNamespace(
            data=SimpleNamespace(source="laion", shard_rows=10, attempt=1, download=SimpleNamespace(max_lost=0.4))
        ),
        finished_shards=lambda path: {shard: receipt(shard, **dropped) for shard, dropped in before.items()},
        path="images",
        report=SimpleNamespace(warning=told.append, lost=lambda causes: None),
    )
    if ways is None:
        facts = steps.download(build)
        assert [one.shard for one in facts.shards[""]] == [0, 1, 2]
        last = {shard: (place, dropped) for place, answer in enumerate(answers) for shard, dropped in answer.items()}
        named = {f"download: {cause}: picture" for _, dropped in last.values() for cause in dropped}
        examples = [text for text in told if ": picture" in text]  # of what was lost for good, and of nothing else
        assert {text.partition("picture")[0] + "picture" for text in examples} == named
        for shard, (place, _) in last.items():
            assert not any(f"picture {earlier} of {shard}" in text for text in examples for earlier in range(place))
    else:
        with pytest.raises(BudgetExceeded, match=r"most pictures of 1 of 3 shards .* being away: shards 1") as caught:
            steps.download(build)
        assert [override for _, override in caught.value.ways] == ways
    assert calls == asked
