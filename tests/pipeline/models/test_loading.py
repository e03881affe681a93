"""Models from the files that a config names, and from those of artifacts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.models import loading
from stages.models.text import seeded_tower
from stages.settings.models import ClipTextConfig, SeededTextConfig


def test_the_tower_of_a_clip_has_the_weights_of_the_file_that_the_config_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size, value in {"width": 32, "layers": 2, "heads": 2}.items():  # one that a test can make
        monkeypatch.setattr(ClipTextConfig, size, value)
    file = tmp_path / "clip.safetensors"
    published = seeded_tower(SeededTextConfig(width=32, layers=2, heads=2, context_length=77, seed=5))
    save_file({key: value.clone() for key, value in published.state_dict().items()}, file)
    tower = loading.fresh_tower(ClipTextConfig(model="ViT-H-14", weights=str(file)))
    tokens = torch.randint(0, 49000, (2, 77), generator=torch.Generator().manual_seed(0))
    assert torch.equal(tower(tokens), published(tokens))
    assert not tower.training
    assert not any(parameter.requires_grad for parameter in tower.parameters())
