"""Changes of pictures, drawn anew each time that a training sees one."""

import numpy as np
from PIL import Image

HUES = 256  # steps of a full turn of the hue, as Pillow counts it


def changed(pictures: np.ndarray, start: int, seed: int, *, flip: float, hue: float) -> np.ndarray:
    """The samples `start` to `start + rows` of a training, a share `flip` of them mirrored, `hue` in other colours.

    What a sample gets depends on the seed and its number alone, so that any ranks see the same, and a training that
    goes on does too.

    Args:
        pictures: uint8 (rows, 3, H, W), sRGB.
        flip: the probability that left and right are exchanged.
        hue: the probability that the hue, that of HSV, is turned by an angle that is uniform over the circle. Greys
            keep their looks.

    Returns:
        As `pictures`, which are left as they are.
    """
    rows = [
        _changed(row, np.random.default_rng((seed, start + place)), flip, hue) for place, row in enumerate(pictures)
    ]
    return np.stack(rows)


def _changed(picture: np.ndarray, draws: np.random.Generator, flip: float, hue: float) -> np.ndarray:
    flipped, turned, angle = draws.random() < flip, draws.random() < hue, int(draws.integers(HUES))
    if flipped:
        picture = picture[:, :, ::-1]
    return _turned(picture, angle) if turned else picture


def _turned(picture: np.ndarray, angle: int) -> np.ndarray:
    """(3, H, W) with its hue turned by `angle` of `HUES`."""
    hue, saturation, value = Image.fromarray(picture.transpose(1, 2, 0)).convert("HSV").split()
    hue = Image.fromarray(np.asarray(hue) + np.uint8(angle))
    return np.asarray(Image.merge("HSV", (hue, saturation, value)).convert("RGB")).transpose(2, 0, 1)
