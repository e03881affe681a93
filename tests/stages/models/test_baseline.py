"""The baseline U-Net: equality with diffusers' UNet2DConditionModel, golden sizes, gradients, learning, sampling."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from pydantic import ValidationError
from torch import nn

from stages import diffusion
from stages.draws import Draws
from stages.models.baseline import Baseline, BaselineObjective
from stages.models.geometry import BadImageSize
from stages.models.stage_a import StageA
from stages.sampling import sample
from stages.sampling.denoising import Noise, Steps, denoise
from stages.settings.losses import BaselineLoss
from stages.settings.models import BaselineConfig, StageAConfig
from stages.settings.training import TrainingConfig
from stages.training import loop
from stages.training.callbacks import Callbacks

TINY = BaselineConfig(
    widths=(16, 32, 32), blocks=2, heads=(2, 4, 0), middle_heads=8, middle_depth=2, groups=8, text_width=20
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomised(module: nn.Module) -> None:
    """Every parameter random, none left at zero or one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)


def theirs(config: BaselineConfig) -> UNet2DConditionModel:
    """Diffusers' U-Net of that shape, with the embedding of our timesteps: 10000 t, sines first."""
    kinds = ["CrossAttnDownBlock2D" if heads else "DownBlock2D" for heads in config.heads]
    channels = config.latent_channels * config.patch**2
    options: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
        "block_out_channels": config.widths,
        "layers_per_block": config.blocks,
        "cross_attention_dim": config.text_width,
        "transformer_layers_per_block": [*[1] * (len(config.widths) - 1), config.middle_depth],
        "attention_head_dim": [*config.heads[:-1], config.middle_heads],  # numbers of heads; the name is old
        "norm_num_groups": config.groups,
        "use_linear_projection": True,
    }
    return UNet2DConditionModel(**options)


@pytest.mark.parametrize(
    ("config", "height", "width"),
    [
        (TINY, 16, 24),
        (TINY.model_copy(update={"patch": 1, "blocks": 1}), 8, 12),
        (BaselineConfig(widths=(8, 24), heads=(1, 0), middle_heads=3, middle_depth=1, groups=4, text_width=12), 8, 8),
    ],
    ids=["three levels", "no patches", "two levels"],
)
@torch.no_grad()
def test_equals_diffusers_with_the_same_weights_under_the_same_names(
    config: BaselineConfig, height: int, width: int
) -> None:
    ours = Baseline(config).eval()
    randomised(ours)
    reference = theirs(config).eval()
    reference.load_state_dict(ours.state_dict())
    x, text = torch.randn(3, 4, height, width), torch.randn(3, 7, config.text_width)
    t = torch.tensor([0.001, 0.37, 1.0])
    wanted = reference(F.pixel_unshuffle(x, config.patch), t * 10000, text).sample
    wanted = F.pixel_shuffle(wanted, config.patch)
    found = ours(x, t, text)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_full_size() -> None:
    with torch.device("meta"):
        ours = Baseline(BaselineConfig())
        stable_diffusion_2 = Baseline(BaselineConfig(patch=1, middle_depth=1))
    assert sum(parameter.numel() for parameter in ours.parameters()) == 994_517_456
    assert sum(parameter.numel() for parameter in stable_diffusion_2.parameters()) == 865_910_724
    assert len(stable_diffusion_2.state_dict()) == 686


def test_starts_at_zero_and_every_parameter_gets_a_gradient() -> None:
    baseline = Baseline(TINY)
    batch = {"latents_a": torch.randn(2, 4, 16, 24), "text": torch.randn(2, 7, 20)}
    with torch.no_grad():
        assert not baseline(batch["latents_a"], torch.rand(2), batch["text"]).any()
    randomised(baseline)
    objective = BaselineObjective(baseline, BaselineLoss(), torch.zeros(7, 20))
    loss, parts = objective(batch, Draws(0, 0, 0, 2, 2))
    loss.backward()
    assert {name for name in parts if not name.startswith("mse_t")} == {"mse"}
    for name, parameter in baseline.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_dropped_caption_is_the_empty_one() -> None:
    baseline = Baseline(TINY)
    randomised(baseline)
    null = torch.randn(7, 20)
    batch = {"latents_a": torch.randn(2, 4, 16, 16), "text": torch.randn(2, 7, 20)}
    always = BaselineObjective(baseline, BaselineLoss(text_drop=1.0), null)
    never = BaselineObjective(baseline, BaselineLoss(text_drop=0.0), null)
    with torch.no_grad():
        dropped = always(batch, Draws(0, 0, 0, 2, 2))[0]
        told = never({**batch, "text": null.expand(2, -1, -1)}, Draws(0, 0, 0, 2, 2))[0]
        other = never(batch, Draws(0, 0, 0, 2, 2))[0]
    assert dropped == told != other


def test_trained_in_the_loop_it_draws_the_picture_of_each_caption() -> None:
    """Four latents with a caption each, by heart: what is drawn from pure noise is nearest to the caption's own.

    The noise is taken for that of t = 0.8. At t = 1 it is a hundred times a latent's share, and a training of seconds
    is not that exact.
    """
    latents = torch.randn(4, 4, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    captions = torch.randn(4, 3, 20)
    batch = {"latents_a": latents.repeat(4, 1, 1, 1).numpy(), "text": captions.repeat(4, 1, 1).numpy()}
    training = TrainingConfig.model_validate(
        {
            "phases": [{"steps": 160, "batch_size": 16, "size": 128}],
            "learning_rate": 0.01,
            "warmup_steps": 5,
            "schedule": "cosine",
            "precision": "fp32",
            "log_every": 160,
            "checkpoint_every": 160,
        }
    )
    shape = {"patch": 1, "widths": (32,), "heads": (2,), "middle_heads": 2, "blocks": 1, "middle_depth": 1}
    baseline = Baseline(BaselineConfig(**shape, groups=8, text_width=20))
    loss = BaselineLoss(weight="p2_snr", timesteps="uniform", text_drop=0.0)
    outcome = loop.train(
        BaselineObjective(baseline, loss, torch.zeros(3, 20)),
        lambda step: batch,
        training,
        Callbacks(),
        seed=0,
        device=torch.device("cpu"),
    )
    assert outcome.finished
    baseline.eval()
    noise = Noise(range(4), torch.device("cpu"))
    steps = Steps(diffusion.times_from(diffusion.sampling_times(12), 0.8))
    with torch.inference_mode():
        drawn = denoise(lambda x, t: baseline(x, t, captions), noise(4, 4, 4), noise, steps)
    distances = torch.cdist(drawn.flatten(1), latents.flatten(1))
    assert distances.argmin(dim=1).tolist() == [0, 1, 2, 3]
    assert distances.diagonal().max() < distances[~torch.eye(4, dtype=torch.bool)].min()


def test_guidance_and_batch_leave_a_picture_to_its_own_seed() -> None:
    stage_a = StageA(StageAConfig(bottleneck_blocks=1, hidden=8, codebook_size=4, codebook_init="normal")).eval()
    baseline = Baseline(TINY).eval()
    randomised(baseline)
    text, negative = torch.randn(2, 7, 20), torch.randn(2, 7, 20)

    def draw(rows: slice, guidance: float) -> torch.Tensor:
        return sample.generate_baseline(
            stage_a, baseline, text[rows], negative[rows], [3, 4][rows], width=256, height=128, steps=2,
            guidance=guidance,
        )  # fmt: skip

    both = draw(slice(None), 2.0)
    assert (both.shape, both.dtype) == ((2, 128, 256, 3), torch.uint8)
    alone = draw(slice(1, 2), 2.0)
    assert (alone[0].int() - both[1].int()).abs().max() <= 1
    assert (draw(slice(1, 2), 1.0)[0].int() - alone[0].int()).abs().max() > 1
    with pytest.raises(BadImageSize, match="width=100"):
        sample.generate_baseline(
            stage_a, baseline, text, negative, [3, 4], width=100, height=128, steps=2, guidance=1.0
        )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"heads": (5, 10)}, "heads needs one entry for each of the 4 widths"),
        ({"groups": 48}, r"groups \(48\) must divide every width, also 320"),
        ({"heads": (3, 10, 20, 0)}, r"heads and middle_heads \(3\) must divide the width of their level \(320\)"),
        ({"middle_heads": 7}, r"heads and middle_heads \(7\) must divide the width of their level \(1280\)"),
        ({"widths": (9,), "heads": (0,), "groups": 3, "middle_heads": 3}, r"the first width \(9\) must be even"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        BaselineConfig(**values)
