"""Pictures as a training sees them: changed by the seed and the sample's number, in the shares that are asked for."""

import colorsys

import numpy as np
import pytest

from datasets.reading.augment import changed

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (400, 3, 4, 6), dtype=np.uint8)


def hsv(picture: np.ndarray) -> np.ndarray:
    """(3, H, W) uint8 to (H, W, 3), each 0 to 1, by Python's own arithmetic."""
    return np.apply_along_axis(lambda rgb: colorsys.rgb_to_hsv(*rgb), 2, picture.transpose(1, 2, 0) / 255)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_pictures_is_mirrored(share: float) -> None:
    seen = changed(PICTURES, 7, seed=1, flip=share, hue=0.0)
    mirrored = (seen == PICTURES[:, :, :, ::-1]).all((1, 2, 3))
    as_it_was = (seen == PICTURES).all((1, 2, 3))
    assert (mirrored ^ as_it_was).all()
    assert abs(mirrored.mean() - share) < 3 * (share * (1 - share) / 400) ** 0.5 + 1e-9


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_pictures_is_in_other_hues(share: float) -> None:
    seen = changed(PICTURES, 7, seed=1, flip=0.0, hue=share)
    other = (seen != PICTURES).any((1, 2, 3))
    assert abs(other.mean() - share) < 3 * (share * (1 - share) / 400) ** 0.5 + 0.01  # an angle of 0 changes nothing


def test_the_hue_is_turned_by_one_angle_and_the_rest_stays() -> None:
    """Brightness to a level of 255, saturation and angle within what 8 bits round off; angles fill the circle."""
    angles = []
    for before, after in zip(PICTURES, changed(PICTURES, 0, seed=3, flip=0.0, hue=1.0), strict=True):
        (hue, saturation, value), (turned, saturated, bright) = (hsv(one).transpose(2, 0, 1) for one in (before, after))
        np.testing.assert_allclose(bright, value, atol=1.1 / 255)
        sharp = (saturation > 0.5) & (value > 0.5)
        np.testing.assert_allclose(saturated[sharp], saturation[sharp], atol=0.03)
        angle = np.exp(2j * np.pi * (turned - hue))[sharp]
        assert np.abs(angle - angle.mean()).max(initial=0) < 0.15
        angles.append(np.angle(angle.mean()))
    counts, _ = np.histogram(angles, bins=8, range=(-np.pi, np.pi))
    assert counts.min() > 25  # 50 are expected


def test_greys_keep_their_looks() -> None:
    greys = np.repeat(PICTURES[:, :1], 3, axis=1)
    np.testing.assert_array_equal(changed(greys, 0, seed=0, flip=0.0, hue=1.0), greys)


def test_any_ranks_see_the_same_and_each_time_it_is_another() -> None:
    """A sample's change goes by its number in the training, wherever a batch is cut."""
    whole = changed(PICTURES[:16], 100, seed=5, flip=0.5, hue=0.5)
    parts = [changed(PICTURES[at : at + 4], 100 + at, seed=5, flip=0.5, hue=0.5) for at in range(0, 16, 4)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert (changed(PICTURES[:16], 116, seed=5, flip=0.5, hue=0.5) != whole).any()
    assert (changed(PICTURES[:16], 100, seed=6, flip=0.5, hue=0.5) != whole).any()
