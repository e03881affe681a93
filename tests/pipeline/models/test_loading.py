"""Models from the files that a config names, and from those of artifacts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.models import loading
from stages.models.compressor import Compressor
from stages.models.text import seeded_tower
from stages.settings.models import ClipTextConfig, SeededTextConfig
from stages.weights import pretrained
from tests.existing_weights import (
    SMALL,
    STATE_B,
    STATE_C,
    STATE_X,
    assert_equal,
    dome272,
    imagenet,
    random_state,
    refused,
    save,
)


def test_the_tower_of_a_clip_has_the_weights_of_the_file_that_the_config_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size, value in {"width": 32, "layers": 2, "heads": 2}.items():  # one that a test can make
        monkeypatch.setattr(ClipTextConfig, size, value)
    file = tmp_path / "clip.safetensors"
    published = seeded_tower(SeededTextConfig(width=32, layers=2, heads=2, context_length=77, seed=5))
    save_file({key: value.clone() for key, value in published.state_dict().items()}, file)
    tower = loading.fresh_tower(ClipTextConfig(model="ViT-H-14", weights=str(file)), "clip_h")
    tokens = torch.randint(0, 49000, (2, 77), generator=torch.Generator().manual_seed(0))
    assert torch.equal(tower(tokens), published(tokens))
    assert not tower.training
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_a_text_encoders_folder_stands_for_its_file(tmp_path: Path) -> None:
    state = {"text_model.final_layer_norm.weight": torch.arange(3.0)}
    save(state, tmp_path / "text_encoder" / "model.safetensors")
    save({"half": torch.zeros(1)}, tmp_path / "text_encoder" / "model.fp16.safetensors")
    assert_equal(loading.state_dict(str(tmp_path / "text_encoder")), state)
    save(state, tmp_path / "other" / "model.safetensors")
    assert "holds the weights of 2 models" in refused(lambda: loading.state_dict(str(tmp_path)))


def test_stage_bs_own_compressor_comes_first_then_a_whole_one_then_none(tmp_path: Path) -> None:
    other = random_state(Compressor(SMALL), seed=9)
    whole, classifier = save(other, tmp_path / "x.safetensors"), save(imagenet(), tmp_path / "i.safetensors")
    bare = save(STATE_B, tmp_path / "b.safetensors")
    dome272(tmp_path)
    both = loading.existing("stage_b", str(tmp_path / "stage_b.pt"), str(whole))
    assert_equal(both["compressor"].state(), STATE_X)
    assert_equal(loading.existing("stage_b", str(bare), str(whole))["compressor"].state(), other)
    for compressor in (None, str(classifier)):
        told = refused(lambda path=compressor: loading.existing("stage_b", str(bare), path))
        assert "b.safetensors holds no compressor; give the one that Stage B was trained with" in told


def test_the_key_compressor_weights_takes_a_whole_compressor_or_imagenets(tmp_path: Path) -> None:
    for name, state in {"whole": STATE_X, "imagenet": imagenet()}.items():
        compressor = Compressor(SMALL)
        before = {key: value.clone() for key, value in compressor.state_dict().items()}
        start = loading.compressor_start(str(save(state, tmp_path / f"{name}.safetensors")))
        pretrained.fill(compressor, start, SMALL)
        for key, value in compressor.state_dict().items():
            taken = name == "whole" or key.startswith("backbone.")
            assert torch.equal(value, STATE_X[key] if taken else before[key]), key
    save(STATE_C, tmp_path / "c.safetensors")
    told = refused(lambda: loading.compressor_start(str(tmp_path / "c.safetensors")))
    assert "holds neither a compressor nor an EfficientNetV2 classifier" in told
