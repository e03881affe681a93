"""Rivals' pictures: found by key or prompt, in folders and tars; whatever is wrong with one is counted and named."""

import tarfile
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from datasets.config import DataError
from datasets.reading.prompts import Prompt
from datasets.reading.rivals import Rival

TEXTS = ["a cat", "a dog", "a fox"]
WANTED = [(Prompt(text).key, text) for text in TEXTS]


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (64, 48), (number, 0, 0))


def fill(folder: Path, suffix: str = ".png") -> Path:
    folder.mkdir(parents=True)
    for number, (key, _) in enumerate(WANTED):
        picture(number * 50).save(folder / f"{key}{suffix}", quality=100)
    return folder


def tarred(folder: Path, mode: Literal["w", "w:gz", "w:xz"] = "w", suffix: str = ".tar") -> Path:
    with tarfile.open(folder.with_suffix(suffix), mode) as tar:
        tar.add(folder, ".")
    return folder.with_suffix(suffix)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_pictures_are_found_by_their_keys(tmp_path, suffix):
    for place in (folder := fill(tmp_path / "rival", suffix), tarred(folder)):
        rival = Rival(str(place), "k")
        assert rival.examine(WANTED).usable == {key for key, _ in WANTED}
        for number, wanted in enumerate(WANTED):
            pixels = rival.pixels(wanted)
            assert (pixels.shape, pixels.dtype) == ((48, 64, 3), np.uint8)
            assert abs(int(pixels[0, 0, 0]) - number * 50) <= 3


def test_tars_may_be_compressed_whatever_they_are_called_and_hold_links(tmp_path):
    folder = fill(tmp_path / "rival")
    names = [f"{key}.png" for key, _ in WANTED]
    (folder / names[1]).unlink()
    (folder / names[1]).hardlink_to(folder / names[0])  # which comes before it, by name or not
    for place in (tarred(folder, "w:gz"), tarred(folder, "w:xz", ".tar.xz"), tarred(folder, "w:gz", ".tgz")):
        rival = Rival(str(place), "k")
        assert rival.examine(WANTED).usable == {key for key, _ in WANTED}
        assert np.array_equal(rival.pixels(WANTED[0]), rival.pixels(WANTED[1]))


def test_or_by_the_prompts_that_a_list_gives_them(tmp_path):
    (tmp_path / "r/sub").mkdir(parents=True)
    rows = ["file,prompt", '"sub/x, 1.png","a cat"', "2.png,a  dog", "3.png,a fox"]
    (tmp_path / "r/prompts.csv").write_text("\n".join(rows))
    for name in ("sub/x, 1.png", "2.png", "3.png"):
        picture(9).save(tmp_path / "r" / name)
    for place in (tmp_path / "r", tarred(tmp_path / "r")):
        other_keys = [("f" * 32, text) for text in TEXTS]  # as those of the data's own captions
        assert not Rival(str(place), "k").examine(other_keys).lacking
    (tmp_path / "r/prompts.csv").write_text("\n".join([*rows, '3.png,"a hen']))
    with pytest.raises(DataError, match=r"^k: .*prompts.csv is no CSV in UTF-8 \(unexpected end of data\)"):
        Rival(str(tmp_path / "r"), "k")
    (tmp_path / "r/prompts.csv").write_text("\n".join(rows))
    with (tmp_path / "r/prompts.csv").open("a") as file:
        file.write("\nnone.png,a hen")
    with pytest.raises(DataError, match=r"^k: .*prompts.csv names pictures that are not there \('none.png'\)"):
        Rival(str(tmp_path / "r"), "k")


def test_a_picture_is_no_place_of_pictures(tmp_path):
    picture(9).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"^k: .*x\.png is no folder, and no whole tar"):
        Rival(str(tmp_path / "x.png"), "k")


def test_of_an_artifact_of_samples_only_what_was_drawn_counts(tmp_path):
    fill(tmp_path / "a/generated")
    fill(tmp_path / "a/original")
    assert Rival(str(tmp_path / "a"), "k").examine(WANTED).lacking == 0


def test_whatever_is_wrong_is_counted_and_named(tmp_path):
    folder = fill(tmp_path / "rival")
    texts = [f"prompt {number}" for number in range(20)]
    wanted = [(Prompt(text).key, text) for text in texts]
    for key, _ in wanted:
        picture(1).save(folder / f"{key}.png")
    (folder / f"{wanted[0][0]}.png").unlink()
    picture(2).save(folder / f"{wanted[1][0]}.jpg")
    whole = (folder / f"{wanted[2][0]}.png").read_bytes()
    (folder / f"{wanted[2][0]}.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (1, 1)).save(folder / f"{wanted[3][0]}.png")
    found = Rival(str(folder), "k").examine(wanted)
    assert found.usable == {key for key, _ in wanted[4:]}
    assert found.lacking == 4
    assert found.told() == (
        f"1 missing ('prompt 0'); 1 there more than once ('{wanted[1][0]}.jpg'); 1 undecodable ('{wanted[2][0]}.png'); "
        f"1 of another size, or of less than 32 px ('{wanted[3][0]}.png')"
    )


def test_pictures_of_a_pixel_are_none(tmp_path):
    (tmp_path / "r").mkdir()
    for key, _ in WANTED:
        Image.new("RGB", (1, 1)).save(tmp_path / f"r/{key}.png")
    assert len(Rival(str(tmp_path / "r"), "k").examine(WANTED).of_other_size) == 3


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none", None, "there are no pictures at"),
        ("empty/readme.txt", b"x", "holds no picture"),
        ("torn.tar", b"no tar" * 100, "is no folder, and no whole tar"),
    ],
)
def test_no_place_of_pictures_is_refused_in_a_sentence(tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"^eval.rivals.x: .*{told}"):
        Rival(str(tmp_path / name.partition("/")[0]), "eval.rivals.x")
