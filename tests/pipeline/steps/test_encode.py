"""Encoding: how many captions a seeded tower is centred on at a time."""

import pytest
import torch
from torch import nn

from pipeline.steps import encode
from stages.models.text import TextTower, seeded_tower
from stages.settings.models import SeededTextConfig

CAPTIONS = [f"{number} bears in a forest" for number in range(11)]


@pytest.fixture
def tower() -> TextTower:
    return seeded_tower(SeededTextConfig(model="seeded", width=32, layers=1, heads=2, context_length=16, seed=1))


def test_a_tower_is_centred_on_a_batch_at_a_time(tower: TextTower, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tower.encode(CAPTIONS)[0].mean(dim=(0, 1))
    assert torch.equal(encode._mean_state(tower, CAPTIONS), whole)  # of one batch to the bit, as it always was
    monkeypatch.setattr(encode, "CENTRED", 4)
    rows: list[int] = []

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows.append(len(inputs[0]))

    tower.register_forward_pre_hook(note)
    torch.testing.assert_close(encode._mean_state(tower, CAPTIONS), whole, rtol=1e-5, atol=1e-6)
    assert rows == [4, 4, 3]
