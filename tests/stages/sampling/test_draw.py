"""A release in Python: what it loads, draws, shares, and refuses by the name of a file."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from datasets.pictures import opened
from stages import diffusion
from stages.models.previewer import Previewer
from stages.models.text import seeded_tower
from stages.sampling import sample
from stages.sampling.denoising import Noise, Steps, sample_code
from stages.settings.models import PreviewerConfig
from stages.weights import release
from tests import small_release
from tests.small_release import SETTINGS, TEXT_B, draw_one, pictures, randomised, small

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "drawing.md"
models, written = small_release.models, small_release.written


def test_a_release_loads_back(models: sample.Models, written: Path) -> None:
    again = release.load(written)
    assert again.settings == SETTINGS
    for name, module in vars(models).items():
        if isinstance(module, nn.Module):
            loaded = getattr(again, name)
            assert not loaded.training
            state = loaded.state_dict()
            assert state.keys() == module.state_dict().keys()
            assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())
    image = pictures(1)  # where weights lie in memory decides over a kernel's last bit
    assert (draw_one(again, image=image, strength=0.5) - draw_one(models, image=image, strength=0.5)).abs().max() <= 1


def test_draw_uses_the_releases_settings_and_refuses_unknown_ones(models: sample.Models) -> None:
    picture = sample.draw(models, "red heart", seed=2, guidance_b=1.0)
    expected = sample.generate(models, ["red heart"], [2], SETTINGS.model_copy(update={"guidance_b": 1.0}))
    assert np.array_equal(np.asarray(picture), expected[0].numpy())
    with pytest.raises(ValueError, match="stepsc"):
        sample.draw(models, "red heart", stepsc=3)


def test_draw_takes_a_picture_as_the_verb_does(models: sample.Models) -> None:
    """A landscape of 3:1 becomes 384x128, the nearest size to the area of 256x256."""
    wide = Image.linear_gradient("L").resize((300, 100)).convert("RGB")
    fitted = wide.resize((384, 128), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1)[None]
    settings = small(width=384)
    for prompt, strength in (("", None), ("red heart", 0.5)):
        expected = sample.generate(models, [prompt], [4], settings, image=image, strength=strength)[0].numpy()
        assert np.array_equal(np.asarray(sample.draw(models, prompt, seed=4, image=wide, strength=strength)), expected)
    assert sample.draw(models, image=wide, width=128, height=256).size == (128, 256)


def test_draw_takes_a_picture_upright_and_on_white(models: sample.Models) -> None:
    """Black that shines through whole is white; 100 x 300 px to be turned by 90 degrees are 300 x 100."""
    seen = Image.new("RGB", (300, 100), "white")
    seen.paste("blue", (0, 0, 150, 100))
    stored = seen.convert("RGBA")
    stored.paste((0, 0, 0, 0), (150, 0, 300, 100))
    turned = stored.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[274] = 6
    expected = np.asarray(sample.draw(models, image=seen))
    assert np.array_equal(np.asarray(sample.draw(models, image=turned)), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_draw_opens_a_picture_as_the_trainings_do(mode: str, models: sample.Models, tmp_path: Path) -> None:
    """Grey of 16 bit, among others, is not clipped at 255."""
    ramp = Image.linear_gradient("L")
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(ramp, np.uint16) * 257)
    else:
        picture = ramp.convert("RGB").convert(mode)
        if mode.endswith("A"):
            picture.putalpha(Image.linear_gradient("L").rotate(90))
    assert picture.mode == mode
    path = tmp_path / f"ramp.{'jpg' if mode == 'CMYK' else 'png'}"
    picture.save(path)
    expected = np.asarray(sample.draw(models, image=opened(path.read_bytes()), width=128, height=128))
    for image in (path, str(path), Image.open(path)):
        assert np.array_equal(np.asarray(sample.draw(models, image=image, width=128, height=128)), expected)


def test_draw_takes_prompts_as_a_batch_with_seeds_that_count_up(models: sample.Models) -> None:
    small = {"width": 128, "height": 128}
    both = sample.draw(models, ["red heart", "a cat"], seed=3, **small)
    assert isinstance(both, list)
    for number, prompt in enumerate(["red heart", "a cat"]):
        alone = np.asarray(sample.draw(models, prompt, seed=3 + number, **small), int)
        assert np.abs(np.asarray(both[number], int) - alone).max() <= 1
    for prompts in ([], ["red heart", ""]):
        with pytest.raises(ValueError, match="draw needs a prompt"):
            sample.draw(models, prompts)


def test_draw_warns_of_a_prompt_that_is_cut(models: sample.Models) -> None:
    with pytest.warns(UserWarning, match="longer than 12 tokens, its end is cut off: wide wide") as caught:
        sample.draw(models, "wide " * 20, width=128, height=128)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({}, "draw needs a prompt"),
        ({"image": Image.new("RGB", (8, 8)), "strength": 0.5}, "draw needs a prompt"),
        ({"prompt": "x", "strength": 0.5}, "strength=0.5: how far to go from an image"),
        ({"prompt": "x", "image": Image.new("RGB", (8, 8)), "strength": 0.0}, "strength=0.0: must be above 0"),
        (
            {"prompt": "x", "image": Image.new("RGB", (8, 8)), "strength": 2},
            "strength=2: must be above 0 and at most 1",
        ),
    ],
)
def test_draw_says_what_is_missing(models: sample.Models, words: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        sample.draw(models, **words)


def test_a_preview_shows_the_code_of_the_picture_with_that_seed(models: sample.Models) -> None:
    previewer = randomised(Previewer(PreviewerConfig(width=8)), torch.Generator().manual_seed(1), 0.3)
    seeing = dataclasses.replace(models, previewer=previewer)
    with torch.inference_mode():
        text, negative = (models.text_c.encode([words])[0] for words in ("red heart", "blurry"))
        noise, steps = Noise([7], torch.device("cpu")), Steps(diffusion.sampling_times(3), guidance=2.0)
        code = sample_code(models.stage_c, text, negative, noise, 128, 128, steps)
    assert torch.equal(draw_one(seeing, seed=7, preview=True), sample.preview(previewer, code).int())
    assert draw_one(seeing, image=pictures(1), preview=True).shape == (1, 24, 24, 3)


def test_equal_text_towers_are_loaded_once(models: sample.Models, written: Path, tmp_path: Path) -> None:
    assert release.load(written).text_b is not release.load(written).text_c
    shared = tmp_path / "release"
    shutil.copytree(written, shared)
    sharing(lambda folder: None)(shared)
    loaded = release.load(shared)
    assert loaded.text_b is loaded.text_c


def test_a_tower_that_two_stages_share_encodes_a_drawings_texts_once(
    models: sample.Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, encoded = seeded_tower(TEXT_B), []

    def encode(texts: list[str]) -> tuple[torch.Tensor, int]:
        encoded.append(list(texts))
        return type(tower).encode(tower, texts)

    monkeypatch.setattr(tower, "encode", encode)
    settings = small(negative="blurry")
    captions = sample.Captions(models, ["a", "b", "a"], settings.negative, torch.device("cpu"))
    text, negative = captions.by(tower)
    assert captions.by(tower)[0] is text
    assert encoded == [["a", "b"], ["blurry"]]
    torch.testing.assert_close(text, type(tower).encode(tower, ["a", "b", "a"])[0])
    torch.testing.assert_close(negative, type(tower).encode(tower, ["blurry"] * 3)[0])


def changed(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def poisoned(name: str, key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = load_file(folder / name)
        state[key].view(-1)[-1] = float("nan")
        save_file(state, folder / name)

    return change


def sharing(damage: Callable[[Path], Any]) -> Callable[[Path], None]:
    """The same damage to a release whose two text towers are equal."""

    def change(folder: Path) -> None:
        for part in ("text_encoder", "tokenizer"):
            shutil.rmtree(folder / part)
            shutil.copytree(folder / f"prior_{part}", folder / part)
        damage(folder)

    return change


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "sampling.json").unlink(), "sampling.json is missing"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json is damaged"),
        (lambda folder: (folder / "vqgan/config.json").write_text("[]"), "vqgan/config.json holds no JSON object"),
        (lambda folder: shutil.rmtree(folder / "compressor"), "compressor/config.json is missing"),
        (
            lambda folder: (folder / "text_encoder/model.safetensors").unlink(),
            "text_encoder/model.safetensors is missing",
        ),
        (
            poisoned("prior_prior/diffusion_pytorch_model.safetensors", "projection.weight"),
            "damaged: its projection.weight holds values that are no finite numbers",
        ),
        (
            sharing(lambda folder: (folder / "tokenizer/merges.txt").write_text("a b\n")),
            "/tokenizer/merges.txt is not of CLIP's tokenizer",
        ),
        (sharing(changed("text_encoder/config.json", hidden_act="gelu_new")), "hidden_act = gelu_new, which must be"),
        (cut("decoder/diffusion_pytorch_model.safetensors"), "decoder/diffusion_pytorch_model.safetensors is damaged"),
        (changed("model_index.json", _class_name="StableDiffusionPipeline"), "_class_name = StableDiffusionPipeline"),
        (changed("scheduler/scheduler_config.json", s=0.02), "has s = 0.02, which must be 0.008"),
        (changed("prior/model_index.json", latent_mean=1.0), "has latent_mean = 1.0, which must be 42.0"),
        (
            changed("prior_prior/config.json", c=64),
            r"holds \[128\] float32 for blocks.0.\S+, but its config.json asks for \[256\]",
        ),
        (changed("prior_prior/config.json", nhead="x"), "prior_prior/config.json: heads: "),
        (changed("decoder/config.json", nhead=[-1, 3]), "must divide the width"),
        (changed("text_encoder/config.json", hidden_act="quick_gelu"), "hidden_act = quick_gelu, which must be gelu"),
        (changed("text_encoder/config.json", hidden_size=10), "intermediate_size = 80, which must be 40"),
        (changed("sampling.json", width=100), "sampling.json: width: "),
        (lambda folder: (folder / "tokenizer/merges.txt").write_text("a b\n"), "merges.txt is not of CLIP's tokenizer"),
    ],
)
def test_what_is_no_release_is_refused_by_the_files_name(
    damage: Callable[[Path], Any], told: str, written: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "release"
    shutil.copytree(written, folder)
    damage(folder)
    with pytest.raises(release.BadRelease, match=told) as caught:
        release.load(folder)
    assert "\n" not in str(caught.value)


def test_the_lines_of_the_guide(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lines,) = re.findall(r"```python\n(from stages.*?)```", GUIDE.read_text(), re.DOTALL)
    shown: list[Image.Image] = []
    monkeypatch.setattr(Image.Image, "show", lambda self: shown.append(self))
    monkeypatch.chdir(written.parent)
    exec(lines, {})
    assert [picture.size for picture in shown] == [(256, 256)]
