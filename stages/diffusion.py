"""The diffusion of Stage B and C: cosine schedule, noise prediction, DDPM and DDIM steps.

After `diffuzz.py` of dome272/Wuerstchen. Time t is continuous in [0, 1]; t = 1 is (nearly) pure noise. All of
it is fp32. abar is the share of signal variance, alpha-bar of DDPM (arXiv 2006.11239).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stages.config import LossWeight, TimeSampling
from stages.draws import Draws

OFFSET = 0.008  # s of the cosine schedule
ABAR_MIN, ABAR_MAX = 0.0001, 0.9999


def alpha_bar(t: Tensor) -> Tensor:
    """Cosine schedule (arXiv 2102.09672, eq. 17), clamped to [0.0001, 0.9999]. t in [0, 1], any shape."""
    assert t.dtype == torch.float32, "timesteps stay in fp32"
    start = math.cos(OFFSET / (1 + OFFSET) * math.pi / 2) ** 2
    abar = torch.cos((t + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2 / start
    return abar.clamp(ABAR_MIN, ABAR_MAX)


def add_noise(x0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """Forward process (DDPM, eq. 4): sqrt(abar) x0 + sqrt(1 - abar) noise, abar one a sample, (B,)."""
    abar = abar.view(-1, *[1] * (x0.ndim - 1))
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def training_times(uniform: Tensor, how: TimeSampling) -> Tensor:
    """Times to train at, from U[0, 1) numbers. `released`: 7.5 % of them are 1, the least is 0.001."""
    if how == "uniform":
        return uniform
    return ((1 - uniform) * 1.08 + 0.001).clamp(0.001, 1.0)


def loss_weight(abar: Tensor, how: LossWeight) -> Tensor:
    """Weight of a sample's squared noise error.

    p2: (1 + SNR)^-1 = 1 - abar (arXiv 2204.00227, eq. 8 with k = gamma = 1; the authors' code).
    p2_paper: (1 - abar) / (1 + abar), as the Würstchen paper prints it (section 3).
    p2_snr: p2 / abar with abar at least 0.05; equals the squared error of x0 times min(1, 20 abar).
    """
    match how:
        case "p2":
            return 1 - abar
        case "p2_paper":
            return (1 - abar) / (1 + abar)
        case "p2_snr":
            return (1 - abar) / abar.clamp(min=0.05)
        case "none":
            return torch.ones_like(abar)


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    draws: Draws,
    timesteps: TimeSampling,
    weight: LossWeight,
) -> tuple[Tensor, Tensor]:
    """Diffuse x0 (B, ...) and compare the noise that `predict(noisy, t)` finds with the true one, in fp32.

    Returns the mean of the weighted squared errors (the loss) and of the plain ones (for the log).
    """
    t = training_times(draws.uniform(), timesteps)
    abar = alpha_bar(t)
    noise = draws.normal(*x0.shape[1:])
    errors = (predict(add_noise(x0, noise, abar), t).float() - noise).square().flatten(1).mean(dim=1)
    return (errors * loss_weight(abar, weight)).mean(), errors.mean().detach()


def drop(condition: Tensor, null: Tensor, dropped: Tensor) -> Tensor:
    """Replace the condition (B, ...) by `null` (...) where `dropped` (B,) is true, for guidance."""
    return torch.where(dropped.view(-1, *[1] * null.ndim), null, condition)


def sampling_times(steps: int) -> Tensor:
    """`steps + 1` times from 1 to 0: one model call at each but the last. (steps + 1,) fp32."""
    return torch.linspace(1.0, 0.0, steps + 1)


def released_times() -> Tensor:
    """The released pipeline's 30 times of Stage C, two thirds of them above t = 2/3: 29 model calls. (30,) fp32."""
    early = torch.linspace(1.0, 2 / 3, 20, dtype=torch.float64)
    return torch.cat([early, torch.linspace(2 / 3, 0.0, 11, dtype=torch.float64)[1:]]).float()


def times_from(times: Tensor, strength: float) -> Tensor:
    """The times left for a picture diffused to t = strength in (0, 1]: strength, and all of `times` below it.

    Of n uniform steps these are ceil(strength n); strength 1 leaves all.
    """
    below = times < strength * (1 - 1e-4)  # two times that differ by rounding alone would make a step of nothing
    return torch.cat([torch.tensor([strength]), times[below]])


def ddpm_step(x: Tensor, eps: Tensor, t: Tensor, t_next: Tensor, noise: Tensor) -> Tensor:
    """One ancestral step (DDPM, eq. 6, 7, 11) from time t to t_next < t; both scalars, or one a sample."""
    t, t_next = (time.view(-1, *[1] * (x.ndim - 1)) for time in (t, t_next))
    abar, abar_next = alpha_bar(t), alpha_bar(t_next)
    alpha = abar / abar_next
    mean = (x - (1 - alpha) * eps / (1 - abar).sqrt()) / alpha.sqrt()
    std = ((1 - alpha) * (1 - abar_next) / (1 - abar)).sqrt()
    return mean + std * noise * (t_next != 0)  # the clamp keeps std above 0 at t_next = 0


def ddim_step(x: Tensor, eps: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """One deterministic step (DDIM, arXiv 2010.02502, eq. 12, sigma = 0); gives x0 itself at t_next = 0."""
    t, t_next = (time.view(-1, *[1] * (x.ndim - 1)) for time in (t, t_next))
    abar, abar_next = alpha_bar(t), alpha_bar(t_next)
    x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
    return torch.where(t_next == 0, x0, abar_next.sqrt() * x0 + (1 - abar_next).sqrt() * eps)


def guide(unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance as in Imagen (arXiv 2205.11487, eq. 2): 1 is the plain conditional model."""
    return torch.lerp(unconditional, conditional, guidance)
