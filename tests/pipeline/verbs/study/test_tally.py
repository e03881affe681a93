"""The count: shares that add up, the paper's figures from the paper's counts, cut-offs by rater, controls apart."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.verbs.study.ballots import Ballot
from pipeline.verbs.study.pairs import CONTROL, Key, Pair
from pipeline.verbs.study.tally import ALL_RATERS, PASSED, Preference, tallied

PAIRS = {f"p{n}": Pair("parti" if n % 3 else "coco", "xy"[n % 2], str(n), "ab"[n % 2]) for n in range(60)}
KEY = Key("s", PAIRS | {"c": Pair("coco", CONTROL, "60", CONTROL)})


def lines(ballots):
    return {(one.rival, one.set, one.by): one for one in tallied(ballots, Counter(), KEY).preferences}


@given(
    st.lists(
        st.builds(
            Ballot,
            rater=st.sampled_from("uvw"),
            pair=st.sampled_from([*KEY.pairs]),
            left=st.sampled_from("ab"),
            chosen=st.sampled_from(["a", "b", "neither"]),
        ),
        unique_by=lambda one: (one.rater, one.pair),
    )
)
def test_every_answer_is_counted_once_and_parts_add_up(ballots):
    found = tallied(ballots, Counter(), KEY)
    everything = [one for one in found.preferences if one.by == ALL_RATERS]
    assert sum(one.n for one in everything if one.set == "all") == found.answers
    assert sum(one.n for one in everything if one.set != "all") == found.answers
    assert found.answers + found.controls == len(ballots)
    for name in ("ours", "theirs", "neither"):
        assert sum(getattr(one, name) for one in everything if one.set == "all") == sum(
            getattr(one, name) for one in everything if one.set != "all"
        )
    assert all(
        sum(one.share(name)["share"] for name in ("ours", "theirs", "neither")) == pytest.approx(1)
        for one in everything
    )


def test_sides_are_turned_back_by_the_key():
    ballots = [Ballot("r", name, "a", pair.ours) for name, pair in PAIRS.items()]
    assert all(one.ours == one.n for one in lines(ballots).values())
    turned = [Ballot("r", name, "a", {"a": "b", "b": "a"}[pair.ours]) for name, pair in PAIRS.items()]
    assert all(one.theirs == one.n for one in lines(turned).values())


def test_raters_of_few_answers_are_in_the_first_lines_alone():
    names = [*PAIRS]
    ballots = [Ballot("few", name, "a", "a") for name in names[:29]]
    ballots += [Ballot("some", name, "a", "a") for name in names[:30]]
    ballots += [Ballot("many", name, "a", "a") for name in names[:51]]
    ballots += [
        Ballot("few", "c", "a", "neither"),
        Ballot("many", "c", "a", "b"),
    ]  # a control makes no thirtieth answer
    found = lines(ballots)
    both = {by: found["x", "all", by].raters for by in {one.by for one in found.values()}}
    assert both == {ALL_RATERS: 3, "raters of 30 answers or more": 2, "raters of 51 answers or more": 1, PASSED: 1}
    count = tallied(ballots, Counter(), KEY)
    assert (count.raters, count.controls, count.controls_failed) == (3, 2, 1)


def test_the_papers_counts_give_the_papers_figures():
    """Its study against SD 2.1 on Parti's prompts: 3,343 answers, 49.5 / 32.8 / 17.7 %; 60.1 % of the decided."""
    one = Preference("sd21", "parti", ALL_RATERS, 90, 1655, 1096, 592)
    assert [round(100 * one.share(name)["share"], 1) for name in ("ours", "theirs", "neither")] == [49.5, 32.8, 17.7]
    decided = one.decided
    assert decided is not None
    assert (decided["share"], decided["low"], decided["high"]) == pytest.approx((0.601, 0.583, 0.620), abs=1e-3)
    assert decided["p"] < 1e-20


def test_where_nobody_prefers_anything_nothing_is_decided():
    one = Preference("x", "all", ALL_RATERS, 1, 0, 0, 5)
    assert one.decided is None
    assert one.share("ours")["high"] > 0.3
