"""sample from a release: pictures by the words of a command, their names, and what is refused."""

import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.__main__ import main
from pipeline.verbs import sample as sample_verb
from stages.sampling import sample
from tests import small_release
from tests.small_release import SETTINGS, pictures, small

models, written = small_release.models, small_release.written


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def png(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def drawn_in(folder: Path) -> dict[str, Path]:
    """The pictures that `sample` drew, by prompt and seed."""
    return {path.stem[:-7]: path for path in folder.iterdir()}


def test_sample_from_a_release_needs_no_conf(models: sample.Models, written: Path, folder: Path) -> None:
    words = ["prompt=red heart", "seed=7", "n=2", "guidance_c=3", "sample.steps_b=1", "sample.batch=2"]
    assert main(["sample", f"from={written}", "out=out", *words]) == 0
    assert drawn_in(folder / "out").keys() == {"red-heart-7", "red-heart-8"}
    for seed in (7, 8):
        expected = np.asarray(sample.draw(models, "red heart", seed=seed, guidance_c=3, steps_b=1), int)
        assert np.abs(png(drawn_in(folder / "out")[f"red-heart-{seed}"]) - expected).max() <= 1
    assert sorted(path.name for path in folder.iterdir()) == ["out"]


@pytest.mark.parametrize(("words", "size"), [([], (512, 128)), (["width=128"], (128, 256))])
def test_a_given_picture_is_fitted(
    words: list[str], size: tuple[int, int], models: sample.Models, written: Path, folder: Path
) -> None:
    """Seen upright: 64 x 256 px stored on their side."""
    upright = Image.linear_gradient("L").resize((256, 64)).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    buffer = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    (folder / "stripe.png").write_bytes(buffer.getvalue())
    assert main(["sample", f"from={written}", "image=stripe.png", "seed=1", "out=out", *words]) == 0
    found = png(drawn_in(folder / "out")["stripe-1"])
    assert found.shape == (size[1], size[0], 3)
    if not words:
        image = torch.from_numpy(np.asarray(upright.resize(size, Image.Resampling.BICUBIC)).copy())
        expected = sample.generate(models, [""], [1], small(width=512), image=image.permute(2, 0, 1)[None])
        assert np.abs(found.astype(int) - expected[0].int().numpy()).max() <= 1


def test_a_prompt_of_ten_thousand_characters_is_cut_and_said_so(
    written: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", f"from={written}", "out=out", "width=128", "height=128", f"prompt={'wide ' * 2000}"]) == 0
    assert "the prompt is longer than 12 tokens; its end is cut off" in capsys.readouterr().err
    (picture,) = (folder / "out").iterdir()
    assert len(picture.name) < 100


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["from=nowhere"], "nowhere/sampling.json is missing"),
        (["width=192"], "width=192: input should be a multiple of 128"),
        (["guidance_b=-1"], "guidance_b=-1: input should be greater than or equal to 0"),
        (["steps_c=9", "sample.timesteps=released"], "steps_c=9: sample.timesteps=released has 29 steps"),
        (["sample.sampler=euler"], "sample.sampler=euler: input should be 'ddpm' or 'ddim'"),
        (["image=nothing.png"], "image=nothing.png: there is no such file"),
        (["image=text.png"], "image=text.png: no whole picture of the formats JPEG, PNG, WEBP, GIF"),
        (["image=pipe.png"], "image=pipe.png: is no file; give a picture's path"),
        (["image=."], "image=.: is no file; give a picture's path"),
        (["image=text.png", "strength=0"], "strength=0: input should be greater than 0"),
        (["image=text.png", "strength=1.5"], "strength=1.5: input should be less than or equal to 1"),
        (["image=text.png", "strength=nan"], "strength=nan: input should be"),
        (["preview=true"], "preview=true: a release holds no previewer"),
        (["preview=perhaps"], "preview=perhaps: input should be a valid boolean"),
        (["strength=0.5"], "strength=0.5: how far to go from a picture; give image=PATH too"),
    ],
)
def test_refusals_create_nothing(
    words: list[str], told: str, written: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "text.png").write_text("no picture")
    os.mkfifo(folder / "pipe.png")
    source = [] if words[0].startswith("from=") else [f"from={written}"]
    assert main(["sample", *source, "prompt=x", "out=out", *words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert told in message
    assert message.count("\n") == 1
    assert {path.name for path in folder.iterdir()} == {"text.png", "pipe.png"}


def test_another_setting_never_overwrites_a_picture_and_the_same_command_does(written: Path, folder: Path) -> None:
    """Also on the usual way from a picture to its variant: the same prompt with the same seed."""
    words = ["sample", f"from={written}", "prompt=x", "seed=7", "width=128", "height=128", "out=."]
    assert main(words) == 0
    (first,) = folder.iterdir()
    content = first.read_bytes()
    assert main(words) == 0
    assert list(folder.iterdir()) == [first]
    assert main([*words, f"image={first.name}", "strength=0.5"]) == 0
    assert first.read_bytes() == content
    assert [re.fullmatch(r"x-7-[0-9a-f]{6}\.png", path.name) is not None for path in folder.iterdir()] == [True, True]


def test_all_that_decides_a_picture_shows_in_its_name() -> None:
    plain = {**SETTINGS.model_dump(), "prompt": "x", "out": "out"}
    image = pictures(1)
    other: list[tuple[dict[str, Any], torch.Tensor | None, list[str]]] = [
        ({}, None, ["a"]),
        ({}, None, ["b"]),
        ({}, image, ["a"]),
        ({}, 255 - image, ["a"]),
        ({"strength": 0.5}, image, ["a"]),
        *(({name: value}, None, ["a"]) for name, value in {
            "prompt": "X", "negative": "y", "width": 128, "height": 128, "steps_c": 4, "steps_b": 4, "guidance_c": 4,
            "guidance_b": 4, "sampler": "ddim", "timesteps": "released", "precision": "bf16", "preview": True,
        }.items()),
    ]  # fmt: skip
    digits = [sample_verb._digits(sample_verb.Request(**(plain | changes)), *rest) for changes, *rest in other]
    assert len(set(digits)) == len(other)
    same = sample_verb.Request(**(plain | {"seed": 3, "n": 2, "out": "elsewhere", "image": "b.png"}))
    assert sample_verb._digits(same, None, ["a"]) == digits[0]


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        ({"negative": "y"}, set()),
        ({"negative": "y", "guidance_c": 1, "guidance_b": 1}, {"negative"}),
        (
            {"image": "a.png", "steps_c": 4, "guidance_c": 4, "guidance_b": 1, "negative": "y"},
            {"steps_c", "guidance_c", "negative"},
        ),
        ({"image": "a.png", "strength": 0.5, "prompt": "x", "steps_c": 4}, set()),
        (
            {"preview": True, "steps_b": 4, "guidance_b": 4, "guidance_c": 1, "negative": "y"},
            {"steps_b", "guidance_b", "negative"},
        ),
    ],
)
def test_words_that_change_nothing_are_known(words: dict[str, Any], idle: set[str]) -> None:
    settings = {**SETTINGS.model_dump(), "guidance_c": 2.0, "guidance_b": 1.0, **words}
    assert sample_verb.Request(**settings).idle & words.keys() == idle


def test_a_word_that_changes_nothing_is_told(written: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", f"from={written}", "prompt=x", "width=128", "height=128", "out=.", "negative=ugly"]
    assert main([*words, "guidance_c=1", "guidance_b=1"]) == 0
    assert "negative= changes nothing: no stage draws with guidance above 1" in capsys.readouterr().err
