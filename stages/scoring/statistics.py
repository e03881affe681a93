"""Which of two models is better, and how sure that is: shares with intervals, in plain numpy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class WinRate:
    """How often A beats B: a share with its 95 % interval (Wilson), all in [0, 1]; `ties` and `n` are comparisons.

    `margin` is the mean of A's score less B's; `p` is that of the exact sign test, two-sided, without the ties: how
    often chance alone would give a share as far from a half.
    """

    rate: float
    low: float
    high: float
    ties: int
    n: int
    margin: float
    p: float


def wilson_interval(wins: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share; `wins` may hold half points, z = 1.96 gives 95 %."""
    assert n > 0
    assert 0 <= wins <= n, f"{wins} wins of {n}"
    share = wins / n
    shrink = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def sign_test(wins: int, losses: int) -> float:
    """p of the exact two-sided sign test: twice the probability of a fair coin's tail, at most 1."""
    n, tail = wins + losses, min(wins, losses)
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(tail + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def win_rate(scores_a: np.ndarray, scores_b: np.ndarray) -> WinRate:
    """Share of prompts for which A's picture scores strictly higher than B's; a tie counts half.

    This is the "percentage of images preferred" of the paper's Table 1, which says nothing about ties. Half
    precision is refused: scores lie near 21, where bfloat16 has steps of 0.125 and makes false ties.

    Args:
        scores_a, scores_b: float32 or float64 `[N]`, entry i of both for prompt i.

    Raises:
        ValueError: the two differ in length, are empty, or hold a value that is not finite.
    """
    for scores in (scores_a, scores_b):
        assert scores.dtype in (np.float32, np.float64), f"scores are {scores.dtype}"
    if scores_a.shape != scores_b.shape or scores_a.ndim != 1 or not len(scores_a):
        raise ValueError(
            f"a win rate needs a score per prompt on both sides, not {scores_a.shape} and {scores_b.shape}; "
            "score the same prompts with both models"
        )
    if not (np.isfinite(scores_a).all() and np.isfinite(scores_b).all()):
        raise ValueError("a win rate needs finite scores; look for broken pictures or weights on either side")
    n = len(scores_a)
    wins, ties = int((scores_a > scores_b).sum()), int((scores_a == scores_b).sum())
    points = wins + ties / 2
    margin = float((scores_a.astype(np.float64) - scores_b).mean())
    return WinRate(points / n, *wilson_interval(points, n), ties, n, margin, sign_test(wins, n - wins - ties))


def win_rates_by(groups: Sequence[str | None], scores_a: np.ndarray, scores_b: np.ndarray) -> dict[str, WinRate]:
    """The win rate of each group of prompts, by name in order; those of none are left out."""
    names, values = sorted({group for group in groups if group}), np.array([group or "" for group in groups])
    return {name: win_rate(scores_a[values == name], scores_b[values == name]) for name in names}
