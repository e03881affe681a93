"""Existing weights of the smallest models, in every layout that can be read, and a config and a step that take them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from torch import Tensor, nn

from pipeline.errors import UsageError
from pipeline.settings import compose, config
from stages.models.compressor import Compressor
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.weight_files import BadWeights
from stages.weights import convert

MICRO = compose.load("stage_c", ["scale=micro"])
A, B, C = MICRO.stage_a.model, MICRO.stage_b.model, MICRO.stage_c.model
SMALL = MICRO.compressor.model


def random_state(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A module's state dict with a random number in every place, so that nothing can stand in for it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.rand(value.shape, generator=generator) + 0.5 if value.is_floating_point() else value + 3
        for key, value in module.state_dict().items()
    }


STATE_A, STATE_B, STATE_C = random_state(StageA(A)), random_state(StageB(B)), random_state(StageC(C))
STATE_X = random_state(Compressor(SMALL)) | {
    "mapper.1.weight": torch.full((SMALL.latent_channels,), 42.0),
    "mapper.1.bias": torch.full((SMALL.latent_channels,), -1.0),
}
STATES = {"stage_a": STATE_A, "stage_b": STATE_B, "compressor": STATE_X, "stage_c": STATE_C}


def dome272(folder: Path) -> None:
    """The three public files' layout: entries, optimiser state and all."""
    moments = {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    torch.save({"state_dict": STATE_A, "optimizer_state": moments}, folder / "vqgan.pt")
    torch.save({"state_dict": STATE_B, "effnet_state_dict": STATE_X, "step": 7}, folder / "stage_b.pt")
    worse = random_state(StageC(C), seed=1)
    torch.save({"state_dict": worse, "ema_state_dict": STATE_C, "metrics": {}}, folder / "stage_c.pt")


def diffusers_models() -> dict[str, Any]:
    made = {
        "vqgan": (PaellaVQModel(**convert.arguments(A)), STATE_A),
        "decoder": (WuerstchenDiffNeXt(**convert.arguments(B)), STATE_B),
        "prior": (WuerstchenPrior(**convert.arguments(C)), STATE_C),
    }
    for model, state in made.values():
        model.load_state_dict(convert.to_diffusers(state))
    return {name: model for name, (model, _) in made.items()}


def diffusers_pipelines(folder: Path) -> None:
    """A decoder's and a prior's pipeline as the Hub has them, the decoder also in half precision, the prior sharded."""
    parts = diffusers_models()
    for name in ("vqgan", "decoder"):
        parts[name].save_pretrained(folder / "wuerstchen" / name)
    parts["decoder"].save_pretrained(folder / "wuerstchen/decoder", variant="fp16", safe_serialization=False)
    parts["prior"].save_pretrained(folder / "wuerstchen-prior/prior", max_shard_size="20KB")
    assert len(list(folder.glob("wuerstchen-prior/prior/*-of-*.safetensors"))) > 1
    (folder / "wuerstchen/text_encoder").mkdir()
    save({"text_model.final_layer_norm.weight": torch.zeros(3)}, folder / "wuerstchen/text_encoder/model.safetensors")
    save(STATE_X, folder / "compressor/model.safetensors")


def combined_release(folder: Path) -> None:
    """What `export` writes: each model in two places, the upper one of the combined pipeline."""
    parts = diffusers_models()
    for name, places in {
        "vqgan": ("vqgan", "decoder/vqgan"),
        "decoder": ("decoder", "decoder/decoder"),
        "prior": ("prior_prior", "prior/prior"),
    }.items():
        for place in places:
            parts[name].save_pretrained(folder / place)
    save(STATE_X, folder / "compressor/model.safetensors")
    (folder / "compressor/config.json").write_text(SMALL.model_dump_json())


def own_artifacts(folder: Path) -> None:
    for stage, names in {"stage_a": ["stage_a"], "stage_b": ["stage_b", "compressor"], "stage_c": ["stage_c"]}.items():
        for name in names:
            save(STATES[name], folder / stage / f"{name}.safetensors")
        settings = {stage: {"model": getattr(MICRO, stage).model.model_dump(mode="json")}}
        (folder / stage / "manifest.json").write_text(json.dumps({"format": 1, "settings": settings}))


def imagenet() -> dict[str, Tensor]:
    features = {f"features.{key[9:]}": value for key, value in STATE_X.items() if key.startswith("backbone.")}
    return {**features, "classifier.1.weight": torch.zeros(3, 2), "classifier.1.bias": torch.zeros(3)}


def spoilt(state: dict[str, Tensor], key: str, value: float) -> dict[str, Tensor]:
    """The state with one number of a tensor replaced."""
    tensor = state[key].clone()
    tensor.view(-1)[-1] = value
    return {**state, key: tensor}


def save(state: dict[str, Tensor], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, path)
    return path


def assert_equal(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[key], expected[key]) for key in expected)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises((BadWeights, UsageError)) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def loaded(*words: str) -> config.Config:
    return compose.load("stage_c", ["scale=micro", *words])


def building(settings: config.Config, output: str, path: Path) -> Any:
    """A step's build whose calls run here."""
    return SimpleNamespace(
        config=settings,
        step=SimpleNamespace(output=output),
        path=str(path),
        inputs={},
        call=lambda function, *arguments: function(*arguments),
    )
