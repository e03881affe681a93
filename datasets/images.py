"""From fetched bytes to the stored picture: decoding, orientation, colour, resize, crop, encoding. All with Pillow."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from datasets.config import ImageConfig

FORMATS = ["JPEG", "PNG", "WEBP", "GIF"]


class Unusable(ValueError):
    """A picture cannot be stored; the message is its cause, a short name that is counted."""


def stored(data: bytes, config: ImageConfig) -> tuple[bytes, int, int]:
    """The picture as it is kept, and its own width and height in px.

    Header dimensions are checked before anything is decoded. The orientation tag is applied, alpha is laid on white,
    16-bit greys are scaled, the short side becomes `config.size` (bicubic), the middle square is kept.

    Raises:
        Unusable: with one of the causes not_an_image, too_many_pixels, too_small, broken.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Unusable("too_many_pixels") from None
    except (OSError, SyntaxError, ValueError):
        raise Unusable("not_an_image") from None
    with image:
        if image.width * image.height > config.max_pixels:
            raise Unusable("too_many_pixels")
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
            picture = _rgb(upright)
        except (OSError, SyntaxError, ValueError, MemoryError):
            raise Unusable("broken") from None
        width, height = picture.size
        if min(width, height) < config.size:
            raise Unusable("too_small")
        return _encoded(ImageOps.fit(picture, (config.size, config.size), Image.Resampling.BICUBIC), config), width, height


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, on white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        scale = 255 / 65535 if values.max(initial=0) > 255 else 1.0
        return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _encoded(picture: Image.Image, config: ImageConfig) -> bytes:
    buffer = io.BytesIO()
    if config.format == "png":
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=config.quality, subsampling=0)
    return buffer.getvalue()
