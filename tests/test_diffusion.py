"""Schedule, losses, samplers against published values and diffusers; draws do not depend on the split."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler

from stages import diffusion
from stages.draws import Draws, derived_seed


@pytest.mark.parametrize(
    ("t", "abar"),
    [
        (0.0, 0.9999),
        (0.25, 0.847),
        (0.5, 0.493844),
        (0.75, 0.1443),
        (0.9, 0.0241),
        (0.9936, 0.0001),
        (1.0, 0.0001),
    ],
)
def test_golden_schedule(t: float, abar: float) -> None:
    assert diffusion.alpha_bar(torch.tensor(t)).item() == pytest.approx(abar, abs=5e-5)


def test_the_schedule_refuses_half_precision() -> None:
    with pytest.raises(AssertionError):
        diffusion.alpha_bar(torch.tensor(0.5, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("how", "weight"), [("p2", 0.506156), ("p2_paper", 0.338828), ("p2_snr", 1.024931), ("none", 1.0)]
)
def test_golden_loss_weights(how: str, weight: float) -> None:
    abar = diffusion.alpha_bar(torch.tensor(0.5))
    assert diffusion.loss_weight(abar, how).item() == pytest.approx(weight, abs=2e-6)


def test_p2_snr_is_capped() -> None:
    """It equals the squared error of x0 times min(1, 20 abar)."""
    abar = torch.tensor([0.0001, 0.05, 0.5, 0.9999])
    snr = abar / (1 - abar)
    expected = (20 * abar).clamp(max=1) / snr
    torch.testing.assert_close(diffusion.loss_weight(abar, "p2_snr"), expected)


def test_released_times() -> None:
    t = diffusion.training_times(torch.linspace(0, 1 - 2**-24, 100_001), "released")
    assert t.min().item() == pytest.approx(0.001, abs=1e-6)
    assert t.max().item() == 1.0
    assert (t == 1).float().mean().item() == pytest.approx(0.075, abs=0.0005)
    assert t.mean().item() == pytest.approx(0.538, abs=0.001)


def test_uniform_times_are_the_numbers_themselves() -> None:
    uniform = torch.rand(5)
    assert torch.equal(diffusion.training_times(uniform, "uniform"), uniform)


def test_noise_keeps_unit_variance_and_one_level_a_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 40_000, generator=generator).unbind()
    abar = torch.tensor([0.9999, 0.0001])
    noisy = diffusion.add_noise(x0, noise, abar)
    torch.testing.assert_close(noisy.std(dim=1), torch.ones(2), atol=0.02, rtol=0)
    assert torch.corrcoef(torch.stack([noisy[0], x0[0]]))[0, 1] > 0.999
    assert torch.corrcoef(torch.stack([noisy[1], noise[1]]))[0, 1] > 0.999


@pytest.mark.parametrize("steps", [2, 7, 60])
def test_ddpm_equals_diffusers(steps: int) -> None:
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(steps)
    times = diffusion.sampling_times(steps)
    torch.testing.assert_close(times, scheduler.timesteps)
    ours = theirs = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    mine, stock = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for t, t_next in pairwise(times):
        noise = torch.randn(ours.shape, generator=mine)
        ours = diffusion.ddpm_step(ours, torch.tanh(ours), t, t_next, noise)
        theirs = scheduler.step(torch.tanh(theirs), t.expand(2), theirs, generator=stock).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_last_ddpm_step_adds_no_noise() -> None:
    x, eps = torch.randn(2, 3), torch.randn(2, 3)
    t, end = torch.tensor(0.1), torch.tensor(0.0)
    calm = diffusion.ddpm_step(x, eps, t, end, torch.zeros(2, 3))
    assert torch.equal(diffusion.ddpm_step(x, eps, t, end, torch.full((2, 3), 1e6)), calm)


def test_ddim_with_the_true_noise_walks_back_along_the_forward_process() -> None:
    x0, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    t, t_next = torch.tensor([0.9, 0.5]), torch.tensor([0.4, 0.0])
    x = diffusion.add_noise(x0, noise, diffusion.alpha_bar(t))
    stepped = diffusion.ddim_step(x, noise, t, t_next)
    expected = diffusion.add_noise(x0, noise, diffusion.alpha_bar(t_next))
    torch.testing.assert_close(stepped[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stepped[1], x0[1], rtol=1e-4, atol=1e-4)


def test_ddim_samples_a_known_distribution() -> None:
    """With the exact noise predictor of N(3, 0.5^2), samples have that mean and deviation."""

    def exact(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = diffusion.alpha_bar(t)
        variance = 0.25 * abar + 1 - abar
        return (1 - abar).sqrt() * (x - abar.sqrt() * 3) / variance

    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    times = diffusion.sampling_times(100)
    for t, t_next in pairwise(times):
        x = diffusion.ddim_step(x, exact(x, t), t, t_next)
    assert x.mean().item() == pytest.approx(3, abs=0.03)
    assert x.std().item() == pytest.approx(0.5, abs=0.03)


def test_guidance_is_imagens() -> None:
    unconditional, conditional = torch.tensor([1.0]), torch.tensor([3.0])
    assert diffusion.guide(unconditional, conditional, 1.0).item() == 3
    assert diffusion.guide(unconditional, conditional, 4.0).item() == 9


def test_the_loss_of_a_perfect_and_of_a_lazy_predictor() -> None:
    x0 = torch.zeros(4000, 2)
    perfect, _ = diffusion.denoising_loss(
        lambda x, t: x / (1 - diffusion.alpha_bar(t)).sqrt()[:, None],
        x0,
        Draws(0, 0, 0, 4000, 4000),
        "uniform",
        "none",
    )
    lazy, parts = diffusion.denoising_loss(
        lambda x, t: torch.zeros_like(x), x0, Draws(0, 0, 0, 4000, 4000), "uniform", "p2"
    )
    assert perfect.item() == pytest.approx(0, abs=1e-6)
    assert parts["mse"].item() == pytest.approx(1, abs=0.05)
    assert lazy.item() == pytest.approx(0.5, abs=0.05)  # the mean of 1 - abar over U(0, 1)


# ------------------------------------------------------------------------------------------------------ draws


def numbers(draws: Draws) -> list[torch.Tensor]:
    return [draws.uniform(), draws.normal(3, 2), draws.shared_uniform(), draws.uniform(), draws.normal()]


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_draws_do_not_depend_on_the_split(rows: int) -> None:
    whole = numbers(Draws(5, 9, 0, 6, 6))
    parts = [numbers(Draws(5, 9, first, rows, 6)) for first in range(0, 6, rows)]
    for i, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in parts]), expected)


def test_draws_differ_by_seed_step_call_and_row() -> None:
    seen = [
        number.item()
        for seed in (0, 1)
        for step in (0, 1)
        for draws in [Draws(seed, step, 0, 2, 2)]
        for number in (*draws.uniform(), *draws.uniform())
    ]
    assert len(set(seen)) == 16


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    numbers(Draws(0, 0, 0, 2, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_have_the_named_distributions() -> None:
    draws = Draws(1, 2, 0, 50_000, 50_000)
    normal, uniform = draws.normal(), draws.uniform()
    assert normal.mean().item() == pytest.approx(0, abs=0.02)
    assert normal.std().item() == pytest.approx(1, abs=0.02)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert uniform.std().item() == pytest.approx(math.sqrt(1 / 12), abs=0.01)
    shared = draws.shared_uniform()
    assert shared.shape == (50_000,)
    assert shared.unique().numel() == 1


def test_derived_seeds_are_fixed() -> None:
    """They are part of the format of a run: another value would change every training."""
    assert derived_seed(0, 0, 1) == 7776678342655566477
    assert derived_seed(1, 23) != derived_seed(12, 3)
