"""Win rates and how sure they are, against closed forms and against scipy."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binomtest

from stages.scoring.statistics import sign_test, wilson_interval, win_rate, win_rates_by

# Few distinct values, so that ties are frequent.
SCORES = arrays(np.float32, st.shared(st.integers(1, 40), key="n"), elements=st.sampled_from([20.0, 20.5, 21.0]))


def _scores(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("share", "n", "low", "high"),
    [(0.644, 30_000, 0.6386, 0.6494), (0.700, 5_000, 0.6871, 0.7125), (0.746, 1_633, 0.7242, 0.7664)],
)
def test_wilson_interval_of_the_papers_win_rates(share: float, n: int, low: float, high: float) -> None:
    assert wilson_interval(round(share * n), n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_agrees_with_scipy(case: tuple[int, int]) -> None:
    wins, n = case
    expected = binomtest(wins, n).proportion_ci(method="wilson")
    assert wilson_interval(wins, n) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_win_rate_by_hand() -> None:
    result = win_rate(_scores(3, 2, 1, 5), _scores(1, 2, 3, 4))
    assert (result.rate, result.ties, result.n) == (0.625, 1, 4)  # two wins, one tie, one loss
    assert result.low < 0.625 < result.high


@given(st.integers(0, 300), st.integers(0, 300))
def test_the_sign_test_is_scipys(wins: int, losses: int) -> None:
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_the_sign_test_at_the_papers_size() -> None:
    assert sign_test(15_000, 15_000) == 1.0
    assert sign_test(15_200, 14_800) == pytest.approx(binomtest(15_200, 30_000).pvalue, rel=1e-8)
    assert 0 <= sign_test(23_430, 6_570) < 1e-300  # SD 1.4 on COCO


def test_an_injected_truth_comes_out_whole_and_by_category() -> None:
    theirs = np.zeros(100, np.float32)
    ours = np.where(np.arange(100) < 70, 1, -1).astype(np.float32)
    assert (win_rate(ours, theirs).rate, win_rate(theirs, ours).rate) == (0.7, 0.3)  # sides matter
    assert win_rate(ours, theirs).margin == pytest.approx(0.4)
    groups = ["first" if place < 70 else "last" if place < 90 else None for place in range(100)]
    found = win_rates_by(groups, ours, theirs)
    assert {name: (one.rate, one.n) for name, one in found.items()} == {"first": (1.0, 70), "last": (0.0, 20)}


@given(SCORES, SCORES)
def test_win_rates_of_both_sides_add_up_to_one(a: np.ndarray, b: np.ndarray) -> None:
    ours, theirs = win_rate(a, b), win_rate(b, a)
    assert ours.rate + theirs.rate == pytest.approx(1)
    assert ours.low + theirs.high == pytest.approx(1)
    assert ours.ties == theirs.ties
    assert ours.margin == pytest.approx(-theirs.margin)
    assert ours.p == theirs.p


@given(SCORES, SCORES, st.randoms())
def test_win_rate_ignores_order_and_offset(a: np.ndarray, b: np.ndarray, random: Random) -> None:
    order = list(range(len(a)))
    random.shuffle(order)
    moved, here = win_rate(a[order] + 2, b[order] + 2), win_rate(a, b)
    assert replace(moved, margin=0.0) == replace(here, margin=0.0)
    assert moved.margin == pytest.approx(here.margin)


def test_half_precision_scores_are_refused() -> None:
    close = _scores(21.03, 21.05)
    assert win_rate(close, close - np.float32(0.005)).rate == 1.0
    with pytest.raises(AssertionError, match="float16"):
        win_rate(close.astype(np.float16), close.astype(np.float16))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, 2.0], [1.0], "same prompts"),
        ([], [], "same prompts"),
        ([1.0, float("nan")], [1.0, 1.0], "finite"),
    ],
)
def test_win_rate_refuses_what_cannot_be_compared(a: list[float], b: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        win_rate(_scores(*a), _scores(*b))
