"""Steps from noise: the model calls that settings ask for, noise that is each picture's own; guidance: `test_traps`."""

import pytest
import torch
from torch import Tensor

from stages import diffusion
from stages.sampling.denoising import Noise, Steps, denoise
from stages.settings.sampling import SamplingConfig

CPU = torch.device("cpu")
SETTINGS = SamplingConfig(
    steps_c=4, steps_b=3, guidance_c=2.5, guidance_b=1.5, sampler="ddim", timesteps="uniform", precision="bf16"
)


@pytest.mark.parametrize("steps", [1, 2, 60])
def test_steps_are_model_calls(steps: int) -> None:
    called: list[float] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.float32
        called.append(t[0].item())
        return x

    with torch.autocast("cpu", dtype=torch.bfloat16):
        denoise(predict, torch.zeros(1, 1, 2, 2), Noise([0], CPU), Steps(diffusion.sampling_times(steps)))
    assert called == pytest.approx([1 - step / steps for step in range(steps)])


def test_each_stage_has_the_steps_that_the_settings_ask_for() -> None:
    c, b = Steps.of_c(SETTINGS), Steps.of_b(SETTINGS)
    assert c.times.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert torch.equal(b.times, diffusion.sampling_times(3))
    assert (c.guidance, b.guidance) == (2.5, 1.5)
    for steps in (c, b):
        assert (steps.sampler, steps.precision) == ("ddim", "bf16")


def test_released_times_are_stage_cs_alone() -> None:
    released = SETTINGS.model_copy(update={"timesteps": "released"})
    assert torch.equal(Steps.of_c(released).times, diffusion.released_sampling_times())
    assert torch.equal(Steps.of_b(released).times, Steps.of_b(SETTINGS).times)


def test_from_a_picture_the_steps_below_its_strength_remain() -> None:
    assert Steps.of_c(SETTINGS, strength=0.5).times.tolist() == [0.5, 0.25, 0.0]
    assert Steps.of_c(SETTINGS, strength=0.625).times.tolist() == [0.625, 0.5, 0.25, 0.0]


def test_a_samples_noise_is_its_seeds_whatever_the_batch() -> None:
    both, alone = Noise([3, 4], CPU), Noise([4], CPU)
    for shape in ((2, 3), (5,)):
        assert torch.equal(both(*shape)[1], alone(*shape)[0])
    assert not torch.equal(Noise([3], CPU)(8), Noise([4], CPU)(8))
