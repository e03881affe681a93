"""Panels: what they put through a model at a time, and that each picture is drawn as if it were alone."""

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.models import panels
from pipeline.settings import compose
from pipeline.settings.config import Config
from stages.models.baseline import Baseline
from stages.models.compressor import Compressor
from stages.models.previewer import Previewer
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.sampling.grid import MARGIN

SIDE, PICTURES = 128, 5


def shown(config: Config, pictures: int = PICTURES) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return generator.normal(size=(PICTURES, *shape)).astype(np.float16)[:pictures]

    width = config.text[config.stage_c.text].width
    code = config.compressor.model.code_side(SIDE)
    return {
        "key": np.zeros((pictures, 16), np.uint8),
        "image": generator.integers(0, 256, (PICTURES, 3, SIDE, SIDE), np.uint8)[:pictures],
        "text": normal(16, width),
        "latents_a": normal(4, SIDE // 4, SIDE // 4),
        "latents_c": normal(16, code, code),
    }


def made(config: Config) -> dict[str, tuple[tuple[nn.Module, ...], Callable[..., bytes]]]:
    """Models, and the panel that is made with them."""
    torch.manual_seed(0)
    a, b = StageA(config.stage_a.model), StageB(config.stage_b.model)
    compressor, c = Compressor(config.compressor.model), StageC(config.stage_c.model)
    previewer, baseline = Previewer(config.previewer.model), Baseline(config.baseline.model)
    a.eval()
    return {
        "stage_a": ((a,), panels.stage_a_panel),
        "stage_b": ((a, b, compressor), panels.stage_b_panel),
        "stage_c": ((c,), panels.stage_c_panel),
        "previewer": ((previewer,), panels.previewer_panel),
        "baseline": ((a, baseline), panels.baseline_panel),
    }


@pytest.mark.parametrize("name", ["stage_a", "stage_b", "stage_c", "previewer", "baseline"])
def test_one_picture_at_a_time_goes_through_each_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "STEPS", 2)
    config = compose.load("stage_c", ["scale=micro"])
    models, panel = made(config)[name]
    rows = set()

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows.update(len(value) for value in inputs if isinstance(value, Tensor) and value.dim() == 4)
        assert not torch.is_grad_enabled()

    for model in models:
        for module in model.modules():
            module.register_forward_pre_hook(note)
    several, alone = (drawn(panel, *models, shown=shown(config, pictures)) for pictures in (PICTURES, 1))
    assert rows == {1}
    if name != "stage_c":  # whose colours are those of all its codes
        assert np.array_equal(several[: len(alone), : alone.shape[1] - MARGIN], alone[:, :-MARGIN])


def drawn(panel: Callable[..., bytes], *models: nn.Module, shown: dict[str, np.ndarray]) -> np.ndarray:
    with Image.open(io.BytesIO(panel(*models, SimpleNamespace(shown=shown)))) as picture:
        return np.asarray(picture)
