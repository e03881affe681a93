"""Picture metrics in plain numpy: 8-bit pictures in, floats out."""

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

THUMBNAIL = 32  # side in pixels at which retrieval compares pictures
WINDOW = 11  # px, of SSIM


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


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """float64 `[32, 32, 3]` in [0, 1] of a uint8 picture `[H, W, 3]`, sides multiples of 32: each pixel the mean of the
    block it stands for."""
    height, width, channels = picture.shape
    assert picture.dtype == np.uint8
    assert height % THUMBNAIL == width % THUMBNAIL == 0, f"{height}x{width} is no multiple of {THUMBNAIL}"
    blocks = picture.reshape(THUMBNAIL, height // THUMBNAIL, THUMBNAIL, width // THUMBNAIL, channels)
    small: np.ndarray = blocks.mean(axis=(1, 3), dtype=np.float64) / 255
    return small


def retrieved(generated: Sequence[np.ndarray], originals: Sequence[np.ndarray]) -> np.ndarray:
    """Which of the generated pictures are nearer to their own original than to any other: bool `[N]`.

    Distance is L2 over RGB in [0, 1] after area-down-sampling to 32x32. A tie with another original is no
    hit, so a model that draws one picture for every caption cannot score by luck. Chance is 1/M.

    Args:
        generated: thumbnails of N pictures.
        originals: thumbnails of M originals, N or more; `generated[i]` was made for the caption of `originals[i]`.
    """
    assert len(originals) >= len(generated) > 0, f"{len(generated)} generated, {len(originals)} originals"
    targets = np.stack(originals)
    hits = []
    for row, picture in enumerate(generated):
        distances = np.square(targets - picture).sum(axis=(1, 2, 3))
        hits.append(bool((distances[row] < np.delete(distances, row)).all()))
    return np.array(hits)


def ssim(generated: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Structural similarity (Wang et al., 2004) of each picture, 1 where the two are equal.

    A Gaussian window of 11 px and sigma 1.5 on each colour channel in [0, 1], whole windows only; K1 = 0.01, K2 = 0.03.

    Args:
        generated, originals: uint8 `[N, H, W, 3]`, row by row the same picture, sides 11 px or more.

    Returns:
        float64 `[N]`: means over channels and places.
    """
    assert generated.shape == originals.shape, f"{generated.shape} against {originals.shape}"
    assert generated.dtype == originals.dtype == np.uint8
    a, b = generated / 255.0, originals / 255.0
    mean_a, mean_b = _blurred(a), _blurred(b)
    variance_a, variance_b = _blurred(a * a) - mean_a**2, _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    below = (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    similarity: np.ndarray = (above / below).mean(axis=(1, 2, 3))
    return similarity


def _blurred(pictures: np.ndarray) -> np.ndarray:
    """float64 `[N, H - 10, W - 10, C]`: Gaussian means, along one axis and then the other."""
    places = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(places**2) / (2 * 1.5**2))
    weights /= weights.sum()
    for axis in (1, 2):
        pictures = sliding_window_view(pictures, WINDOW, axis) @ weights
    return pictures
