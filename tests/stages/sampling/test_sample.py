"""Inference: from a picture, samplers, precision, batches, offloading, compilation."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image
from diffusers.pipelines.deprecated.wuerstchen.pipeline_wuerstchen_prior import DEFAULT_STAGE_C_TIMESTEPS
from torch import nn

from pipeline.models.drawing import drawn
from stages import diffusion
from stages.models.geometry import BadImageSize, denormalise, nearest_size, normalise
from stages.sampling import sample
from stages.sampling.denoising import Noise, Steps, sample_code
from tests import small_release
from tests.small_release import draw_one, pictures, small

models, written = small_release.models, small_release.written


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
    assert torch.equal(draw_one(models, image=pictures(1), strength=1.0), draw_one(models))


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
        draw_one(models, image=pictures(1, side=256))


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
    ours = draw_one(models, seed=5, timesteps="released")[0].numpy()
    assert np.abs(np.asarray(theirs, int) - ours).max() <= 1
    assert np.abs(draw_one(models, seed=5)[0].numpy() - ours).max() > 10  # three even steps draw another


def test_ddim_draws_noise_once_a_stage(models: sample.Models, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    honest = Noise.__call__

    def counted(self: Noise, *shape: int) -> torch.Tensor:
        calls.append(shape)
        return honest(self, *shape)

    monkeypatch.setattr(Noise, "__call__", counted)
    first = draw_one(models, sampler="ddim")
    assert calls == [(16, 3, 3), (4, 32, 32)]
    assert torch.equal(draw_one(models, sampler="ddim"), first)
    calls.clear()
    assert not torch.equal(draw_one(models), first)
    assert len(calls) == (3 + 1) + (2 + 1)


def test_bf16_is_close_to_fp32_and_not_the_same(models: sample.Models) -> None:
    error = (draw_one(models, precision="bf16") - draw_one(models)).abs().float()
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

    plain = draw_one(models, image=pictures(1), strength=0.5)
    monkeypatch.setattr(nn.Module, "to", to)
    assert torch.equal(draw_one(models, image=pictures(1), strength=0.5, device=elsewhere), plain)
    assert turns == ["compressor", "text_c", "stage_c", "text_b", "stage_b", "stage_a"]
    assert away == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offloading_gives_the_same_picture_on_a_gpu(models: sample.Models) -> None:
    gpu = torch.device("cuda")
    offloaded = draw_one(models, device=gpu)
    assert all(not weight.is_cuda and not weight.is_inference() for weight in models.stage_c.parameters())
    there = copy.deepcopy(models)
    for module in vars(there).values():
        if isinstance(module, nn.Module):
            module.to(gpu)
    assert torch.equal(draw_one(there), offloaded)


def test_compiled_models_draw_the_same_picture(models: sample.Models) -> None:
    compiled = copy.deepcopy(models)
    compiled.compile(backend="aot_eager")
    for guidance in (1.0, 2.0):
        changes = {"guidance_c": guidance, "guidance_b": guidance}
        assert (draw_one(compiled, **changes) - draw_one(models, **changes)).abs().max() <= 1
