"""Panels: what they put through a model at a time, and that each picture is drawn as if it were alone."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from datasets.files import storage
from pipeline.models import loading, panels
from pipeline.models.panels import Panel, beside
from pipeline.models.showing import EMPTY, ByStages, Pictures, Prompts, Shower
from pipeline.models.training_data import Shown
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.store.artifacts import Artifact
from stages.models.baseline import Baseline
from stages.models.compressor import Compressor
from stages.models.previewer import Previewer
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.sampling.grid import MARGIN
from stages.sampling.sample import preview

SIDE, PICTURES = 128, 5


class Decoder:
    """A previewer, as `ByPreviewer` makes it, that counts how often it is asked."""

    by = "previewer"

    def __init__(self, previewer: Previewer) -> None:
        self.previewer, self.asked = previewer, 0

    def __call__(self, codes: Sequence[Tensor], texts: Sequence[Tensor], steps: int) -> Pictures:
        self.asked += 1
        return [preview(self.previewer, code)[0].numpy() for code in codes]


def shown(config: Config, pictures: int = PICTURES) -> Shown:
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return generator.normal(size=(PICTURES, *shape)).astype(np.float16)[:pictures]

    width = config.text[config.stage_c.text].width
    code = config.compressor.model.code_side(SIDE)
    fields = {
        "key": np.zeros((pictures, 16), np.uint8),
        "image": generator.integers(0, 256, (PICTURES, 3, SIDE, SIDE), np.uint8)[:pictures],
        "text": normal(16, width),
        "latents_a": normal(4, SIDE // 4, SIDE // 4),
        "latents_c": normal(16, code, code),
    }
    return Shown(fields, [f"caption {number}" for number in range(pictures)])


def made(config: Config) -> dict[str, tuple[tuple[Any, ...], Callable[..., Panel]]]:
    """Models, and the panel that is made with them."""
    torch.manual_seed(0)
    a, b = StageA(config.stage_a.model), StageB(config.stage_b.model)
    compressor, c = Compressor(config.compressor.model), StageC(config.stage_c.model)
    previewer, baseline = Previewer(config.previewer.model), Baseline(config.baseline.model)
    a.eval()
    return {
        "stage_a": ((a,), panels.stage_a_panel),
        "stage_b": ((a, b, compressor), panels.stage_b_panel),
        "stage_c": ((c, Shower(Decoder(previewer))), panels.stage_c_panel),
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

    for model in filter(lambda one: isinstance(one, nn.Module), models):
        for module in model.modules():
            module.register_forward_pre_hook(note)
    several, alone = (drawn(panel, *models, shown=shown(config, pictures)) for pictures in (PICTURES, 1))
    assert rows == {1}
    assert np.array_equal(several[: len(alone) - MARGIN, : alone.shape[1] - MARGIN], alone[:-MARGIN, :-MARGIN])


def drawn(panel: Callable[..., Panel], *models: Any, shown: Shown) -> np.ndarray:
    with Image.open(io.BytesIO(panel(*models, SimpleNamespace(shown=shown)).png())) as picture:
        return np.asarray(picture)


def test_weights_and_average_stand_side_by_side_below_the_captions() -> None:
    def panel(shade: int) -> Panel:
        return Panel(["a", "b"], {"original": picture(0)}, {"drawn": picture(shade)})

    def picture(shade: int) -> list[np.ndarray]:
        return [np.full((8, 8, 3), shade, np.uint8)] * 2

    def seen(png: bytes) -> set[int]:
        with Image.open(io.BytesIO(png)) as sheet:
            return {shade for shade in (0, 90, 180) if (np.asarray(sheet) == shade).all(axis=2).sum() > 8000}

    assert seen(beside({"weights": panel(90), "EMA": panel(180)})) == {0, 90, 180}
    assert seen(beside({"weights": panel(90)})) == {0, 90} == seen(panel(90).png())


def test_the_datas_own_codes_are_decoded_once() -> None:
    config = compose.load("stage_c", ["scale=micro"])
    decoder = Decoder(Previewer(config.previewer.model))
    shower, stage_c = Shower(decoder), StageC(config.stage_c.model)
    found = [panels.stage_c_panel(stage_c, shower, SimpleNamespace(shown=shown(config, 2))) for _ in range(2)]
    assert decoder.asked == 3  # both panels' drawn ones, and once the others
    assert found[0].given == found[1].given
    assert list(found[0].given) == ["its code, previewer"]
    assert found[0].captions == ["caption 0", "caption 1"]


@pytest.mark.parametrize("shares_text", [True, False])
def test_stages_b_and_a_show_codes_as_pictures(shares_text: bool, tmp_path: Path) -> None:
    config = compose.load("stage_c", ["scale=micro"])
    made = {}
    for name, model in {"stage_a": StageA(config.stage_a.model), "stage_b": StageB(config.stage_b.model)}.items():
        path = f"{tmp_path}/{name}"
        entry = storage.publish(loading.weights(model), f"{path}/{name}.safetensors")
        made[name] = Artifact(name, path, {"files": {f"{name}.safetensors": vars(entry)}})
    decoder = ByStages(
        config.stage_a.model, made["stage_a"], config.stage_b.model, made["stage_b"], shares_text, text=None
    )
    code, text = torch.randn(1, 16, 3, 3), torch.randn(1, 16, config.text["tiny"].width)
    (picture,) = Shower(decoder).pictures([code], [text], steps=2)
    assert picture.shape == (128, 128, 3)
    assert picture.dtype == np.uint8


def test_prompts_of_files_are_drawn_below_the_datas_captions(tmp_path: Path) -> None:
    config = compose.load("stage_c", ["scale=micro"])
    tower = loading.fresh_tower(config.text["tiny"], "tiny")
    entry = storage.publish(loading.weights(tower), f"{tmp_path}/{loading.TOWER}")
    artifact = Artifact("text_tiny", str(tmp_path), {"files": {loading.TOWER: vars(entry)}})
    prompts = Prompts(["parti: a cat", "parti: a dog"], ["a cat", "a dog"], config.text["tiny"], artifact)
    shower = Shower(Decoder(Previewer(config.previewer.model)), prompts)
    panel = panels.stage_c_panel(StageC(config.stage_c.model), shower, SimpleNamespace(shown=shown(config, 2)))
    assert panel.captions == ["caption 0", "caption 1", "parti: a cat", "parti: a dog"]
    (given,), (drawn,) = panel.given.values(), panel.drawn.values()
    assert [bool((picture == EMPTY).all()) for picture in given] == [False, False, True, True]
    assert not any(np.array_equal(drawn[2], picture) for picture in (drawn[0], drawn[3]))
    assert len(panel.png()) > 1000
