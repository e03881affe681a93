"""What is done to pictures before an extractor sees them: their centre square, resized; and alterations, on purpose.

The filter matters: FID moves by it, and by JPEG, where people see no difference (Parmar et al., arXiv 2104.11222).
"""

import io

import numpy as np
from PIL import Image, ImageFilter

from stages.settings.scoring import Alteration, Resize

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}


def squared(picture: np.ndarray, side: int, resize: Resize, alteration: Alteration | None = None) -> np.ndarray:
    """The centre square of a picture uint8 (H, W, 3), made `side` px large, then altered: uint8 (side, side, 3)."""
    if alteration and alteration.resize:
        resize = alteration.resize
    image = _centre(Image.fromarray(picture))
    image = _aliased(image, side) if resize == "bilinear_aliased" else image.resize((side, side), FILTERS[resize])
    if alteration and alteration.blur:
        image = image.filter(ImageFilter.GaussianBlur(alteration.blur))
    if alteration and alteration.jpeg:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=alteration.jpeg)
        image = Image.open(buffer)
    return np.asarray(image)


def _centre(image: Image.Image) -> Image.Image:
    """The largest square in the middle."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _aliased(square: Image.Image, side: int) -> Image.Image:
    """As torch makes it smaller unless told otherwise: each pixel of the four next to it."""
    import torch

    batch = torch.from_numpy(np.array(square))[None].permute(0, 3, 1, 2).float()
    small = torch.nn.functional.interpolate(batch, (side, side), mode="bilinear", antialias=False)
    return Image.fromarray(small[0].permute(1, 2, 0).round().to(torch.uint8).numpy())
