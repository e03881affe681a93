"""Pictures as the web has them: every mode, orientation, profile and kind of damage."""

import contextlib
import io
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from datasets import pictures
from datasets.config import ImageConfig
from datasets.outcomes import Lost, Outcome

SIZE = 32
IMAGE = ImageConfig(size=SIZE, format="png")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PICTURE = encoded(Image.effect_noise((48, 40), 60).convert("RGB"))


def stored_pixels(body: bytes, **changes: Any) -> np.ndarray:
    image = IMAGE.model_copy(update=changes)
    return pictures.pixels(pictures.stored(body, image).content)


def halves(size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """Red above, blue below."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (0, size[1] // 2, *size))
    return image


TURNED = {  # EXIF orientation -> how a picture that is to be seen upright is stored (EXIF 2.32, 4.6.4)
    0: None,  # and 9: no orientations
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
    9: None,
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_applied_and_dropped(orientation, kind):
    upright = halves((48, 40))
    upright.paste("green", (0, 0, 16, 16))
    turn, exif = TURNED[orientation], Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    body = encoded(upright.transpose(turn) if turn is not None else upright, kind, exif=exif, **options)
    kept = pictures.stored(body, IMAGE)
    assert (kept.width, kept.height) == pictures.size(io.BytesIO(body)) == (48, 40)
    wanted = stored_pixels(encoded(upright)).astype(int)
    assert np.abs(pictures.pixels(kept.content) - wanted).max() <= (0 if kind != "JPEG" else 8)
    with Image.open(io.BytesIO(kept.content)) as picture:
        assert not picture.getexif()


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("RGBA", (40, 40), (255, 0, 0, 0)), [255, 255, 255]),
        (Image.new("LA", (40, 40), (0, 0)), [255, 255, 255]),
        (Image.new("L", (40, 40), 77), [77, 77, 77]),
        (Image.fromarray(np.full((40, 40), 257 * 77, np.uint16)), [77, 77, 77]),
        (Image.new("P", (40, 40), 0), [0, 0, 0]),
        (Image.new("1", (40, 40), 1), [255, 255, 255]),
    ],
    ids=["RGBA", "LA", "grey", "16-bit", "palette", "1-bit"],
)
def test_every_mode_becomes_8_bit_rgb_on_white(image, colour):
    assert stored_pixels(encoded(image))[3, 3].tolist() == colour


def test_the_middle_of_the_longer_side_is_kept():
    wide = Image.new("RGB", (SIZE * 6, SIZE * 2), "white")
    wide.paste("red", (SIZE * 2, 0, SIZE * 4, SIZE * 2))
    assert (stored_pixels(encoded(wide))[:, 1:-1] == [255, 0, 0]).all()


@pytest.mark.parametrize("side", [SIZE + 1, 100, SIZE * 7])
def test_resizing_is_pillows_bicubic_to_within_rounding(side):
    image = Image.effect_noise((side, side), 80).convert("RGB")
    wanted = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.int16)
    off = np.abs(stored_pixels(encoded(image)) - wanted)
    assert off.max() <= 1
    assert off.mean() < 0.02


@pytest.mark.parametrize("size", [(5, 9), (9, 5), (16, 9), (7, 7)])
def test_a_picture_is_cut_at_whole_pixels_around_its_centre(size):
    columns = np.arange(28, dtype=np.uint8) * 9
    picture = Image.fromarray(np.broadcast_to(columns[None, :, None], (28, 28, 3)).copy())
    found = pictures.fitted(picture, *size).astype(int)
    assert found.shape == (size[1], size[0], 3)
    assert np.abs(found[:, ::-1].mean((0, 2)) - (27 * 9 - found.mean((0, 2)))).max() <= 9  # half a pixel to one side


def test_jpg_is_written_with_full_colour_resolution():
    content = pictures.stored(PICTURE, IMAGE.model_copy(update={"format": "jpg"})).content
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "JPEG"
        assert [layer[1:3] for layer in picture.layer] == [(1, 1)] * 3


def test_random_damage_costs_a_picture_and_nothing_else():
    generator = np.random.default_rng(0)
    bodies = [PICTURE, encoded(halves(), "JPEG"), encoded(halves(), "WEBP"), encoded(halves(), "GIF")]
    outcomes = set()
    for number in range(500):
        body = bytearray(bodies[generator.integers(len(bodies))])
        for place in generator.integers(len(body), size=8):
            body[place] = generator.integers(256)
        if number % 5 == 0:
            del body[generator.integers(len(body)) :]
        try:
            assert pictures.stored(bytes(body), IMAGE).content
            outcomes.add(Outcome.OK)
        except Lost as lost:
            outcomes.add(lost.outcome)
    assert {Outcome.OK, Outcome.NOT_AN_IMAGE, Outcome.BROKEN_IMAGE} <= outcomes


# ------------------------------------------------------------------------------------------------------- a zoo

RED = Image.new("RGB", (40, 40), (250, 10, 10))
LAST = [Image.new("RGB", (40, 40), colour) for colour in ("white", "blue")]  # later frames


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def png(head: tuple[int, int, int, int, int], rows: bytes, *more: bytes) -> bytes:
    """A PNG of width, height, bits, colour type, interlacing, and of its unpacked rows; chunks before these."""
    width, height, bits, colour, interlaced = head
    about = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, colour, 0, 0, interlaced])
    parts = [chunk(b"IHDR", about), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def resized_header(body: bytes, old: bytes, new: bytes) -> bytes:
    assert body.count(old) == 1
    return body.replace(old, new)


JPEG, WEBP, GIF = (
    encoded(RED, kind, **options) for kind, options in (("JPEG", {"quality": 100}), ("WEBP", {}), ("GIF", {}))
)
SIDES, HUGE = (40).to_bytes(2, "big") * 2, (65_500).to_bytes(2, "big") * 2
DEEP = b"\0" + b"\xfa\xfa\x0a\x0a\x0a\x0a" * 40  # a row of 16 bits a channel
ZOO: dict[str, tuple[bytes, Outcome | tuple[int, int, int]]] = {
    "JPEG": (JPEG, (250, 10, 10)),
    "progressive JPEG": (encoded(RED, "JPEG", quality=100, progressive=True), (250, 10, 10)),
    "grey JPEG": (encoded(RED.convert("L"), "JPEG"), (82, 82, 82)),
    "JPEG with a junk comment": (encoded(RED, "JPEG", quality=100, comment=bytes(range(256)) * 99), (250, 10, 10)),
    "JPEG with junk for EXIF": (
        encoded(RED, "JPEG", quality=100, exif=b"Exif\0\0" + bytes(range(256))), (250, 10, 10)),
    "JPEG with EXIF that leads round": (
        encoded(RED, "JPEG", quality=100, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0"), (250, 10, 10)),
    "JPEG with a zip behind": (JPEG + b"PK\x03\x04" + bytes(999), (250, 10, 10)),
    "JPEG with a page behind": (JPEG + b"<script>alert(1)</script>", (250, 10, 10)),
    "JPEG behind a page": (b"<html>" + JPEG, Outcome.NOT_AN_IMAGE),
    "JPEG without an end": (JPEG[:-40], Outcome.BROKEN_IMAGE),
    "head of a JPEG": (JPEG[:20], Outcome.BROKEN_IMAGE),
    "JPEG that says it is huge": (resized_header(JPEG, SIDES, HUGE), Outcome.TOO_MANY_PIXELS),
    "JPEG of no height": (resized_header(JPEG, SIDES, bytes(2) + SIDES[2:]), Outcome.BROKEN_IMAGE),
    "two JPEGs in one (MPO)": (encoded(RED, "MPO", save_all=True, append_images=LAST[1:], quality=100), (250, 10, 10)),
    "PNG": (encoded(RED), (250, 10, 10)),
    "PNG of 16 bits a channel": (png((40, 40, 16, 2, 0), DEEP * 40), (250, 10, 10)),
    "grey PNG of 2 bits": (png((40, 40, 2, 0, 0), (b"\0" + b"\xaa" * 10) * 40), (170, 170, 170)),
    "PNG with a transparent colour": (
        png((40, 40, 8, 2, 0), (b"\0" + b"\1\2\3" * 40) * 40, chunk(b"tRNS", b"\0\1\0\2\0\3")), (255, 255, 255)),
    "16-bit PNG with a transparent colour": (
        png((40, 40, 16, 2, 0), (b"\0" + b"\1\2\3\4\5\6" * 40) * 40, chunk(b"tRNS", b"\1\2\3\4\5\6")), (255, 255, 255)),
    "16-bit PNG without its transparent colour": (
        png((40, 40, 16, 2, 0), (b"\0" + b"\1\2\3\4\5\6" * 40) * 40, chunk(b"tRNS", b"\1\2\3\4\6\6")), (1, 3, 5)),
    "2-bit PNG with a transparent grey": (
        png((40, 40, 2, 0, 0), (b"\0" + b"\xaa" * 10) * 40, chunk(b"tRNS", b"\0\2")), (255, 255, 255)),
    "4-bit PNG without its transparent grey": (
        png((40, 40, 4, 0, 0), (b"\0" + b"\x88" * 20) * 40, chunk(b"tRNS", b"\0\7")), (136, 136, 136)),
    "PNG without a palette": (png((40, 40, 8, 3, 0), (b"\0" + bytes(40)) * 40), Outcome.BROKEN_IMAGE),
    "animated PNG": (encoded(RED, save_all=True, append_images=LAST), (250, 10, 10)),
    "PNG with a page behind": (encoded(RED) + b"<html>", (250, 10, 10)),
    "PNG with a wrong checksum": (
        resized_header(encoded(RED), b"IHDR\0\0\0\x28", b"IHDR\0\0\0\x29"), Outcome.BROKEN_IMAGE),
    "PNG with junk for EXIF": (
        png((40, 40, 8, 2, 0), (b"\0" + b"\xfa\x0a\x0a" * 40) * 40, chunk(b"eXIf", b"junk")), (250, 10, 10)),
    "PNG with a wrong checksum of its texts": (
        png((40, 40, 8, 2, 0), (b"\0" + b"\xfa\x0a\x0a" * 40) * 40, chunk(b"tEXt", b"k\0v")[:-1] + b"?"),
        Outcome.BROKEN_IMAGE),
    "PNG without pixels": (png((40, 40, 8, 2, 0), b""), Outcome.BROKEN_IMAGE),
    "PNG with half of its rows, the others black": (png((40, 40, 8, 2, 0), (b"\0" + bytes(120)) * 20), (0, 0, 0)),
    "PNG of no width": (png((0, 40, 8, 2, 0), b""), Outcome.BROKEN_IMAGE),
    "PNG of 17 bits": (png((40, 40, 17, 2, 0), b""), Outcome.BROKEN_IMAGE),
    "PNG that says it is huge": (png((1 << 31, 1 << 31, 8, 2, 0), b""), Outcome.TOO_MANY_PIXELS),
    "WebP": (encoded(RED, "WEBP", lossless=True), (250, 10, 10)),
    "animated WebP": (encoded(RED, "WEBP", lossless=True, save_all=True, append_images=LAST), (250, 10, 10)),
    "transparent WebP": (encoded(Image.new("RGBA", (40, 40), (0, 0, 0, 0)), "WEBP", lossless=True), (255, 255, 255)),
    "WebP with junk for EXIF": (encoded(RED, "WEBP", lossless=True, exif=b"Exif\0\0junkjunk"), (250, 10, 10)),
    "WebP cut short": (WEBP[:-20], Outcome.BROKEN_IMAGE),
    "GIF": (GIF, (250, 10, 10)),
    "animated GIF": (encoded(RED, "GIF", save_all=True, append_images=LAST), (250, 10, 10)),
    "transparent GIF": (encoded(Image.new("P", (40, 40), 1), "GIF", transparency=1), (255, 255, 255)),
    "GIF with a page behind": (GIF + b"<script>", (250, 10, 10)),
    "GIF cut short": (GIF[:-20], Outcome.BROKEN_IMAGE),
    "GIF that says it is huge": (GIF[:6] + b"\xff\xff\xff\xff" + GIF[10:], Outcome.TOO_MANY_PIXELS),
    "BMP": (encoded(RED, "BMP"), Outcome.NOT_AN_IMAGE),
    "TIFF": (encoded(RED, "TIFF"), Outcome.NOT_AN_IMAGE),
    "ICO": (encoded(RED, "ICO", sizes=[(40, 40)]), Outcome.NOT_AN_IMAGE),
    "PPM": (encoded(RED, "PPM"), Outcome.NOT_AN_IMAGE),
    "PDF": (encoded(RED, "PDF"), Outcome.NOT_AN_IMAGE),
    "EPS": (encoded(RED, "EPS"), Outcome.NOT_AN_IMAGE),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40"/>', Outcome.NOT_AN_IMAGE),
    "nothing": (b"", Outcome.NOT_AN_IMAGE),
    "zeros": (bytes(1 << 16), Outcome.NOT_AN_IMAGE),
    "a pixel": (encoded(Image.new("RGB", (1, 1))), Outcome.TOO_SMALL),
    "a thread": (encoded(Image.new("RGB", (20_000, 32), (250, 10, 10))), (250, 10, 10)),
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_every_animal_is_a_picture_or_lost_for_its_reason(name):
    body, expected = ZOO[name]
    if isinstance(expected, Outcome):
        with pytest.raises(Lost) as caught:
            pictures.stored(body, IMAGE)
        assert caught.value.outcome is expected
        with contextlib.suppress(Lost):  # only the header is read
            pictures.size(io.BytesIO(body))
    else:
        pixels = stored_pixels(body)
        assert pictures.size(io.BytesIO(body)) in ((40, 40), (20_000, 32))
        assert pixels.shape == (SIZE, SIZE, 3)
        assert np.abs(pixels.astype(int) - expected).max() <= 2


# ---------------------------------------------------------------------------------------------------- colours

PLAIN = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# sRGB with the tags of red and blue exchanged: whoever heeds the profile sees the two exchanged
SWAPPED = PLAIN.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("profile", "colour"),
    [(PLAIN, (200, 100, 50)), (SWAPPED, (50, 100, 200)), (b"junk", (200, 100, 50))],
    ids=["sRGB", "swapped", "junk"],  # a profile holds the second of its making: no name for a test
)
def test_colour_profiles_are_applied_and_dropped(kind, profile, colour):
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    body = encoded(Image.new("RGB", (SIZE, SIZE), (200, 100, 50)), kind, icc_profile=profile, **options)
    np.testing.assert_allclose(stored_pixels(body)[3, 3].tolist(), colour, atol=2)
    with Image.open(io.BytesIO(pictures.stored(body, IMAGE).content)) as picture:
        assert "icc_profile" not in picture.info


def test_a_profile_does_not_cost_the_transparency():
    image = Image.new("RGBA", (SIZE, SIZE), (200, 100, 50, 0))
    image.paste((200, 100, 50, 255), (0, 0, SIZE, SIZE // 2))
    pixels = stored_pixels(encoded(image, icc_profile=SWAPPED))
    np.testing.assert_allclose(pixels[3, 3].tolist(), (50, 100, 200), atol=2)
    assert pixels[-3, 3].tolist() == [255, 255, 255]


def test_a_profile_for_another_mode_is_left_out_of_account():
    assert stored_pixels(encoded(Image.new("L", (SIZE, SIZE), 77), icc_profile=SWAPPED))[3, 3].tolist() == [77] * 3


def test_cmyk_becomes_rgb():
    body = encoded(Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0)), "JPEG", quality=100)
    np.testing.assert_allclose(stored_pixels(body)[3, 3].tolist(), (255, 0, 0), atol=3)


# ------------------------------------------------------------------------------------- colours by the formula


def gamma_profile(space: bytes, gamma: float) -> bytes:
    """An ICC profile (version 2) of sRGB's primaries, or of grey, with a gamma."""

    def fixed(*values: float) -> bytes:
        return b"".join(round(value * 65_536).to_bytes(4, "big", signed=True) for value in values)

    curve = b"curv" + bytes(4) + (1).to_bytes(4, "big") + round(gamma * 256).to_bytes(2, "big") + bytes(2)
    white = (0.9642, 1.0, 0.8249)
    primaries = {
        b"r": (0.43607, 0.22250, 0.01393),
        b"g": (0.38506, 0.71688, 0.09710),
        b"b": (0.14308, 0.06062, 0.71417),
    }
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(*white)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {name + b"XYZ": b"XYZ " + bytes(4) + fixed(*place) for name, place in primaries.items()}
        tags |= {name + b"TRC": curve for name in primaries}
    place, table = 132 + 12 * len(tags), len(tags).to_bytes(4, "big")
    for name, content in tags.items():
        table += name + place.to_bytes(4, "big")
        table += len(content).to_bytes(4, "big")
        place += len(content)
    body = table + b"".join(tags.values())
    head = (128 + len(body)).to_bytes(4, "big") + bytes(4) + b"\x02\x40\0\0mntr" + space + b"XYZ " + bytes(12)
    return head + b"acsp" + bytes(28) + fixed(*white) + bytes(48) + body


def in_srgb(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1."""
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", ["L", "I;16", "P", "RGB", "LA"])
def test_profiles_are_applied_in_every_mode(mode):
    ramp = np.linspace(0, 65_535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    eight = np.round(ramp / 257).astype(np.uint8)
    grey = Image.fromarray(ramp if mode == "I;16" else eight)
    image = grey if mode in ("L", "I;16") else grey.convert("RGB").quantize(256) if mode == "P" else grey.convert(mode)
    expected = in_srgb((ramp / 65_535 if mode == "I;16" else eight / 255) ** 1.8)
    profile = gamma_profile(b"GRAY" if mode in ("L", "LA", "I;16") else b"RGB ", 1.8)
    found = stored_pixels(encoded(image, icc_profile=profile)).astype(float)
    np.testing.assert_allclose(found, np.broadcast_to(expected[..., None], found.shape), atol=1.5)


@pytest.mark.parametrize(
    ("image", "clear", "inked"),
    [
        (Image.new("RGB", (SIZE, SIZE), (200, 100, 50)), (200, 100, 50), (10, 20, 30)),
        (Image.new("L", (SIZE, SIZE), 200), 200, 10),
        (Image.linear_gradient("L").resize((SIZE, SIZE)).convert("RGB").quantize(8), 0, 5),
        (Image.fromarray(np.full((SIZE, SIZE), 0x4040, np.uint16)), 0x4040, 0),
    ],
    ids=["RGB", "grey", "palette", "16-bit"],
)
def test_a_colour_that_is_clear_is_white_beside_a_profile_too(image, clear, inked):
    image.paste(clear, (0, 0, SIZE, SIZE))
    image.paste(inked, (0, 0, SIZE, SIZE // 2))
    grey = image.mode in ("L", "I;16")
    profile = gamma_profile(b"GRAY" if grey else b"RGB ", 1.8)
    pixels = stored_pixels(encoded(image, icc_profile=profile, transparency=clear))
    assert pixels[-3, 3].tolist() == [255, 255, 255]
    assert pixels[3, 3].max() < 250


def test_png_with_megabytes_of_profile_and_text_is_a_picture():
    notes = PngImagePlugin.PngInfo()
    notes.add_text("parameters", "a cat, " * 400_000, zip=True)
    body = encoded(halves(), pnginfo=notes, icc_profile=SWAPPED + bytes(2 << 20))
    assert pictures.size(io.BytesIO(body)) == (SIZE, SIZE)
    assert stored_pixels(body).shape == (SIZE, SIZE, 3)


def test_max_pixels_is_the_limit_whatever_pillow_takes_for_a_bomb(monkeypatch):
    body = encoded(Image.new("1", (20_000, 10_000)))  # above Pillow's own 179 million
    assert pictures.size(io.BytesIO(body)) == (20_000, 10_000)
    assert pictures.opened(body, 200_000_000).size == (20_000, 10_000)
    with pytest.raises(Lost) as lost:
        pictures.opened(body, 199_999_999)
    assert lost.value.outcome is Outcome.TOO_MANY_PIXELS


def test_a_pngs_size_is_read_and_not_its_pixels():
    class Counting(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1) -> bytes:
            content = super().read(size)
            self.taken += len(content)
            return content

    notes = PngImagePlugin.PngInfo()
    notes.add_text("parameters", "a cat, 20 steps")
    body = encoded(Image.effect_noise((400, 300), 90).convert("RGB"), pnginfo=notes)
    file = Counting(body)
    assert pictures.size(file) == (400, 300)
    assert file.taken < 1000 < len(body)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (encoded(RED).replace(b"IHDR\0\0\0\x28", b"IHDR\0\0\0\x29"), "broken_image: its header is damaged"),
        (b"II*\0 a TIFF", "none of JPEG, PNG, WEBP, GIF, AVIF"),
        (b"\0\0\0\x18ftypqt  ", "none of JPEG, PNG"),  # a film
        (b"\0\0\0\x18ftypheic", "HEIC needs the package pillow-heif"),
        (
            png((40, 40, 8, 2, 0), b"", chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(9 << 20)))),
            "broken_image: Decompressed data too large",
        ),
    ],
)
def test_what_is_no_picture_here_is_told_why(body, told, monkeypatch):
    monkeypatch.setattr(pictures, "_formats", lambda: pictures.FETCHED_FORMATS)
    with pytest.raises(Lost, match=f"^(not_an_image: .*)?{told}"):
        pictures.stored(body, IMAGE)
