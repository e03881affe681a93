"""Pictures as the web has them: every mode, orientation, profile and kind of damage."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

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


def test_exif_orientation_is_applied_and_dropped():
    turned = halves().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to see it upright"
    body = encoded(turned, "PNG", exif=exif)
    assert stored_pixels(body)[0, 16].tolist() == [255, 0, 0]
    assert stored_pixels(body)[-1, 16].tolist() == [0, 0, 255]
    with Image.open(io.BytesIO(pictures.stored(body, IMAGE).content)) as picture:
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
    for _ in range(300):
        body = bytearray(bodies[generator.integers(len(bodies))])
        for place in generator.integers(len(body), size=8):
            body[place] = generator.integers(256)
        try:
            assert pictures.stored(bytes(body), IMAGE).content
            outcomes.add(Outcome.OK)
        except Lost as lost:
            outcomes.add(lost.outcome)
    assert {Outcome.OK, Outcome.NOT_AN_IMAGE, Outcome.BROKEN_IMAGE} <= outcomes


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
