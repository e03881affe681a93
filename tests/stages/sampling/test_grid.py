"""Contact sheets: captions stay beside their own pictures."""

import io

import numpy as np
import pytest
from PIL import Image

from stages.sampling.grid import BACKGROUND, MARGIN, grid


@pytest.mark.parametrize("caption", ["x" * 500, "very long " * 5000, "many words " * 60, "two\nlines " * 40, ""])
def test_a_long_caption_leaves_the_next_block_alone(caption: str) -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    with Image.open(io.BytesIO(grid(("a", "b"), [(caption, [picture] * 2), ("", [picture] * 2)], blocks=2))) as sheet:
        pixels = np.asarray(sheet)
    half = pixels.shape[1] // 2
    captions = pixels[MARGIN + 22 : MARGIN + 22 + 20]  # the line above the pictures
    assert (captions[:, half:] == BACKGROUND).all()
    assert (captions[:, half - MARGIN : half] == BACKGROUND).all()
    assert (captions[:, :half] != BACKGROUND).any() == bool(caption)
