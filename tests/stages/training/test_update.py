"""The learning rate of each step."""

import pytest
import torch
from torch import nn

from stages.training.update import learning_rate_factor
from tests.stages.training.test_loop import config


def test_warm_up_and_schedule() -> None:
    recipe = config()
    factors = [learning_rate_factor(recipe, step) for step in range(12)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert learning_rate_factor(recipe, 12) == pytest.approx(0.01)
    assert learning_rate_factor(config(schedule="constant"), 11) == 1.0


def test_the_cosine_is_torchs() -> None:
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=10, eta_min=0.01)
    for step in range(2, 12):
        assert learning_rate_factor(config(), step) == pytest.approx(optimiser.param_groups[0]["lr"])
        optimiser.step()
        torchs.step()
