"""Sizes and scales that the stages share: pixels, codes and latents, and the range of the code."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # sizes are asked for where torch is not, too
    from torch import Tensor

SIDE_MULTIPLE = 128  # px: other sides do not come out as asked for
PIXELS_PER_CODE = 42.67  # resolution_multiple of the released prior pipeline
LATENTS_PER_CODE = 10.67  # latent_dim_scale of the released decoder pipeline
# Stage C works on (code + 1) / 42, Stage B on the code itself. The stock pipelines undo it as x * 42 - 1.
CODE_SCALE, CODE_SHIFT = 42.0, 1.0


class BadImageSize(ValueError):
    """An image's sides do not fit the models."""


def normalise(code: "Tensor") -> "Tensor":
    """The compressor's output -> the space of Stage C."""
    return (code + CODE_SHIFT) / CODE_SCALE


def denormalise(latents: "Tensor") -> "Tensor":
    """The space of Stage C -> the compressor's output."""
    return latents * CODE_SCALE - CODE_SHIFT


def code_side(pixels: int) -> int:
    """Side of the code for a side in pixels: 1024 -> 24."""
    return math.ceil(pixels / PIXELS_PER_CODE)


def latent_side(code: int) -> int:
    """Side of Stage A's latents for a side of the code: 24 -> 256."""
    return int(code * LATENTS_PER_CODE)


def nearest_size(width: int, height: int, area: int) -> tuple[int, int]:
    """Width and height in multiples of 128 px, about `area` px^2 and about the aspect ratio of width : height."""
    scale = math.sqrt(area / (width * height))
    longest = area // SIDE_MULTIPLE  # or a strip of a picture would become a larger one

    def fitting(side: int) -> int:
        return max(1, round(min(side * scale, longest) / SIDE_MULTIPLE)) * SIDE_MULTIPLE

    return fitting(width), fitting(height)


def check_size(width: int, height: int) -> None:
    """Raise BadImageSize unless both sides, in pixels, are positive multiples of 128."""
    for name, side in (("width", width), ("height", height)):
        if side <= 0 or side % SIDE_MULTIPLE:
            raise BadImageSize(f"{name}={side}: sides must be multiples of {SIDE_MULTIPLE} px, such as 512 or 1024")
