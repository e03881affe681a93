"""Schedule, losses, samplers against published values and diffusers; draws do not depend on the split."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated.wuerstchen.pipeline_wuerstchen_prior import DEFAULT_STAGE_C_TIMESTEPS
from hypothesis import given
from hypothesis import strategies as st

from stages import diffusion
from stages.draws import Draws, derived_seed
from stages.models.stage_c import StageC, StageCObjective
from stages.settings.losses import StageCLoss
from stages.settings.models import StageCConfig
from stages.settings.training import TrainingConfig
from stages.training import checkpoint
from stages.training.loop import Outcome, train
from tests.stages.training.in_memory import InMemory


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


def test_the_released_sampling_times() -> None:
    times = diffusion.released_sampling_times()
    assert times.shape == (30,)
    torch.testing.assert_close(times, torch.tensor(DEFAULT_STAGE_C_TIMESTEPS, dtype=torch.float32))
    assert (times.diff() < 0).all()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_mixed_in_pairs_whatever_even_parts_they_come_in(dtype: torch.dtype) -> None:
    rows, ratio = torch.randint(-8, 9, (6, 2, 3)).to(dtype), torch.tensor([1.0, 0.0, 0.25, 0.25, 1.0, 1.0])
    found = diffusion.mixed(rows, ratio)
    assert torch.equal(found[[0, 1, 4, 5]], rows[[0, 0, 4, 5]])
    torch.testing.assert_close(found[2], 0.25 * rows[2] + 0.75 * rows[3])
    torch.testing.assert_close(found[3], 0.25 * rows[3] + 0.75 * rows[2])
    for cut in (2, 4):
        parts = [diffusion.mixed(rows[part], ratio[part]) for part in (slice(0, cut), slice(cut, 6))]
        assert torch.equal(torch.cat(parts), found)


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


# ------------------------------------------------------------------------------------------- adaptive weights


class Buckets:
    """The adaptive weight by its words, in plain Python."""

    def __init__(self) -> None:
        self.running: dict[int, float] = {}

    def weights(self, times: list[float], errors: list[float]) -> list[float]:
        places = [self.place(t) for t in times]
        known = [1 / self.running.get(place, 1.0) for place in places]
        for place in set(places):
            mine = [error for error, other in zip(errors, places, strict=True) if other == place]
            self.running[place] = 0.99 * self.running.get(place, 1.0) + 0.01 * sum(mine) / len(mine)
        return known

    @staticmethod
    def place(t: float) -> int:
        """299 edges from -10 to 10 part the log SNR into 300 buckets."""
        start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        abar = min(max(math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / start, 0.0001), 0.9999)
        return sum(-10 + 20 * edge / 298 < math.log(abar / (1 - abar)) for edge in range(299))


def test_adaptive_weights_are_one_over_the_running_loss_of_their_noise_level() -> None:
    ours, theirs = diffusion.AdaptiveWeight(), Buckets()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        t = torch.rand(64, generator=generator).round(decimals=2) * 0.97 + 0.01  # many share a bucket
        errors = torch.rand(64, generator=generator) * 5
        found = ours(diffusion.alpha_bar(t), errors)
        assert found.tolist() == pytest.approx(theirs.weights(t.tolist(), errors.tolist()), rel=1e-5)
    for place, value in theirs.running.items():
        assert ours.running[place].item() == pytest.approx(value, rel=1e-5)
    assert (ours.running != 1).sum() == len(theirs.running)


def test_adaptive_weights_start_at_one_and_learn_in_training_only() -> None:
    weight = diffusion.AdaptiveWeight().eval()
    t = torch.tensor([0.2, 0.8])
    for _ in range(2):
        assert weight(diffusion.alpha_bar(t), torch.tensor([3.0, 0.1])).tolist() == [1, 1]
    weight.train()
    for _ in range(600):
        weight(diffusion.alpha_bar(t), torch.tensor([3.0, 0.1]))
    found = weight.eval()(diffusion.alpha_bar(t), torch.zeros(2))
    assert found.tolist() == pytest.approx([1 / 3, 10], rel=0.03)


def stage_c_objective(**changes: object) -> StageCObjective:
    torch.manual_seed(0)
    stage_c = StageC(StageCConfig(width=16, depth=1, heads=2, text_width=8))
    torch.nn.init.normal_(stage_c.out[1].weight, std=0.02)  # at zero, as it starts, nothing before it would count
    return StageCObjective(stage_c, StageCLoss.model_validate(changes), torch.zeros(5, 8))


def codes(step: int, rows: int = 4) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(step)
    codes, text = generator.normal(size=(rows, 16, 3, 3)) * 42 - 1, generator.normal(size=(rows, 5, 8))
    return {"latents_c": codes.astype(np.float32), "text": text.astype(np.float32)}


def test_a_training_with_adaptive_weights_and_consistency_resumes_to_the_same_bytes() -> None:
    values = {"phases": [{"steps": 6, "batch_size": 4, "size": 128}], "learning_rate": 0.01, "warmup_steps": 1}
    recipe = TrainingConfig.model_validate(values | {"precision": "fp32", "log_every": 1, "checkpoint_every": 1})

    def run(state: bytes | None, stop_after: int) -> tuple[Outcome, dict[int, bytes]]:
        kept, objective = InMemory(state, stop_after), stage_c_objective(weight="adaptive", consistency=0.1)
        return train(objective, codes, recipe, kept, seed=0, device=torch.device("cpu")), kept.saved

    _, straight = run(None, stop_after=99)
    running = checkpoint.load(straight[6]).tensors["model.weight.running"]
    assert running.shape == (300,)
    assert (running != 1).any()
    outcome, first = run(None, stop_after=3)
    assert outcome == Outcome(3, finished=False)
    assert run(first[3], stop_after=99)[1][6] == straight[6]


def test_the_first_adaptive_step_weighs_all_alike() -> None:
    batch = {key: torch.from_numpy(value) for key, value in codes(0).items()}
    plain, _ = stage_c_objective(weight="none").eval()(batch, Draws(0, 0, 0, 4, 4))
    adaptive, _ = stage_c_objective(weight="adaptive").eval()(batch, Draws(0, 0, 0, 4, 4))
    assert adaptive.item() == pytest.approx(plain.item())
    assert not [key for key in stage_c_objective(weight="none").state_dict() if not key.startswith("stage_c.")]


# ------------------------------------------------------------------------------------------------ consistency


def test_the_consistency_term_is_the_authors() -> None:
    """Computed anew from the same draws: t, noise, then u."""
    x0 = torch.randn(6, 2, 3)

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x.sin() + t[:, None, None]

    loss, parts = diffusion.denoising_loss(
        predict, x0, Draws(3, 1, 0, 6, 6), "released", "p2", consistency=0.1, predict_target=predict
    )
    draws = Draws(3, 1, 0, 6, 6)
    t, noise, u = draws.uniform(), draws.normal(2, 3), draws.uniform()
    t, u = (((1 - number) * 1.08 + 0.001).clamp(0.001, 1) for number in (t, u))
    total = drift = 0.0
    for row in range(6):
        predicted = []
        for time in (t[row], t[row] - t[row] * u[row]):
            abar = diffusion.alpha_bar(time)
            x = abar.sqrt() * x0[row] + (1 - abar).sqrt() * noise[row]
            predicted.append(x.sin() + time)
        error = (predicted[0] - noise[row]).square().mean().item()
        apart = (predicted[0] - predicted[1]).square().mean().item()
        total += (error + 0.1 * apart) * (1 - diffusion.alpha_bar(t[row]).item()) / 6
        drift += apart / 6
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert parts["consistency"].item() == pytest.approx(drift, rel=1e-5)


def test_the_consistency_terms_target_has_neither_gradient_nor_dropout() -> None:
    objective = stage_c_objective(consistency=0.1).train()
    x, t, text = torch.randn(2, 16, 3, 3), torch.rand(2), torch.randn(2, 5, 8)
    target = objective._steady(x, t, text)
    assert not target.requires_grad
    assert all(module.training for module in objective.modules())
    noisy = objective.stage_c(x, t, text)
    assert noisy.requires_grad
    assert not torch.equal(noisy, target)
    torch.testing.assert_close(target, objective.eval().stage_c(x, t, text))


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


def test_an_error_is_logged_in_the_quarter_of_its_time() -> None:
    """Each quarter begins with its lower end; the last has both. Sums over shares are the means of the quarters."""
    times = torch.tensor([0.0, 0.1, 0.2499, 0.25, 0.5, 0.6, 0.75, 1.0])
    errors = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 40.0, 100.0, 200.0])
    parts = {name: value.item() for name, value in diffusion._by_time(errors, times).items()}
    sums = {"mse_t0.25": 6.0, "mse_t0.5": 10.0, "mse_t0.75": 60.0, "mse_t1.0": 300.0}
    counts = {"mse_t0.25/share": 3, "mse_t0.5/share": 1, "mse_t0.75/share": 2, "mse_t1.0/share": 2}
    assert parts == pytest.approx({name: value / 8 for name, value in (sums | counts).items()})


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
