"""The diffusion of Stage B and C: cosine schedule, noise prediction, DDPM and DDIM steps.

After `diffuzz.py` of dome272/Wuerstchen. Time t is continuous in [0, 1]; t = 1 is (nearly) pure noise. All of
it is fp32. abar is the share of signal variance, alpha-bar of DDPM (arXiv 2006.11239).
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stages.draws import Draws
from stages.settings.base import TimeSampling
from stages.settings.losses import FixedWeight, LossWeight

OFFSET = 0.008  # s of the cosine schedule
QUARTERS = 4  # of the times, whose errors are told apart
ABAR_MIN, ABAR_MAX = 0.0001, 0.9999

Predict = Callable[[Tensor, Tensor], Tensor]  # noisy (B, ...), t (B,) -> noise (B, ...)


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


def loss_weight(abar: Tensor, how: FixedWeight) -> Tensor:
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


class AdaptiveWeight(nn.Module):
    """Weight 1 / (running loss of samples with about as much noise), so that all noise levels count alike.

    As in Stable Cascade: 300 buckets of the log SNR, the first and the last open, the others between -10 and 10; each
    holds a running mean of its samples' losses, 1 at the start, of which a step with samples replaces 1 %. Buckets
    without samples stay as they are. The buffer is part of a training's state. All ranks hold the same values.
    """

    BUCKETS, LIMIT, DECAY, FLOOR = 300, 10.0, 0.99, 1e-7

    def __init__(self) -> None:
        super().__init__()
        self.running: Tensor
        self.edges: Tensor
        self.register_buffer("running", torch.ones(self.BUCKETS))
        self.register_buffer("edges", torch.linspace(-self.LIMIT, self.LIMIT, self.BUCKETS - 1), persistent=False)

    @torch.no_grad()
    def forward(self, abar: Tensor, errors: Tensor) -> Tensor:
        """Weights (B,) from what was known before; in training mode, the errors (B,) become known then."""
        bucket = torch.bucketize(abar.logit(), self.edges)
        weights = 1 / self.running[bucket].clamp(min=self.FLOOR)
        if self.training:
            # by sums over a table: on GPUs, scattered additions would come in another order each time
            member = (bucket[:, None] == torch.arange(self.BUCKETS, device=bucket.device)).float()
            totals = torch.stack([(member * errors.detach()[:, None]).sum(dim=0), member.sum(dim=0)])
            if dist.is_initialized():
                dist.all_reduce(totals)
            means = totals[0] / totals[1].clamp(min=1)
            self.running.copy_(torch.where(totals[1] > 0, self.running.lerp(means, 1 - self.DECAY), self.running))
        return weights


def weighting(how: LossWeight) -> AdaptiveWeight | FixedWeight:
    """What an objective hands to `denoising_loss`; keep it as an attribute, so that a learnt one is in the state."""
    return AdaptiveWeight() if how == "adaptive" else how


def denoising_loss(
    predict: Predict,
    x0: Tensor,
    draws: Draws,
    timesteps: TimeSampling,
    weight: AdaptiveWeight | FixedWeight,
    consistency: float = 0.0,
    predict_target: Predict | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Diffuse x0 (B, ...) and compare the noise that `predict(noisy, t)` finds with the true one, in fp32.

    `consistency` is the weight of a second squared error, between the noise found at t and the noise that
    `predict_target` (no gradient, no dropout) finds with the same true noise at a time t (1 - u), u drawn as t is:
    the term of the authors' own second training script of Stage C. Both errors get the sample's weight by its noise.

    Returns the loss and, for the log, the plain means `mse`, `consistency` where it is on, and for each quarter of
    the times `mse_t<its end>`: what its samples add to `mse`, and, as `/share`, how many of all they are.
    """
    t = training_times(draws.uniform(), timesteps)
    abar = alpha_bar(t)
    noise = draws.normal(*x0.shape[1:])
    predicted = predict(add_noise(x0, noise, abar), t).float()
    errors = _squared_distance(predicted, noise)
    parts = {"mse": errors.mean().detach(), **_by_time(errors.detach(), t)}
    factors = weight(abar, errors) if isinstance(weight, AdaptiveWeight) else loss_weight(abar, weight)
    if consistency:
        assert predict_target is not None  # called second: autocast keeps casts of weights, with or without gradient
        earlier = t * (1 - training_times(draws.uniform(), timesteps))
        target = predict_target(add_noise(x0, noise, alpha_bar(earlier)), earlier).float()
        drift = _squared_distance(predicted, target)
        parts["consistency"] = drift.mean().detach()
        errors = errors + consistency * drift
    return (errors * factors).mean(), parts


def _by_time(errors: Tensor, t: Tensor) -> dict[str, Tensor]:
    """For each quarter of the times: the sum of its errors, and its samples, over the number of all samples."""
    parts = {}
    for quarter in range(QUARTERS):
        inside = (t * QUARTERS).floor().clamp(max=QUARTERS - 1) == quarter
        name = f"mse_t{(quarter + 1) / QUARTERS}"
        parts[name] = torch.where(inside, errors, 0.0).mean()
        parts[f"{name}/share"] = inside.float().mean()
    return parts


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of each sample, (B, ...) -> (B,)."""
    return (a - b).square().flatten(1).mean(dim=1)


def drop(condition: Tensor, null: Tensor, dropped: Tensor) -> Tensor:
    """Replace the condition (B, ...) by `null` (...) where `dropped` (B,) is true, for guidance."""
    return torch.where(dropped.view(-1, *[1] * null.ndim), null, condition)


def mixed(rows: Tensor, ratio: Tensor) -> Tensor:
    """Each of the rows (B, ...) beside its neighbour, as much of it as `ratio` (B,) says. Rows 2k and 2k + 1 are
    neighbours, and B is even."""
    neighbours = rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return torch.lerp(neighbours, rows, ratio.view(-1, *[1] * (rows.ndim - 1)).to(rows.dtype))


def sampling_times(steps: int) -> Tensor:
    """`steps + 1` times from 1 to 0: one model call at each but the last. (steps + 1,) fp32."""
    return torch.linspace(1.0, 0.0, steps + 1)


def released_sampling_times() -> Tensor:
    """The release's own times for Stage C (`DEFAULT_STAGE_C_TIMESTEPS` of diffusers): (30,) fp32, 29 model calls.

    19 of the calls lie in the first third of the way, where the noise is high, 10 in the other two.
    """
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
