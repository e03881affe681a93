"""Picture metrics, against closed forms and against scipy."""

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from stages.scoring.metrics import psnr, retrieved, ssim, thumbnail


def _pictures(n: int, side: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def retrieval_top1(generated: np.ndarray | list[np.ndarray], originals: np.ndarray | list[np.ndarray]) -> float:
    """As the step `evaluate` has it."""
    return float(retrieved(*([thumbnail(picture) for picture in side] for side in (generated, originals))).mean())


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


def test_more_originals_than_pictures_make_it_harder() -> None:
    originals = _pictures(6)
    small = [thumbnail(picture) for picture in originals]
    assert retrieved(small[:2], small).tolist() == [True, True]
    assert retrieved(small[:2], [*small[:2], small[0]]).tolist() == [False, True]  # another one fits as well


def test_ssim_of_equal_and_of_flat_pictures() -> None:
    noise, (a, b) = _pictures(2), (100 / 255, 151 / 255)
    assert ssim(noise, noise) == pytest.approx([1, 1])
    flat = np.full((1, 16, 16, 3), 100, np.uint8)
    assert ssim(flat + 51, flat) == pytest.approx([(2 * a * b + 1e-4) / (a * a + b * b + 1e-4)])


def test_ssim_agrees_with_scipys_gaussian_filter() -> None:
    ours, theirs = _pictures(1, side=32, seed=1), _pictures(1, side=32, seed=2)
    theirs[:, :16] = ours[:, :16]

    def blur(picture: np.ndarray) -> np.ndarray:
        return gaussian_filter(picture, (1.5, 1.5, 0), truncate=5 / 1.5, mode="constant")[5:-5, 5:-5]

    a, b = ours[0] / 255, theirs[0] / 255
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    expected = ((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))).mean()
    assert ssim(ours, theirs)[0] == pytest.approx(expected, abs=1e-12)
