"""Inference: from a picture, samplers, precision, batches, offloading, compilation; and a release back in Python."""

import copy
import dataclasses
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image
from diffusers.pipelines.deprecated.wuerstchen.pipeline_wuerstchen_prior import DEFAULT_STAGE_C_TIMESTEPS
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from datasets.pictures import opened
from pipeline.__main__ import main
from pipeline.models.drawing import drawn
from pipeline.verbs import sample as sample_verb
from stages import diffusion
from stages.models.compressor import Compressor
from stages.models.geometry import BadImageSize, denormalise, nearest_size, normalise
from stages.models.previewer import Previewer
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.models.text import seeded_tower
from stages.sampling import sample
from stages.sampling.denoising import Noise, Steps, sample_code
from stages.settings.models import (
    CompressorConfig,
    EfficientNetStages,
    PreviewerConfig,
    SeededTextConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)
from stages.settings.sampling import SamplingConfig
from stages.weights import release

M = TypeVar("M", bound=nn.Module)

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "drawing.md"
STAGE_A = StageAConfig(bottleneck_blocks=1, hidden=16, codebook_size=16, scale=0.7)
STAGE_B = StageBConfig(
    widths=(8, 16),
    blocks=(1, 1),
    patterns=("CT", "CTA"),
    heads=(0, 2),
    inject_code=(False, True),
    cond_width=24,
    text_width=20,
    timestep_channels=16,
)
STAGE_C = StageCConfig(width=32, depth=2, heads=4, text_width=24, timestep_channels=32)
BLOCKS = [{"block": "fused", "expand": 2, "stride": 2, "channels": 8, "layers": 1}] * 4
BACKBONE = EfficientNetStages.model_validate({"stem": 8, "stages": BLOCKS, "last": 16})
COMPRESSOR = CompressorConfig(backbone=BACKBONE, batch_norm="fixed")
TEXT_B = SeededTextConfig(width=20, layers=2, heads=2, context_length=12, seed=1)
TEXT_C = SeededTextConfig(width=24, layers=1, heads=3, context_length=16, seed=2)
SETTINGS = SamplingConfig(width=256, height=256, steps_c=3, steps_b=2, guidance_c=2.0, guidance_b=1.5)


def randomised(module: M, generator: torch.Generator, std: float) -> M:
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(std=std, generator=generator)
    return module.eval()


@pytest.fixture(scope="module")
def models() -> sample.Models:
    generator = torch.Generator().manual_seed(0)
    stage_a = randomised(StageA(STAGE_A), generator, 0.1)
    stage_c = randomised(StageC(STAGE_C), generator, 0.2)
    with torch.no_grad():
        stage_a.out_block[0].weight.mul_(0.02)  # pixels within [0, 1]
        stage_a.out_block[0].bias.add_(0.5)
        stage_c.out[1].weight.mul_(0.15)  # a divisor |1 - b| near 0 would magnify rounding
    return sample.Models(
        stage_a=stage_a,
        stage_b=randomised(StageB(STAGE_B), generator, 0.2),
        stage_c=stage_c,
        text_b=randomised(seeded_tower(TEXT_B), generator, 0.5),
        text_c=randomised(seeded_tower(TEXT_C), generator, 0.5),
        compressor=randomised(Compressor(COMPRESSOR), generator, 0.1),
        settings=SETTINGS,
    )


@pytest.fixture(scope="module")
def written(models: sample.Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models' release."""
    assert models.compressor is not None
    root = tmp_path_factory.mktemp("there") / "release"
    files = release.release_files(
        models,
        models.compressor,
        stage_a_config=STAGE_A,
        stage_b_config=STAGE_B,
        stage_c_config=STAGE_C,
        compressor_config=COMPRESSOR,
        card="",
    )
    for name, content in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def pictures(count: int, side: int = 128) -> torch.Tensor:
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return (nn.functional.interpolate(noise, (side, side), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def small(**changes: Any) -> SamplingConfig:
    """The settings at 128 x 128 px, and with other changes."""
    return SamplingConfig.model_validate(SETTINGS.model_dump() | {"width": 128, "height": 128} | changes)


def one(
    models: sample.Models,
    seed: int = 0,
    *,
    image: torch.Tensor | None = None,
    strength: float | None = None,
    preview: bool = False,
    device: torch.device | None = None,
    **changes: Any,
) -> torch.Tensor:
    drawn = sample.generate(
        models, ["red heart"], [seed], small(negative="blurry", **changes),
        image=image, strength=strength, preview=preview, device=device,
    )  # fmt: skip
    return drawn.int()


# -------------------------------------------------------------------------------------------------------- times


@given(st.integers(1, 200), st.floats(1e-6, 1.0))
def test_a_picture_gets_its_share_of_the_steps(steps: int, strength: float) -> None:
    times = diffusion.times_from(diffusion.sampling_times(steps), strength)
    assert times[0] == np.float32(strength)
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    assert len(times) - 1 in {math.ceil(strength * steps * (1 - 1e-3)), math.ceil(strength * steps)}


@pytest.mark.parametrize("times", [diffusion.sampling_times(7), diffusion.released_sampling_times()])
def test_strength_1_leaves_all_times(times: torch.Tensor) -> None:
    assert torch.equal(diffusion.times_from(times, 1.0), times)


def test_the_released_sampling_times_are_diffusers() -> None:
    assert torch.equal(
        diffusion.released_sampling_times(), torch.tensor(DEFAULT_STAGE_C_TIMESTEPS, dtype=torch.float32)
    )
    assert len(diffusion.released_sampling_times()) - 1 == 29


def test_the_released_sampling_times_draw_the_stock_pipelines_picture(models: sample.Models, written: Path) -> None:
    stock = AutoPipelineForText2Image.from_pretrained(written)
    theirs = stock(
        "red heart",
        negative_prompt="blurry",
        width=128,
        height=128,
        prior_timesteps=DEFAULT_STAGE_C_TIMESTEPS,
        prior_guidance_scale=2.0,
        num_inference_steps=2,
        decoder_guidance_scale=1.5,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    ours = one(models, seed=5, timesteps="released")[0].numpy()
    assert np.abs(np.asarray(theirs, int) - ours).max() <= 1
    assert np.abs(one(models, seed=5)[0].numpy() - ours).max() > 10  # three even steps draw another


# ------------------------------------------------------------------------------------------------ from a picture


def test_a_picture_alone_is_reconstructed(models: sample.Models) -> None:
    """By the path that the panels of a training take."""
    assert models.compressor is not None
    assert models.text_b is not None
    image = pictures(2)
    texts = ["red heart", ""]
    ours = sample.generate(models, texts, [4, 5], small(guidance_b=1.0), image=image)
    text, _ = models.text_b.encode(texts)
    theirs = sample.reconstruct_b(models.stage_a, models.stage_b, models.compressor, image, text, [4, 5], 2)
    assert torch.equal(ours, theirs)


def test_at_strength_1_nothing_of_the_picture_is_left(models: sample.Models) -> None:
    assert torch.equal(one(models, image=pictures(1), strength=1.0), one(models))


def test_at_strength_0_the_picture_is_left(models: sample.Models) -> None:
    """There the noise has the schedule's least share, sqrt(1 - 0.9999) = 0.01."""
    assert models.compressor is not None
    with torch.no_grad():
        start = models.compressor(pictures(1) / 255)
        text = models.text_c.encode(["red heart"])[0]
        errors = []
        for strength in (0.001, 0.3, 0.9):
            steps = Steps(diffusion.times_from(diffusion.sampling_times(10), strength))
            noise = Noise([0], torch.device("cpu"))
            code = sample_code(models.stage_c, text, text, noise, 128, 128, steps, start=start)
            errors.append((normalise(code) - normalise(start)).square().mean().sqrt().item())
    assert errors[0] == pytest.approx(0.01, rel=0.3)
    assert errors[0] < errors[1] < errors[2]


def test_image_to_image_diffuses_the_code_and_goes_on_from_there(models: sample.Models) -> None:
    """One DDIM step from t = 0.4 by hand."""
    assert models.compressor is not None
    with torch.no_grad():
        start = models.compressor(pictures(1) / 255)
        text = models.text_c.encode(["red heart"])[0]
        t = torch.tensor([0.4])
        abar = diffusion.alpha_bar(t)
        epsilon = torch.randn(16, 3, 3, generator=torch.Generator().manual_seed(9))
        x = abar.sqrt() * (start + 1) / 42 + (1 - abar).sqrt() * epsilon
        clean = (x - (1 - abar).sqrt() * models.stage_c(x, t, text)) / abar.sqrt()
        noise = Noise([9], torch.device("cpu"))
        steps = Steps(diffusion.times_from(diffusion.sampling_times(2), 0.4), sampler="ddim")
        code = sample_code(models.stage_c, text, text, noise, 128, 128, steps, start=start)
    torch.testing.assert_close(code, denormalise(clean), rtol=1e-4, atol=1e-3)


def test_a_picture_of_another_size_is_refused(models: sample.Models) -> None:
    with pytest.raises(BadImageSize, match="256x256 px, not 128x128 px"):
        one(models, image=pictures(1, side=256))


@pytest.mark.parametrize(
    ("size", "area", "nearest"),
    [
        ((3000, 2000), 1024**2, (1280, 896)),
        ((2000, 3000), 1024**2, (896, 1280)),
        ((40, 40), 512**2, (512, 512)),
        ((5000, 40), 256**2, (512, 128)),
        ((1, 10_000), 128**2, (128, 128)),
    ],
)
def test_the_nearest_size_keeps_aspect_and_area(size: tuple[int, int], area: int, nearest: tuple[int, int]) -> None:
    assert nearest_size(*size, area) == nearest


# ------------------------------------------------------------------------------------- samplers, precision, device


def test_ddim_draws_noise_once_a_stage(models: sample.Models, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    honest = Noise.__call__

    def counted(self: Noise, *shape: int) -> torch.Tensor:
        calls.append(shape)
        return honest(self, *shape)

    monkeypatch.setattr(Noise, "__call__", counted)
    first = one(models, sampler="ddim")
    assert calls == [(16, 3, 3), (4, 32, 32)]
    assert torch.equal(one(models, sampler="ddim"), first)
    calls.clear()
    assert not torch.equal(one(models), first)
    assert len(calls) == (3 + 1) + (2 + 1)


def test_bf16_is_close_to_fp32_and_not_the_same(models: sample.Models) -> None:
    error = (one(models, precision="bf16") - one(models)).abs().float()
    assert 0 < error.mean() < 3  # of 255 levels


def test_the_batch_changes_a_picture_by_rounding_alone(models: sample.Models) -> None:
    texts, seeds = ["a cat", "a dog", "red heart", "a cat", "the sun"], range(5)
    alone, four = (
        np.stack(list(drawn(models, texts, seeds, small(), batch, torch.device("cpu")))).astype(int) for batch in (1, 4)
    )
    assert np.abs(alone - four).max() <= 1
    assert (alone != four).mean() < 1e-3
    assert np.abs(alone[0] - alone[3]).max() > 10  # seeds show


def test_offloading_moves_one_model_at_a_time(models: sample.Models, monkeypatch: pytest.MonkeyPatch) -> None:
    away: list[nn.Module] = []
    turns: list[str] = []
    names = {id(module): name for name, module in vars(models).items() if isinstance(module, nn.Module)}
    elsewhere = torch.device("cpu:0")  # another name of the same memory

    def to(self: nn.Module, device: torch.device) -> nn.Module:
        if device == elsewhere:
            away.append(self)
            turns.append(names[id(self)])
        else:
            away.remove(self)
        assert len(away) <= 1
        return self

    plain = one(models, image=pictures(1), strength=0.5)
    monkeypatch.setattr(nn.Module, "to", to)
    assert torch.equal(one(models, image=pictures(1), strength=0.5, device=elsewhere), plain)
    assert turns == ["compressor", "text_c", "stage_c", "text_b", "stage_b", "stage_a"]
    assert away == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offloading_gives_the_same_picture_on_a_gpu(models: sample.Models) -> None:
    gpu = torch.device("cuda")
    offloaded = one(models, device=gpu)
    assert all(not weight.is_cuda and not weight.is_inference() for weight in models.stage_c.parameters())
    there = copy.deepcopy(models)
    for module in vars(there).values():
        if isinstance(module, nn.Module):
            module.to(gpu)
    assert torch.equal(one(there), offloaded)


def test_compiled_models_draw_the_same_picture(models: sample.Models) -> None:
    compiled = copy.deepcopy(models)
    compiled.compile(backend="aot_eager")
    for guidance in (1.0, 2.0):
        changes = {"guidance_c": guidance, "guidance_b": guidance}
        assert (one(compiled, **changes) - one(models, **changes)).abs().max() <= 1


# ------------------------------------------------------------------------------------------- a release in Python


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
    assert (one(again, image=image, strength=0.5) - one(models, image=image, strength=0.5)).abs().max() <= 1


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
    assert torch.equal(one(seeing, seed=7, preview=True), sample.preview(previewer, code).int())
    assert one(seeing, image=pictures(1), preview=True).shape == (1, 24, 24, 3)


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


# ---------------------------------------------------------------------------------------------------- the verb


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
        (["image=text.png"], "image=text.png: no picture in one of the formats JPEG, PNG, WEBP, GIF"),
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
    source = [] if words[0].startswith("from=") else [f"from={written}"]
    assert main(["sample", *source, "prompt=x", "out=out", *words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert told in message
    assert message.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["text.png"]


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
