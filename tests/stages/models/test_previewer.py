"""The previewer: golden size and key layout, sides, gradients, and that it learns to see."""

import numpy as np
import torch

from stages.draws import Draws
from stages.models.geometry import denormalise
from stages.models.layers import resized
from stages.models.previewer import Previewer, PreviewerObjective
from stages.sampling import sample
from stages.settings.losses import PreviewerLoss
from stages.settings.models import PreviewerConfig
from stages.settings.training import TrainingConfig
from stages.training import loop
from stages.training.callbacks import Callbacks

TINY = PreviewerConfig(latent_channels=4, width=32)


def test_full_size_is_stable_cascades() -> None:
    with torch.device("meta"):
        previewer = Previewer(PreviewerConfig())
    assert sum(parameter.numel() for parameter in previewer.parameters()) == 3_979_651
    state = previewer.state_dict()
    # Weights of the public `previewer.safetensors` stand at every third place of one nn.Sequential.
    assert {key: tuple(value.shape) for key, value in state.items() if value.ndim == 4} == {
        "blocks.0.weight": (512, 16, 1, 1),
        "blocks.3.weight": (512, 512, 3, 3),
        "blocks.6.weight": (512, 256, 2, 2),
        "blocks.9.weight": (256, 256, 3, 3),
        "blocks.12.weight": (256, 128, 2, 2),
        "blocks.15.weight": (128, 128, 3, 3),
        "blocks.18.weight": (128, 128, 2, 2),
        "blocks.21.weight": (128, 128, 3, 3),
        "blocks.24.weight": (3, 128, 1, 1),
    }
    assert {key for key, value in state.items() if "running_mean" in key} == {
        f"blocks.{place}.running_mean" for place in range(2, 24, 3)
    }


def test_any_code_gives_a_picture_of_eight_times_its_sides() -> None:
    pictures = sample.preview(Previewer(TINY).eval(), torch.randn(2, 4, 3, 5) * 42)
    assert (pictures.shape, pictures.dtype) == ((2, 24, 40, 3), torch.uint8)


def test_the_objective_is_the_error_against_the_smaller_picture_and_reaches_all_weights() -> None:
    torch.manual_seed(0)
    objective = PreviewerObjective(Previewer(TINY), PreviewerLoss(l1=2.0, mse=3.0))
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    code = torch.randn(2, 4, 2, 2)
    loss, parts = objective({"image": image, "latents_c": denormalise(code)}, Draws(0, 0, 0, 2, 2))
    loss.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        # a bias in front of BatchNorm would be without effect, were there no GELU between them
        assert parameter.grad.abs().max() > 0, name

    preview = objective.previewer(code).detach().double().numpy()
    error = preview - resized(image, 16).double().numpy() / 255
    np.testing.assert_allclose(parts["l1"], np.abs(error).mean(), rtol=1e-5)
    np.testing.assert_allclose(parts["mse"], np.square(error).mean(), rtol=1e-5)
    np.testing.assert_allclose(loss.item(), 2 * np.abs(error).mean() + 3 * np.square(error).mean(), rtol=1e-5)


def test_it_learns_a_few_pictures_by_heart() -> None:
    torch.manual_seed(0)
    colours = torch.randint(0, 256, (4, 3, 2, 2))
    image = colours.repeat_interleave(16, 2).repeat_interleave(16, 3).to(torch.uint8)  # four flat quarters
    batch = {"image": image.numpy(), "latents_c": denormalise(torch.randn(4, 4, 2, 2)).numpy()}
    config = TrainingConfig.model_validate(
        {
            "phases": [
                {"steps": 120, "batch_size": 4, "size": 128},
                {"steps": 60, "batch_size": 4, "size": 128, "freeze_norm": True},
            ],
            "learning_rate": 0.01,
            "warmup_steps": 5,
            "schedule": "cosine",
            "precision": "fp32",
            "log_every": 180,
            "checkpoint_every": 180,
        }
    )
    previewer = Previewer(TINY)
    outcome = loop.train(
        PreviewerObjective(previewer, PreviewerLoss()),
        lambda step: batch,
        config,
        Callbacks(),
        seed=0,
        device=torch.device("cpu"),
    )
    assert outcome.finished
    seen = sample.preview(previewer.eval(), torch.from_numpy(batch["latents_c"])).permute(0, 3, 1, 2).float()
    error = seen - resized(image, 16).float()
    assert error.abs().mean() < 10  # of 255; grey is off by about 64
