"""Pictures: from what a server sent to what is stored, and from that to pixels. Pillow decodes, torch resizes."""

import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from datasets.buckets import Size
from datasets.config import ImageConfig
from datasets.outcomes import Lost, Outcome

FETCHED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")  # the first picture of an animation; Pillow knows 40 more
HEIF = "HEIF"  # one more where a decoder is installed: `_formats`
_HEIF_STARTS = [b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")]
STORED_FORMATS = ("PNG", "JPEG")
SRGB = ImageCms.createProfile("sRGB")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".avif"),
    *(".heic", ".heif", ".bmp", ".tif", ".tiff", ".jp2", ".jxl"),  # pictures too, if unreadable ones
)
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_COLOURS = {"1": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGBA": "RGB"}  # by mode: without palette and alpha
_PNG = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")  # chunks of a PNG; these begin with a keyword
_ORIENTATIONS = (b"Raw profile type exif", b"Raw profile type APP1", b"XML:com.adobe.xmp")  # keywords
_METADATA_BYTES = 8 << 20  # of a PNG's profile and texts, unpacked: Pillow's limit of 1 MB refuses real pictures
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata, without a file's name; what is lost is counted
Image.MAX_IMAGE_PIXELS = None  # `max_pixels` is the limit, whatever Pillow takes for a bomb
PngImagePlugin.MAX_TEXT_CHUNK = _METADATA_BYTES


@dataclass(frozen=True)
class Stored:
    """A picture as it is stored, and the size (px) that it came in, seen upright."""

    content: bytes
    width: int
    height: int


def stored(body: bytes, image: ImageConfig, bucket: Size | None = None) -> Stored:
    """Turn a fetched body into the stored picture.

    Upright by its EXIF orientation, 8-bit sRGB (by its ICC profile, where it has one that fits), transparency on
    white, short side to `image.size` as `fitted` makes it, of the longer side the centre, at most `image.max_aspect`
    times the short one; nothing is enlarged.

    Raises:
        Lost: the body is no picture that we take, or its aspect ratio does not suit its bucket, where it has one.
    """
    upright = _upright(body, image.max_pixels)
    if min(upright.size) < image.size:
        raise Lost(Outcome.TOO_SMALL, f"{upright.width} x {upright.height} px")
    if bucket and not image.frame.suits(*upright.size, bucket):
        raise Lost(Outcome.WRONG_ASPECT, f"{upright.width} x {upright.height} px, planned as {bucket}")
    shorter = min(upright.size)
    width, height = (round(image.size * min(side / shorter, image.max_aspect)) for side in upright.size)
    picture = Image.fromarray(fitted(_on_white(_in_srgb(upright)), width, height))  # without profiles and comments
    buffer = io.BytesIO()
    if image.format == "png":
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=image.quality, subsampling="4:4:4")
    return Stored(buffer.getvalue(), *upright.size)


def size(file: BinaryIO) -> tuple[int, int]:
    """Width and height (px) of a picture, seen upright, from its header alone.

    Raises:
        Lost: the file is no picture that we take.
    """
    if (known := _png_size(file)) is not None:
        return known
    with _opened(file) as picture:
        try:
            if picture.format == "PNG" and "exif" not in picture.info:  # it may tell its orientation behind its pixels
                picture.load()
        except Exception as error:
            raise Lost(Outcome.BROKEN_IMAGE, f"{type(error).__name__}: {error}") from error
        turned = False
        with suppress(Exception):  # of what says nothing that can be read: as `_upright`
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in _SIDEWAYS
        return (picture.height, picture.width) if turned else picture.size


def opened(body: bytes, max_pixels: int = 64 * 1024 * 1024) -> Image.Image:
    """A picture of any of `FETCHED_FORMATS`: upright, 8-bit sRGB, transparency on white, as `stored` makes it.

    Raises:
        Lost: the body is no picture that we take.
    """
    return _on_white(_in_srgb(_upright(body, max_pixels)))


def fitted(picture: Image.Image, width: int, height: int) -> np.ndarray:
    """The centre of an RGB picture at that aspect ratio, in whole pixels, resized: uint8 (height, width, 3).

    By torch's bicubic on 8 bits, antialiased: Pillow's filter to within rounding, in a quarter of the time.
    """
    import torch

    scale = min(picture.width / width, picture.height / height)
    shown = round(width * scale), round(height * scale)
    left, top = (picture.width - shown[0]) // 2, (picture.height - shown[1]) // 2
    centre = np.array(np.asarray(picture)[top : top + shown[1], left : left + shown[0]])  # a copy of that alone
    if shown == (width, height):
        return centre
    batch = torch.from_numpy(centre)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(batch, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


@contextmanager
def one_thread_a_picture() -> Iterator[None]:
    """Where threads take a picture each, `fitted` works in these alone: torch's helpers would wait for each other, and
    quadruple the CPU time of a picture. Of the process; for one that does nothing else meanwhile."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pixels(content: bytes, size: Size | None = None) -> np.ndarray:
    """A stored picture's pixels, uint8 (H, W, 3) RGB; with a size, its centre at that aspect ratio, resized to it."""
    with Image.open(io.BytesIO(content), formats=STORED_FORMATS) as picture:
        whole = picture.convert("RGB")
    return np.asarray(whole) if size in (None, whole.size) else fitted(whole, *size)


def _png_size(file: BinaryIO) -> tuple[int, int] | None:
    """Width and height (px) of a PNG from its IHDR; None of one that tells an orientation, and of what is no PNG.

    Pillow decodes all of it to look for an orientation behind the pixels; here they are skipped.
    """
    file.seek(0)
    head = file.read(len(_PNG) + 16)
    if not head.startswith(_PNG) or head[12:16] != b"IHDR":
        return None
    width, height = (int.from_bytes(head[at : at + 4], "big") for at in (16, 20))
    place, kind = len(_PNG), b""
    while kind != b"IEND":
        file.seek(place)
        start = file.read(8)
        if len(start) < 8:
            return None  # cut short: let Pillow tell
        length, kind = int.from_bytes(start[:4], "big"), start[4:]
        if kind == b"eXIf" or (kind in _TEXTS and file.read(min(length, 32)).startswith(_ORIENTATIONS)):
            return None
        place += 12 + length
    return (width, height) if width and height else None


def _opened(file: BinaryIO) -> Image.Image:
    """A picture of which only the header has been read."""
    file.seek(0)
    try:
        return Image.open(file, formats=_formats())
    except Exception as error:
        file.seek(0)
        start, unknown = file.read(16), isinstance(error, UnidentifiedImageError)
        accepts = (Image.OPEN[name][1] for name in _formats())
        if any(accept is not None and accept(start) is True for accept in accepts):
            raise Lost(Outcome.BROKEN_IMAGE, "its header is damaged" if unknown else str(error)) from error
        told = f"none of {', '.join(_formats())}" if unknown else str(error)
        if start[4:12] in _HEIF_STARTS and HEIF not in _formats():
            told = "HEIC needs the package pillow-heif"
        raise Lost(Outcome.NOT_AN_IMAGE, f"starts with {start[:8]!r}; {told}") from error


@cache
def _formats() -> tuple[str, ...]:
    """The formats that are read here: HEIC's decoder is a package of its own, which one may install."""
    if importlib.util.find_spec("pillow_heif") is None:
        return FETCHED_FORMATS
    importlib.import_module("pillow_heif").register_heif_opener()
    return (*FETCHED_FORMATS, HEIF)


def _upright(body: bytes, max_pixels: int) -> Image.Image:
    """The decoded picture. Its size is known from the header and checked before anything is decoded."""
    picture = _opened(io.BytesIO(body))
    if picture.width * picture.height > max_pixels:
        raise Lost(Outcome.TOO_MANY_PIXELS, f"{picture.width} x {picture.height} px")
    try:
        picture.load()
        _know_the_clear_colour(picture, body)
    except Exception as error:  # decoders raise anything over hostile bytes; it costs one picture
        raise Lost(Outcome.BROKEN_IMAGE, f"{type(error).__name__}: {error}") from error
    with suppress(Exception):  # an orientation that cannot be read is none: the pixels are whole
        ImageOps.exif_transpose(picture, in_place=True)
    return picture


def _know_the_clear_colour(picture: Image.Image, body: bytes) -> None:
    """A PNG's, in the bits of its pixels: Pillow hands it on in those of the file, but keeps 16 in grey alone."""
    clear = picture.info.get("transparency")
    if picture.format == "PNG" and picture.mode in ("L", "RGB") and clear is not None:
        depth = body[24]  # IHDR's, the first chunk
        values = [
            value >> 8 if depth == 16 else value * 255 // (2**depth - 1) for value in np.atleast_1d(clear).tolist()
        ]
        picture.info["transparency"] = tuple(values) if picture.mode == "RGB" else values[0]


def _or_broken(convert: Callable[[Image.Image], Image.Image]) -> Callable[[Image.Image], Image.Image]:
    """A conversion whose failures cost one picture: a decoded one may still lack its palette, say."""

    def converted(picture: Image.Image) -> Image.Image:
        try:
            return convert(picture)
        except Exception as error:
            raise Lost(Outcome.BROKEN_IMAGE, f"{type(error).__name__}: {error}") from error

    return converted


@_or_broken
def _in_srgb(picture: Image.Image) -> Image.Image:
    """The colours in 8-bit sRGB or grey, with alpha where something is clear; no palette, no profile."""
    colours, alpha = _apart(picture)
    converted = _by_profile(colours, picture.info.get("icc_profile"))
    if converted.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        values = np.asarray(converted, np.uint32)
        converted = Image.fromarray(((values * 255 + 32_767) // 65_535).astype(np.uint8))
    if alpha:
        converted.putalpha(alpha)
    return converted


def _apart(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours without a palette, and alpha: of a channel, of palette entries, or of the one colour that is clear."""
    if picture.mode.startswith("I"):
        clear = picture.info.get("transparency")
        mask = None if clear is None else Image.fromarray(np.uint8(255) * (np.asarray(picture) != clear))
        return picture, mask
    mode = _COLOURS.get(picture.mode, picture.mode)
    if not picture.has_transparency_data:
        return (picture if picture.mode == mode else picture.convert(mode)), None
    whole = picture.convert(f"{mode}A")
    return whole.convert(mode), whole.getchannel("A")


def _by_profile(colours: Image.Image, profile: bytes | None) -> Image.Image:
    """The same colours in sRGB; a profile that is broken or of another mode's is left out of account."""
    if not profile:
        return colours
    # A table of 33 steps, which takes the place of grey's curve for speed, is wrong by 10 of 255 in the dark.
    flags = ImageCms.Flags.NONE if colours.mode in ("RGB", "CMYK") else ImageCms.Flags.NOOPTIMIZE
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(colours, source, SRGB, outputMode="RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError):
        return colours
    assert converted is not None, "not in place"
    return converted


@_or_broken
def _on_white(picture: Image.Image) -> Image.Image:
    """8-bit RGB; what shines through becomes white."""
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    layer = picture.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")
