"""Sampling: text -> Stage C -> Stage B -> Stage A's decoder -> pixels; and reconstructions from true latents.

Each sample's noise comes from its own seed and is drawn in the order of diffusers' Würstchen pipelines, so
that a picture does not depend on its batch, and the stock pipeline with a CPU generator of that seed makes
the same one from an export.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages import diffusion
from stages.baseline import Baseline
from stages.geometry import check_size, code_side, latent_side, normalise
from stages.layers import to_unit_range
from stages.previewer import Previewer
from stages.stage_a import StageA
from stages.stage_b import StageB
from stages.stage_c import StageC

if TYPE_CHECKING:  # these need torchvision and open_clip, which not every process has to load
    from stages.compressor import Compressor
    from stages.text import TextTower


@dataclass(frozen=True)
class Models:
    """All that turns text into pixels, in evaluation mode. Stage B and C may share one text tower."""

    stage_a: StageA
    stage_b: StageB
    stage_c: StageC
    text_b: "TextTower | None"
    """None where Stage B was trained without text."""
    text_c: "TextTower"


class Noise:
    """Standard normal numbers of each sample from its own seed; successive calls go on in each stream."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def __call__(self, *shape: int) -> Tensor:
        """(B, *shape) fp32."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators]).to(self.device)


@torch.inference_mode()
def generate(
    models: Models,
    texts: Sequence[str],
    negatives: Sequence[str],
    seeds: Sequence[int],
    *,
    width: int,
    height: int,
    steps_c: int,
    steps_b: int,
    guidance_c: float,
    guidance_b: float,
) -> Tensor:
    """Draw one picture for each caption: (B, H, W, 3) uint8 on the CPU.

    negatives: captions to keep away from, "" for none; used where guidance is above 1 (1 or less turns it
    off). width, height: pixels, multiples of 128, else BadImageSize is raised. steps: model calls.
    """
    assert len(texts) == len(negatives) == len(seeds)
    check_size(width, height)
    noise = Noise(seeds, models.stage_c.projection.weight.device)
    text, negative = models.text_c.encode(texts)[0], models.text_c.encode(negatives)[0]
    code = sample_code(models.stage_c, text, negative, noise, width, height, steps_c, guidance_c)
    text_b = negative_b = None
    if models.text_b is not None:
        text_b, negative_b = models.text_b.encode(texts)[0], models.text_b.encode(negatives)[0]
    latents = sample_latents(models.stage_b, code, text_b, negative_b, noise, steps_b, guidance_b)
    return to_pixels(models.stage_a.decode(latents))


def sample_code(
    stage_c: StageC,
    text: Tensor,
    negative: Tensor,
    noise: Noise,
    width: int,
    height: int,
    steps: int,
    guidance: float,
) -> Tensor:
    """Sample raw codes (B, 16, h, w), h = ceil(height / 42.67), from text hidden states (B, N, D)."""
    shape = (stage_c.latent_channels, code_side(height), code_side(width))
    return stage_c.to_code(denoise(_guided(stage_c, text, negative, guidance), shape, noise, steps))


def _guided(
    model: StageC | Baseline, text: Tensor, negative: Tensor, guidance: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """The model's noise prediction (x, t) for a text, guided away from the negative one."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        if guidance <= 1:
            return model(x, t, text)
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, negative]))
        conditional, unconditional = both.chunk(2)
        return diffusion.guide(unconditional, conditional, guidance)

    return predict


def sample_latents(
    stage_b: StageB,
    code: Tensor,
    text: Tensor | None,
    negative: Tensor | None,
    noise: Noise,
    steps: int,
    guidance: float,
) -> Tensor:
    """Sample Stage A's latents (B, 4, int(10.67 h), int(10.67 w)) for raw codes (B, 16, h, w).

    Unconditional means a zero code and the negative text.
    """
    shape = (stage_b.latent_channels, latent_side(code.shape[-2]), latent_side(code.shape[-1]))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        if guidance <= 1:
            return stage_b(x, t, code, text)
        codes = torch.cat([code, torch.zeros_like(code)])
        texts = None if text is None or negative is None else torch.cat([text, negative])
        conditional, unconditional = stage_b(torch.cat([x, x]), torch.cat([t, t]), codes, texts).chunk(2)
        return diffusion.guide(unconditional, conditional, guidance)

    return denoise(predict, shape, noise, steps)


def denoise(predict: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], noise: Noise, steps: int) -> Tensor:
    """DDPM sampling from pure noise to t = 0: (B, *shape) fp32."""
    x = noise(*shape)
    for t, t_next in pairwise(diffusion.sampling_times(steps).to(x.device)):
        eps = predict(x, t.expand(x.shape[0]))
        x = diffusion.ddpm_step(x, eps, t, t_next, noise(*shape))  # also draws for the last step, like diffusers
    return x


@torch.inference_mode()
def generate_baseline(
    stage_a: StageA,
    baseline: Baseline,
    text: Tensor,
    negative: Tensor,
    seeds: Sequence[int],
    *,
    width: int,
    height: int,
    steps: int,
    guidance: float,
) -> Tensor:
    """Draw pictures with the baseline and Stage A's decoder: (B, H, W, 3) uint8 on the CPU.

    text, negative: hidden states (B, N, D); the latter are used where guidance is above 1. width, height: pixels,
    multiples of 128, else BadImageSize is raised. steps: model calls.
    """
    check_size(width, height)
    shape = (baseline.latent_channels, latent_side(code_side(height)), latent_side(code_side(width)))
    latents = denoise(_guided(baseline, text, negative, guidance), shape, Noise(seeds, text.device), steps)
    return to_pixels(stage_a.decode(latents))


@torch.inference_mode()
def preview(previewer: Previewer, code: Tensor) -> Tensor:
    """What the previewer sees in raw codes (B, 16, h, w): (B, 8 h, 8 w, 3) uint8 on the CPU."""
    return to_pixels(previewer(normalise(code)))


@torch.inference_mode()
def reconstruct_a(stage_a: StageA, image: Tensor, *, quantised: bool = False) -> Tensor:
    """Pictures (B, 3, H, W) uint8 through Stage A and back: (B, H, W, 3) uint8 on the CPU."""
    latents = stage_a.encode(to_unit_range(image))
    return to_pixels(stage_a.decode_quantised(latents) if quantised else stage_a.decode(latents))


@torch.inference_mode()
def reconstruct_b(
    stage_a: StageA,
    stage_b: StageB,
    compressor: "Compressor",
    image: Tensor,
    text: Tensor | None,
    seeds: Sequence[int],
    steps: int,
) -> Tensor:
    """Pictures (B, 3, H, W) uint8 through compressor, Stage B and Stage A's decoder: (B, H, W, 3) uint8."""
    code = compressor(to_unit_range(image))
    noise = Noise(seeds, image.device)
    return to_pixels(stage_a.decode(sample_latents(stage_b, code, text, None, noise, steps, guidance=1.0)))


def to_pixels(image: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1], clamped here -> (B, H, W, 3) uint8 on the CPU."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
