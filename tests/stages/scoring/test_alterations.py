"""What an extractor is shown: the centre square, by Pillow's filters or torch's; altered as asked."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from stages.scoring.alterations import FILTERS, squared
from stages.settings.scoring import Alteration

WIDE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
CENTRE = Image.fromarray(WIDE[:, 16:80])


@pytest.mark.parametrize("resize", FILTERS)
def test_the_centre_square_is_made_smaller_by_pillows_filters(resize):
    assert np.array_equal(squared(WIDE, 32, resize), np.asarray(CENTRE.resize((32, 32), FILTERS[resize])))
    assert np.array_equal(squared(np.asarray(CENTRE), 64, resize), np.asarray(CENTRE))


def test_torchs_bilinear_filter_leaves_pixels_out():
    found = squared(WIDE, 16, "bilinear_aliased")
    centre = torch.from_numpy(np.array(CENTRE)).permute(2, 0, 1)[None].float()
    theirs = torch.nn.functional.interpolate(centre, (16, 16), mode="bilinear", align_corners=False)
    assert np.abs(found - theirs[0].permute(1, 2, 0).numpy()).max() <= 0.5
    assert found.std() > 1.5 * squared(WIDE, 16, "bilinear").std()


def test_an_alteration_comes_after_the_picture_was_made_smaller():
    small = CENTRE.resize((32, 32), FILTERS["bicubic"])
    buffer = io.BytesIO()
    blurred = small.filter(ImageFilter.GaussianBlur(0.5))
    blurred.save(buffer, "JPEG", quality=75)
    expected = {
        Alteration(blur=0.5): np.asarray(blurred),
        Alteration(blur=0.5, jpeg=75): np.asarray(Image.open(buffer)),
        Alteration(resize="box"): np.asarray(CENTRE.resize((32, 32), FILTERS["box"])),
    }
    for alteration, picture in expected.items():
        assert np.array_equal(squared(WIDE, 32, "bicubic", alteration), picture), alteration


def test_one_that_changes_nothing_is_refused():
    with pytest.raises(ValueError, match="changes nothing; give jpeg, blur or resize"):
        Alteration()
