"""Aspect-ratio buckets: the few sizes, in steps of 128 px, in which pictures of every aspect ratio are trained on.

A plan gives each row a bucket by its width and height, and each shard rows of one bucket, so that all tensors of a
shard have one shape. A stored picture keeps its own aspect; it is cropped to a size when it is trained on or encoded.
"""

import math
from bisect import bisect
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

STEP = 128  # px: other sides do not come out of the models as they went in
KEPT = 0.9  # least share, of what the fitting bucket keeps of a picture, that its planned bucket must keep


class Size(NamedTuple):
    """Width and height, px; as text `896x1152`."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str) -> "Size":
        """The size of a text such as `896x1152`."""
        width, height = text.split("x")
        return cls(int(width), int(height))


@dataclass(frozen=True, order=True)
class Frame:
    """How a training sees pictures: as squares of `size` px, or in sizes of about that area up to an aspect ratio.

    `max_aspect` is the largest ratio of the longer to the shorter side; 1 leaves the square alone.
    """

    size: int
    max_aspect: float = 1.0

    @property
    def square(self) -> bool:
        """Whether all pictures are squares."""
        return self.max_aspect == 1

    @property
    def name(self) -> str:
        """Name of the folder for what is encoded at these sizes."""
        return str(self.size) if self.square else f"{self.size}-{self.max_aspect:g}"

    @cached_property
    def sizes(self) -> list[Size]:
        """All sizes, from the tallest to the widest."""
        return [Size(self.size, self.size)] if self.square else aspect_sizes(self.size**2, self.max_aspect)

    @property
    def shortest(self) -> int:
        """The shortest side of all sizes, px."""
        return min(min(size) for size in self.sizes)

    @cached_property
    def borders(self) -> list[float]:
        """Aspect ratios (width over height) between which each of `sizes` is the nearest: geometric means of two."""
        ratios = [width / height for width, height in self.sizes]
        return [math.sqrt(one * other) for one, other in pairwise(ratios)]

    def nearest(self, width: float, height: float) -> Size:
        """The size whose aspect ratio is nearest to a picture's."""
        return self.sizes[bisect(self.borders, width / height)]

    def suits(self, width: int, height: int, bucket: Size) -> bool:
        """Whether a crop to a bucket keeps about as much of a picture as the crop to the nearest size would.

        Metadata may be wrong, or tell of a picture before it was turned upright.
        """
        best = kept(width, height, self.nearest(width, height))
        return kept(width, height, bucket) >= KEPT * best


def kept(width: float, height: float, size: Size) -> float:
    """Share of a picture that is left when it is cropped to the aspect ratio of a size."""
    ratio = width / height * size.height / size.width
    return min(ratio, 1 / ratio)


def aspect_sizes(pixels: int, ratio: float) -> list[Size]:
    """Sizes of about `pixels` px in steps of 128 px, from the tallest to the widest.

    Each short side up to the square's gets the long side that comes nearest to the area, upright and lying, where the
    long side is at most `ratio` x the short one: 768*1280 and 5/3 give 768x1280, 896x1152, 1024x1024, and the same
    lying. The paper trained on 768x1280, 1280x768 and 768x768, and names 1538 px (1536 is the multiple) as the longest
    side. `pixels` is at least 128*128, `ratio` at least 1.
    """
    assert pixels >= STEP**2
    assert ratio >= 1
    area = pixels / STEP**2
    sizes = set()
    for short in range(1, round(math.sqrt(area)) + 1):
        long = max(round(area / short), short)
        if long <= ratio * short:
            sizes |= {Size(short * STEP, long * STEP), Size(long * STEP, short * STEP)}
    return sorted(sizes, key=lambda size: size.width / size.height)
