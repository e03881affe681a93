"""Picture metrics and the statistics around them, in plain numpy: 8-bit pictures or scores in, floats out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THUMBNAIL = 32  # side in pixels at which retrieval compares pictures


@dataclass(frozen=True)
class WinRate:
    """How often A beats B: a share with its 95 % interval, all in [0, 1]; `ties` and `n` are comparisons."""

    rate: float
    low: float
    high: float
    ties: int
    n: int


def psnr(generated: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture in dB; infinite where the two are equal.

    Args:
        generated, originals: uint8 `[N, H, W, 3]`, row by row the same picture.

    Returns:
        float64 `[N]`: 10 log10(1 / MSE) with RGB in [0, 1].
    """
    assert generated.shape == originals.shape, f"{generated.shape} against {originals.shape}"
    assert generated.dtype == originals.dtype == np.uint8
    difference = (generated.astype(np.float64) - originals.astype(np.float64)) / 255
    mean_square = np.square(difference).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        decibel: np.ndarray = -10 * np.log10(mean_square)
    return decibel


def retrieval_top1(generated: Sequence[np.ndarray], originals: Sequence[np.ndarray]) -> float:
    """Share in [0, 1] of the generated pictures that are nearer to their own original than to any other.

    Distance is L2 over RGB in [0, 1] after area-down-sampling to 32x32. A tie with another original is no
    hit, so a model that draws one picture for every caption cannot score by luck. Chance is 1/N.

    Args:
        generated, originals: N uint8 pictures `[H, W, 3]` each, H and W multiples of 32; `generated[i]` was
            made for the caption of `originals[i]`.
    """
    assert len(generated) == len(originals) > 0, f"{len(generated)} generated, {len(originals)} originals"
    targets = np.stack([_thumbnail(picture) for picture in originals])
    hits = 0
    for row, picture in enumerate(generated):
        distances = np.square(targets - _thumbnail(picture)).sum(axis=(1, 2, 3))
        hits += bool((distances[row] < np.delete(distances, row)).all())
    return hits / len(generated)


def wilson_interval(wins: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share; `wins` may hold half points, z = 1.96 gives 95 %."""
    assert n > 0
    assert 0 <= wins <= n, f"{wins} wins of {n}"
    share = wins / n
    shrink = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


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
    ties = int((scores_a == scores_b).sum())
    wins = int((scores_a > scores_b).sum()) + ties / 2
    return WinRate(wins / n, *wilson_interval(wins, n), ties=ties, n=n)


def _thumbnail(picture: np.ndarray) -> np.ndarray:
    """float64 `[32, 32, 3]` in [0, 1]: each pixel the mean of the block it stands for."""
    height, width, channels = picture.shape
    assert picture.dtype == np.uint8
    assert height % THUMBNAIL == width % THUMBNAIL == 0, f"{height}x{width} is no multiple of {THUMBNAIL}"
    blocks = picture.reshape(THUMBNAIL, height // THUMBNAIL, THUMBNAIL, width // THUMBNAIL, channels)
    thumbnail: np.ndarray = blocks.mean(axis=(1, 3), dtype=np.float64) / 255
    return thumbnail
