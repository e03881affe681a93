"""Sizes and scales that the stages share: pixels, codes and latents, and the range of the code."""

import math

from torch import Tensor

SIDE_MULTIPLE = 128  # px: other sides do not come out as asked for
PIXELS_PER_CODE = 42.67  # resolution_multiple of the released prior pipeline
LATENTS_PER_CODE = 10.67  # latent_dim_scale of the released decoder pipeline
# Stage C works on (code + 1) / 42, Stage B on the code itself. The stock pipelines undo it as x * 42 - 1.
CODE_SCALE, CODE_SHIFT = 42.0, 1.0


class BadImageSize(ValueError):
    """An image's sides do not fit the models."""


def normalise(code: Tensor) -> Tensor:
    """The compressor's output -> the space of Stage C."""
    return (code + CODE_SHIFT) / CODE_SCALE


def denormalise(latents: Tensor) -> Tensor:
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


def aspect_sizes(pixels: int, ratio: float) -> list[tuple[int, int]]:
    """Sizes (width, height) of about `pixels` px in steps of 128 px, from the tallest to the widest.

    Each short side up to the square's gets the long side that comes nearest to the area, upright and lying, where the
    long side is at most `ratio` x the short one: 768*1280 and 5/3 give 768x1280, 896x1152, 1024x1024, and the same
    lying. The paper trained on 768x1280, 1280x768 and 768x768, and names 1538 px (1536 is the multiple) as the longest
    side. `pixels` is at least 128*128, `ratio` at least 1.
    """
    assert pixels >= SIDE_MULTIPLE**2
    assert ratio >= 1
    area = pixels / SIDE_MULTIPLE**2
    sizes = set()
    for short in range(1, round(math.sqrt(area)) + 1):
        long = max(round(area / short), short)
        if long <= ratio * short:
            sizes |= {(short * SIDE_MULTIPLE, long * SIDE_MULTIPLE), (long * SIDE_MULTIPLE, short * SIDE_MULTIPLE)}
    return sorted(sizes, key=lambda size: size[0] / size[1])
