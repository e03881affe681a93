"""Picture metrics and their statistics, against closed forms and against scipy."""

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.stats import binomtest

from stages.scoring.metrics import psnr, retrieval_top1, wilson_interval, win_rate

# Few distinct values, so that ties are frequent.
SCORES = arrays(np.float32, st.shared(st.integers(1, 40), key="n"), elements=st.sampled_from([20.0, 20.5, 21.0]))


def _pictures(n: int, side: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def _scores(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_psnr_of_a_constant_offset() -> None:
    dark = np.full((2, 8, 8, 3), 100, np.uint8)
    bright = np.stack([dark[0], dark[1] + 51])  # 51 of 255 is a difference of 0.2, so an MSE of 0.04
    assert psnr(bright, dark) == pytest.approx([np.inf, 13.9794], abs=1e-4)


def test_retrieval_finds_noisy_copies_at_another_size() -> None:
    originals = _pictures(16)
    noisy = np.clip(originals.astype(int) + _pictures(16, seed=1) // 8, 0, 255).astype(np.uint8)
    larger = noisy.repeat(2, axis=1).repeat(2, axis=2)
    assert retrieval_top1(larger, originals) == 1.0
    assert retrieval_top1(np.roll(larger, 1, axis=0), originals) == 0.0


def test_retrieval_counts_by_share() -> None:
    originals = _pictures(4)
    generated = originals[[0, 1, 3, 2]]
    assert retrieval_top1(generated, originals) == 0.5


def test_retrieval_gives_nothing_for_one_picture_that_fits_all() -> None:
    grey = np.full((4, 32, 32, 3), 128, np.uint8)
    assert retrieval_top1(grey, grey) == 0.0


def test_retrieval_down_samples_by_area() -> None:
    """A one-pixel checkerboard is grey once averaged, though each of its pixels is black or white."""
    checkerboard = np.indices((64, 64)).sum(axis=0) % 2 * 255
    board = np.repeat(checkerboard[..., None], 3, axis=-1).astype(np.uint8)
    grey, white = np.full((64, 64, 3), 120, np.uint8), np.full((64, 64, 3), 255, np.uint8)
    assert retrieval_top1([board, white], [grey, white]) == 1.0


def test_retrieval_agrees_with_pillow_box_filter() -> None:
    """An independent recomputation, as a reader of the written PNGs would do it."""
    originals, generated = _pictures(24, side=128, seed=3), _pictures(24, side=128, seed=4)
    generated[::2] = originals[::2] // 2 + generated[::2] // 2

    def small(picture: np.ndarray) -> np.ndarray:
        channels = [
            Image.fromarray(picture[..., c].astype(np.float32)).resize((32, 32), Image.Resampling.BOX) for c in range(3)
        ]
        return np.stack([np.asarray(channel) for channel in channels]) / 255

    table = [[np.linalg.norm(small(g) - small(o)) for o in originals] for g in generated]
    expected = np.mean(np.argmin(table, axis=1) == np.arange(24))
    assert retrieval_top1(generated, originals) == pytest.approx(expected)
    assert 0.5 <= expected < 1


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


@given(SCORES, SCORES)
def test_win_rates_of_both_sides_add_up_to_one(a: np.ndarray, b: np.ndarray) -> None:
    ours, theirs = win_rate(a, b), win_rate(b, a)
    assert ours.rate + theirs.rate == pytest.approx(1)
    assert ours.low + theirs.high == pytest.approx(1)
    assert ours.ties == theirs.ties


@given(SCORES, SCORES, st.randoms())
def test_win_rate_ignores_order_and_offset(a: np.ndarray, b: np.ndarray, random: Random) -> None:
    order = list(range(len(a)))
    random.shuffle(order)
    assert win_rate(a[order] + 2, b[order] + 2) == win_rate(a, b)


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
