"""Where implementations of Würstchen go wrong without an error: times, guidance, conditions, sides, precision."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from pydantic import ValidationError
from torch import Tensor, nn

from stages import diffusion
from stages.draws import Draws
from stages.models.attention import SeenText
from stages.models.compressor import Compressor
from stages.models.geometry import BadImageSize, check_size, code_side, latent_side
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB, StageBObjective
from stages.models.stage_c import StageC, StageCObjective
from stages.models.text import seeded_tower
from stages.sampling import sample
from stages.sampling.denoising import Noise, Steps, sample_code, sample_latents
from stages.settings.losses import LossWeight, StageBLoss, StageCLoss
from stages.settings.models import (
    CompressorConfig,
    EfficientNetStages,
    SeededTextConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)
from stages.settings.sampling import SamplingConfig
from stages.settings.training import TrainingConfig
from stages.state_dicts import Serialized
from stages.training.bad_steps import BadSteps
from stages.training.callbacks import Callbacks
from stages.training.loop import train
from stages.weights import convert

CPU = torch.device("cpu")
CONFIG_A = StageAConfig(bottleneck_blocks=1, hidden=8, codebook_size=16, codebook_init="normal")
CONFIG_B = StageBConfig(
    widths=(8,), blocks=(1,), patterns=("CTA",), heads=(2,), inject_code=(True,), cond_width=8, text_width=4
)
CONFIG_C = StageCConfig(width=8, depth=2, heads=2, text_width=4)
COMPRESSOR = CompressorConfig(
    backbone=EfficientNetStages.model_validate(
        {
            "stem": 8,
            "stages": [{"block": "fused", "expand": 1, "stride": 2, "channels": 8, "layers": 1} for _ in range(4)],
            "last": 16,
        }
    ),
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def inputs_of(module: nn.Module) -> list[tuple[Tensor, ...]]:
    """The arguments of the module's later calls."""
    seen: list[tuple[Tensor, ...]] = []
    module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    return seen


# ----------------------------------------------------------------------------------------------- steps of sampling


def test_noise_is_added_as_diffusers_does() -> None:
    x0, noise, t = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.tensor([0.0, 0.3, 1.0])
    scheduler = DDPMWuerstchenScheduler()
    expected = torch.stack([scheduler.add_noise(*row) for row in zip(x0, noise, t[:, None], strict=True)])
    torch.testing.assert_close(diffusion.add_noise(x0, noise, diffusion.alpha_bar(t)), expected)


def test_noise_is_left_out_at_time_zero_only() -> None:
    """Not already where the next time rounds to zero in half precision."""
    x, eps, t = torch.randn(2, 3), torch.randn(2, 3), torch.tensor(0.1)
    for t_next, same in ((torch.tensor(0.0), True), (torch.tensor(1e-9), False)):
        calm, noisy = (diffusion.ddpm_step(x, eps, t, t_next, noise) for noise in (torch.zeros(2, 3), torch.ones(2, 3)))
        assert torch.equal(calm, noisy) == same


def test_samples_of_one_batch_may_stand_at_different_times() -> None:
    x, eps, noise = torch.randn(3, 2, 4, 5).unbind()
    t, t_next = torch.tensor([1.0, 0.4]), torch.tensor([0.7, 0.0])
    ddpm, ddim = diffusion.ddpm_step(x, eps, t, t_next, noise), diffusion.ddim_step(x, eps, t, t_next)
    for row in range(2):
        times = t[row], t_next[row]
        assert torch.equal(ddpm[row], diffusion.ddpm_step(x[row], eps[row], *times, noise[row]))
        assert torch.equal(ddim[row], diffusion.ddim_step(x[row], eps[row], *times))


@pytest.mark.parametrize("time", [1.0, 0.999, 0.5, 0.001])
def test_a_repeated_time_changes_nothing(time: float) -> None:
    x, t = torch.randn(2, 3), torch.tensor(time)
    torch.testing.assert_close(diffusion.ddpm_step(x, torch.randn(2, 3), t, t, torch.randn(2, 3)), x)
    torch.testing.assert_close(diffusion.ddim_step(x, torch.randn(2, 3), t, t), x, rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------------------- guidance


TWO = diffusion.sampling_times(2)


class EchoC(StageC):
    """Predicts the first number of each text."""

    def see(self, text: Tensor) -> SeenText:
        return (text,)

    def forward(self, x: Tensor, t: Tensor, text: Tensor | SeenText) -> Tensor:
        (first,) = text if isinstance(text, tuple) else (text,)
        return first[:, 0, 0].view(-1, 1, 1, 1).expand_as(x)


class EchoB(StageB):
    """Predicts the first number of each code plus that of each text, where there is one."""

    def see(self, text: Tensor) -> SeenText:
        return (text,)

    def forward(self, x: Tensor, t: Tensor, code: Tensor, text: Tensor | SeenText | None = None) -> Tensor:
        first = code[:, 0, 0, 0] if text is None else code[:, 0, 0, 0] + text[0][:, 0, 0]
        return first.view(-1, 1, 1, 1).expand_as(x)


def sampled_c(text: float, negative: float, guidance: float, scaled: bool = True) -> Tensor:
    texts = (torch.full((2, 5, 4), value) for value in (text, negative))
    stage_c = EchoC(CONFIG_C.model_copy(update={"scaled_codes": scaled}))
    return sample_code(stage_c, *texts, Noise([1, 2], CPU), 128, 256, Steps(TWO, guidance))


def sampled_b(code: float, text: float | None, negative: float | None, guidance: float) -> Tensor:
    texts = (None if value is None else torch.full((2, 5, 4), value) for value in (text, negative))
    codes = torch.full((2, 16, 3, 6), code)
    return sample_latents(EchoB(CONFIG_B), codes, *texts, Noise([1, 2], CPU), Steps(TWO, guidance))


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5, 4.0])
def test_guidance_leads_from_the_negative_to_the_text(guidance: float) -> None:
    """Off at 1 and below; else negative + w (text - negative), both computed in one batch."""
    found = sampled_c(text=0.5, negative=0.25, guidance=guidance)
    assert found.shape == (2, 16, 6, 3)
    expected = 0.5 if guidance <= 1 else 0.25 + guidance * (0.5 - 0.25)
    torch.testing.assert_close(found, sampled_c(expected, 99.0, 1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 4.0])
def test_guidance_of_stage_b_leads_from_the_zero_code_and_the_negative(guidance: float) -> None:
    found = sampled_b(code=0.5, text=0.25, negative=0.125, guidance=guidance)
    assert found.shape == (2, 4, 32, 64)
    expected = 0.75 if guidance <= 1 else 0.125 + guidance * (0.75 - 0.125)
    torch.testing.assert_close(found, sampled_b(expected, 0.0, 99.0, 1.0), rtol=1e-4, atol=1e-4)
    without_text = sampled_b(code=0.5, text=None, negative=None, guidance=guidance)
    torch.testing.assert_close(without_text, sampled_b(0.5 * max(guidance, 1.0), None, None, 1.0))


def test_no_negative_is_the_empty_caption() -> None:
    tower = seeded_tower(SeededTextConfig(width=4, layers=1, heads=1, context_length=8))
    models = sample.Models(StageA(CONFIG_A), StageB(CONFIG_B), StageC(CONFIG_C), tower, tower)
    seen_b, seen_c = inputs_of(models.stage_b), inputs_of(models.stage_c)
    settings = SamplingConfig(width=128, height=128, steps_c=1, steps_b=1, guidance_c=2.0, guidance_b=2.0)
    sample.generate(models, ["a cat"], [0], settings)
    expected = tower.encode(["a cat", ""])[0]
    with torch.no_grad():
        torch.testing.assert_close(seen_c[0][2], models.stage_c.see(expected))
        torch.testing.assert_close(seen_b[0][3], models.stage_b.see(expected))
    assert seen_b[0][2][0].abs().max() > 0
    assert seen_b[0][2][1].abs().max() == 0


# ------------------------------------------------------------------------------------------- conditions in training


def objective_c(loss: StageCLoss, **changes: object) -> StageCObjective:
    return StageCObjective(StageC(CONFIG_C.model_copy(update=changes)), loss, torch.full((5, 4), 7.0))


def objective_b(loss: StageBLoss) -> StageBObjective:
    return StageBObjective(StageB(CONFIG_B), Compressor(COMPRESSOR), loss, torch.full((5, 4), 7.0)).eval()


def batch(rows: int, code: float = 0.0) -> dict[str, Tensor]:
    return {
        "image": torch.randint(0, 256, (rows, 3, 128, 128), dtype=torch.uint8),
        "latents_a": torch.randn(rows, 4, 8, 8),
        "latents_c": torch.full((rows, 16, 4, 4), code),
        "text": torch.randn(rows, 5, 4),
    }


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_captions_are_dropped_sample_by_sample(share: float) -> None:
    """Each is its own or wholly the null text, and one step holds both kinds."""
    rows = 2000
    objective, data = objective_c(StageCLoss(text_drop=share)), batch(rows)
    seen = inputs_of(objective.stage_c)
    with torch.no_grad():
        objective(data, Draws(0, 0, 0, rows, rows))
    text = seen[0][2]
    null, own = (text == 7.0).all(dim=(1, 2)), (text == data["text"]).all(dim=(1, 2))
    assert (null ^ own).all()
    assert null.float().mean().item() == pytest.approx(share, abs=0.015)
    assert (0 < share < 1) == (0 < null.sum().item() < rows)


def test_stage_b_drops_captions_and_codes_apart() -> None:
    rows = 64
    objective, data = objective_b(StageBLoss(text_drop=0.5, code_drop=0.5, code_noise=0.0)), batch(rows)
    seen = inputs_of(objective.stage_b)
    with torch.no_grad():
        objective(data, Draws(0, 0, 0, rows, rows))
    null_text = (seen[0][3] == 7.0).all(dim=(1, 2))
    null_code = (seen[0][2] == 0).all(dim=(1, 2, 3))
    assert len(set(zip(null_text.tolist(), null_code.tolist(), strict=True))) == 4


def test_stage_b_sees_the_compressors_output_as_it_is() -> None:
    objective, data = objective_b(StageBLoss(text_drop=0.0, code_drop=0.0, code_noise=0.0)), batch(2)
    seen = inputs_of(objective.stage_b)
    with torch.no_grad():
        objective(data, Draws(0, 0, 0, 2, 2))
        assert torch.equal(seen[0][2], objective.compressor(data["image"] / 255))


@pytest.mark.parametrize(("scaled", "mean"), [(True, 2.0), (False, 83.0)])
def test_stage_c_sees_the_code_plus_1_over_42_unless_told_otherwise(scaled: bool, mean: float) -> None:
    objective = objective_c(StageCLoss(timesteps="uniform"), scaled_codes=scaled)
    seen = inputs_of(objective.stage_c)
    with torch.no_grad():
        objective(batch(500, code=83.0), Draws(0, 0, 0, 500, 500))
    x, t, _ = seen[0]
    signal = diffusion.alpha_bar(t).sqrt()
    found = (x.mean(dim=(1, 2, 3)) * signal).sum() / signal.square().sum()  # least squares of x = signal * mean
    assert found.item() == pytest.approx(mean, abs=0.02)
    code = torch.randn(1, 16, 3, 3)
    torch.testing.assert_close(objective.stage_c.to_code(objective.stage_c.from_code(code)), code)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_stage_c_learns_codes_and_texts_mixed_alike(share: float) -> None:
    """Every other row has a code and a text of ones, those between of zeros: what is seen of a text is its ratio."""
    objective = objective_c(StageCLoss(timesteps="uniform", text_drop=0.0, mixup=share))
    ones = (torch.arange(4000) % 2).float()
    data = {
        "latents_c": (42 * ones - 1).view(-1, 1, 1, 1).expand(-1, 16, 3, 3),
        "text": ones.view(-1, 1, 1).expand(-1, 5, 4),
    }
    seen = inputs_of(objective.stage_c)
    with torch.no_grad():
        objective.train()(data, Draws(0, 0, 0, 4000, 4000))
        objective.eval()(data, Draws(0, 0, 0, 4000, 4000))
    (x, t, text), (*_, held_out) = seen
    ratio, signal = text[:, 0, 0], diffusion.alpha_bar(t).sqrt()
    assert (ratio != ones).float().mean().item() == pytest.approx(share, abs=0.03)
    assert (ratio - ones).abs().mean().item() == pytest.approx(share / 2, abs=0.03)  # of a uniform weight
    slope = (x.mean(dim=(1, 2, 3)) * signal * ratio).sum() / (signal * ratio).square().sum()  # least squares
    assert slope.item() == pytest.approx(1, abs=0.02)
    assert torch.equal(held_out[:, 0, 0], ones)


def test_sampled_codes_are_scaled_back_where_stage_c_is_scaled() -> None:
    torch.testing.assert_close(sampled_c(0.5, 0.0, 1.0), 42 * sampled_c(0.5, 0.0, 1.0, scaled=False) - 1)


@pytest.mark.parametrize(
    ("how", "weight"),
    [
        ("p2", lambda abar: 1 / (1 + abar / (1 - abar))),
        ("p2_paper", lambda abar: (1 - abar) / (1 + abar)),
        ("p2_snr", lambda abar: min(1, 20 * abar) * (1 - abar) / abar),
        ("none", lambda abar: 1.0),
    ],
)
def test_the_loss_weights_each_samples_error(how: LossWeight, weight: Callable[[float], float]) -> None:
    """Of a model that predicts zero, from what it was given: codes of -1 are zeros, so x is the noise, scaled."""
    objective = StageCObjective(EchoC(CONFIG_C), StageCLoss(weight=how, text_drop=1.0), torch.zeros(5, 4))
    seen = inputs_of(objective.stage_c)
    loss, parts = objective(batch(32, code=-1.0), Draws(0, 0, 0, 32, 32))
    x, t, _ = seen[0]
    weighted, plain = [], []
    for row, time in zip(x.double(), t.tolist(), strict=True):
        f, f0 = (math.cos((at + 0.008) / 1.008 * math.pi / 2) ** 2 for at in (time, 0))
        abar = min(max(f / f0, 0.0001), 0.9999)
        plain.append((row.square() / (1 - abar)).mean().item())
        weighted.append(weight(abar) * plain[-1])
    assert loss.item() == pytest.approx(sum(weighted) / 32, rel=1e-4)
    assert parts["mse"].item() == pytest.approx(sum(plain) / 32, rel=1e-4)


# ------------------------------------------------------------------------------------------------ starts and codebook


def test_stage_c_starts_at_the_authors_scale() -> None:
    """Xavier, the last weight of each MLP once divided by the square root of the depth; timestep maps zero."""
    model = StageC(StageCConfig(width=32, depth=9, heads=4, text_width=20))
    for layer in model.blocks[0::3]:
        last = layer.channelwise[-1].weight
        assert last.std().item() == pytest.approx((2 / (32 + 4 * 32)) ** 0.5 / 3, rel=0.05)
    assert all(layer.mapper.weight.abs().max() == 0 for layer in model.blocks[1::3])
    assert model.projection.weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_the_codebooks_loss_and_gradients_equal_diffusers() -> None:
    ours = StageA(CONFIG_A)
    theirs = PaellaVQModel(**convert.arguments(CONFIG_A))
    theirs.load_state_dict(convert.to_diffusers(ours.state_dict()))
    features, weight = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 5, 3)
    results = []
    for quantizer, codebook in (
        (ours.vquantizer, ours.vquantizer.codebook.weight),
        (theirs.vquantizer, theirs.vquantizer.embedding.weight),
    ):
        z = features.clone().requires_grad_()
        quantised, loss, *_ = quantizer(z)
        (loss + (weight * quantised).sum()).backward()
        results.append((quantised, loss, z.grad, codebook.grad))
    for mine, stock in zip(*results, strict=True):
        torch.testing.assert_close(mine, stock)


# ------------------------------------------------------------------------------------------------- sides, precision


def test_multiples_of_128_px_fit_all_stages() -> None:
    for side in range(128, 4097, 128):
        check_size(side, 128)
        assert code_side(side) == side * 0.75 / 32
        assert latent_side(code_side(side)) == side / 4


@pytest.mark.parametrize("side", [0, -128, 1, 127, 1000, 786])
def test_other_sides_are_refused_by_name(side: int) -> None:
    with pytest.raises(BadImageSize, match=rf"width={side}: sides must be multiples of 128 px"):
        check_size(side, 128)
    with pytest.raises(BadImageSize, match=rf"height={side}: "):
        check_size(128, side)


@pytest.mark.parametrize(("bias", "divisor"), [(1e4, 0.999), (-1e4, 0.001)])
def test_stage_bs_divisor_is_bounded_and_exact_under_autocast(bias: float, divisor: float) -> None:
    model = StageB(CONFIG_B)
    half = model.clf[1].bias.numel() // 2
    model.clf[1].bias.data[half:] = bias  # the weight starts at zero
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = model(x, torch.rand(2), torch.randn(2, 16, 3, 3), torch.randn(2, 5, 4))
    torch.testing.assert_close(predicted, x / divisor, rtol=1e-4, atol=0)


TRAINING = {
    "phases": [{"steps": 2, "batch_size": 2, "size": 64}],
    "learning_rate": 0.1,
    "warmup_steps": 0,
    "precision": "fp32",
    "log_every": 1,
    "checkpoint_every": 1,
}


def test_fp16_is_not_offered() -> None:
    with pytest.raises(ValidationError, match="precision"):
        TrainingConfig.model_validate(TRAINING | {"precision": "fp16"})


class RootOf(nn.Module):
    """A loss of zero whose gradient is not a number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        return (self.weight * batch["x"]).sum().sqrt(), {}


class Neither(Callbacks):
    """Of which nothing may be saved or logged."""

    def save_state(self, step: int, data: Serialized) -> None:
        pytest.fail("saved")

    def log(self, step: int, values: dict[str, float]) -> None:
        pytest.fail("logged")


def test_a_finite_loss_with_a_gradient_that_is_not_ends_the_training() -> None:
    objective = RootOf()
    with pytest.raises(BadSteps, match=r"step 1 .*\(loss 0, gradient norm nan\)"):
        train(
            objective,
            lambda step: {"x": torch.zeros(2).numpy()},
            TrainingConfig.model_validate(TRAINING),
            Neither(),
            seed=0,
            device=CPU,
        )
    assert torch.equal(objective.weight, torch.ones(2))
