"""What a download says of its losses, and the ways to go on that it names."""

from collections import Counter

import pytest

from pipeline.errors import BudgetExceeded
from pipeline.settings.words import parse
from pipeline.steps.download import _budget, _Told


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
    found = _budget(Counter(dropped), planned, 0.2, {"dns": ["http://a.example/x (no such name)"]})
    assert (found and [override for _, override in found.ways]) == ways
    assert found is None or ("http://a.example/x (no such name)" in str(found) and "data lost" in str(found))


def test_the_ways_are_commands_of_the_same_words(monkeypatch):
    from pipeline import __main__ as main

    def refuse(_: object) -> None:
        raise BudgetExceeded("too many", [("again", None), ("without", "data.download.max_lost=0.5")])

    monkeypatch.setattr("pipeline.verbs.run.handle", refuse)
    words = ["run", "conf=stage_c", "root=a b", "data.limit=3"]
    with pytest.raises(BudgetExceeded) as caught:
        main._handle(parse(words))
    same = "python -m pipeline run conf=stage_c 'root=a b' data.limit=3"
    assert str(caught.value) == f"too many; again: {same}; without: {same} data.download.max_lost=0.5"


def test_progress_is_told_now_and_then_and_adds_up(monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr("pipeline.steps.download.time.monotonic", lambda: now[0])
    progress = _Told(told.append, 10)
    for moment, count in ((0.1, 3), (2.0, 1), (2.1, 4), (2.2, 2)):
        now[0] = moment
        progress(count)
    assert told == [4, 6]
