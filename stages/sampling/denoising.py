"""From noise to a code, and to latents: the steps of a diffusion model, guided, each picture on noise of its own.

To add a sampler: name it in `stages.settings.sampling`, write its step in `stages.diffusion`, and call it in `denoise`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from stages import diffusion
from stages.models.baseline import Baseline
from stages.models.geometry import code_side, latent_side
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.settings.base import Precision
from stages.settings.sampling import Sampler, SamplingConfig

Predict = Callable[[Tensor, Tensor], Tensor]  # x (B, ...) and t (1,), fp32 -> the noise in x


class Noise:
    """Standard normal numbers of each sample from its own seed; successive calls go on in each stream."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def __call__(self, *shape: int) -> Tensor:
        """(B, *shape) fp32."""
        numbers = torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])
        if self.device.type == "cuda":  # the host does not wait for the device between two steps
            return numbers.pin_memory().to(self.device, non_blocking=True)
        return numbers.to(self.device)


@dataclass(frozen=True)
class Steps:
    """How one model is led from noise to its result."""

    times: Tensor
    """(steps + 1,) fp32 in [0, 1], descending to 0: a model call at each but the last."""
    guidance: float = 1.0
    """In Imagen's convention; 1 or less is off."""
    sampler: Sampler = "ddpm"
    precision: Precision = "fp32"

    def autocast(self, device: torch.device) -> torch.autocast:
        """What the model is called under; around all of its calls, weights are cast once."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @classmethod
    def of_c(cls, settings: SamplingConfig, strength: float = 1.0) -> Self:
        """Those of Stage C; from a picture, what remains of them at t = `strength` (`diffusion.times_from`)."""
        even = settings.timesteps == "uniform"
        times = diffusion.sampling_times(settings.steps_c) if even else diffusion.released_sampling_times()
        return cls(diffusion.times_from(times, strength), settings.guidance_c, settings.sampler, settings.precision)

    @classmethod
    def of_b(cls, settings: SamplingConfig) -> Self:
        """Those of Stage B."""
        times = diffusion.sampling_times(settings.steps_b)
        return cls(times, settings.guidance_b, settings.sampler, settings.precision)


def sample_code(
    stage_c: StageC,
    text: Tensor,
    negative: Tensor,
    noise: Noise,
    width: int,
    height: int,
    steps: Steps,
    start: Tensor | None = None,
) -> Tensor:
    """Sample raw codes (B, 16, h, w), h = ceil(height / 42.67), from text hidden states (B, N, D).

    width, height: px of the picture. start: raw codes to diffuse to the first of the times, in place of pure noise.
    """
    shape = (stage_c.latent_channels, code_side(height), code_side(width))
    x = noise(*shape)
    if start is not None:
        x = diffusion.add_noise(stage_c.from_code(start), x, diffusion.alpha_bar(steps.times[:1].to(x.device)))
    with steps.autocast(noise.device):
        return stage_c.to_code(denoise(guided(stage_c, text, negative, steps.guidance), x, noise, steps))


def guided(model: StageC | Baseline, text: Tensor, negative: Tensor, guidance: float) -> Predict:
    """The model's noise prediction (x, t) for a text, guided away from the negative one."""
    texts = text if guidance <= 1 else torch.cat([text, negative])
    seen = model.see(texts) if isinstance(model, StageC) else texts

    def predict(x: Tensor, t: Tensor) -> Tensor:
        if guidance <= 1:
            return model(x, t, seen)
        conditional, unconditional = model(torch.cat([x, x]), t, seen).chunk(2)
        return diffusion.guide(unconditional, conditional, guidance)

    return predict


def sample_latents(
    stage_b: StageB, code: Tensor, text: Tensor | None, negative: Tensor | None, noise: Noise, steps: Steps
) -> Tensor:
    """Sample Stage A's latents (B, 4, int(10.67 h), int(10.67 w)) for raw codes (B, 16, h, w).

    Unconditional means a zero code and the negative text.
    """
    shape = (stage_b.latent_channels, latent_side(code.shape[-2]), latent_side(code.shape[-1]))
    codes, texts = code, text
    if steps.guidance > 1:
        codes = torch.cat([code, torch.zeros_like(code)])
        texts = None if text is None or negative is None else torch.cat([text, negative])

    with steps.autocast(noise.device):
        seen = None if texts is None else stage_b.see(texts)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            if steps.guidance <= 1:
                return stage_b(x, t, codes, seen)
            conditional, unconditional = stage_b(torch.cat([x, x]), t, codes, seen).chunk(2)
            return diffusion.guide(unconditional, conditional, steps.guidance)

        return denoise(predict, noise(*shape), noise, steps)


def denoise(predict: Predict, x: Tensor, noise: Noise, steps: Steps) -> Tensor:
    """From x (B, ...) fp32 at the first of the times to the last, which is 0, by the noise that `predict` finds.

    `predict` gets x and t (1,), the same for all samples.
    """
    for t, t_next in pairwise(steps.times.to(x.device)):
        with steps.autocast(x.device):
            eps = predict(x, t[None]).float()
        if steps.sampler == "ddim":
            x = diffusion.ddim_step(x, eps, t, t_next)
        else:
            x = diffusion.ddpm_step(x, eps, t, t_next, noise(*x.shape[1:]))  # also for the last step, like diffusers
    return x
