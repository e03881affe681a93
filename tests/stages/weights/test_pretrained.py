"""Models in files: every layout and checkpoint that can be read, what is refused and in which words."""

import hashlib
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.models import loading
from stages import weight_files
from stages.models.compressor import Compressor
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.settings.models import CompressorConfig, StageAConfig, StageBConfig, StageCConfig
from stages.weights import convert
from stages.weights.pretrained import Found, find, require_fit
from tests.existing_weights import (
    MICRO,
    SMALL,
    STATE_A,
    STATE_C,
    STATE_X,
    STATES,
    B,
    C,
    assert_equal,
    combined_release,
    diffusers_models,
    diffusers_pipelines,
    dome272,
    own_artifacts,
    random_state,
    refused,
    save,
    spoilt,
)

# -------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("write", [dome272, diffusers_pipelines, combined_release, own_artifacts])
def test_every_layout_gives_the_same_four_models(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    found = find(tmp_path)
    assert found.keys() == STATES.keys()
    for name, item in found.items():
        assert_equal(item.state(), STATES[name])
        require_fit(item, getattr(MICRO, name).model)


WRAPPERS = ["module.", "_orig_mod.", "module._orig_mod.", "model.", "_fsdp_wrapped_module.", "ema_model.", "net.prior."]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_names_that_wrappers_give_are_taken_off(wrapper: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {wrapper + key: value for key, value in STATE_C.items()}}, tmp_path / "c.pt")
    assert_equal(find(tmp_path / "c.pt")["stage_c"].state(), STATE_C)


WORSE = random_state(StageC(C), seed=1)
CHECKPOINTS: dict[str, Any] = {
    "a trainer's": {"model": STATE_C, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "step": 7},
    "with an average": {"model": WORSE, "ema": STATE_C},
    "with an average by another name": {"model": WORSE, "EMA": STATE_C},
    "with one of torch's averages": {"model": WORSE, "swa_model": {"module": STATE_C, "n_averaged": torch.tensor(3)}},
    "with an average in a module": {"ema": {"module": STATE_C, "decay": 0.999}, "model_state_dict": WORSE},
    "of the tutorials": {"epoch": 3, "model_state_dict": STATE_C, "loss": torch.tensor(0.5)},
    "Lightning's": {
        "pytorch-lightning_version": "2.5",
        "state_dict": {
            **{f"model.{key}": value for key, value in WORSE.items()},
            **{f"ema_model.{key}": value for key, value in STATE_C.items()},
            "loss.weight": torch.ones(3),
        },
    },
    "an average": {"n_averaged": torch.tensor(9), **{f"module.{key}": value for key, value in STATE_C.items()}},
    "an average's own": {"n_averaged": torch.tensor(9), **STATE_C},
    "FSDP's": {
        "_fsdp_wrapped_module." + key.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): value
        for key, value in STATE_C.items()
    },
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_of_other_trainers_are_read(name: str, tmp_path: Path) -> None:
    torch.save(CHECKPOINTS[name], tmp_path / "c.ckpt")
    item = find(tmp_path / "c.ckpt")["stage_c"]
    assert_equal(item.state(), STATE_C)
    require_fit(item, C)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (("effnet_mapper.0.weight", "pixels_mapper.0.weight", "clip_mapper.weight", "clf.1.weight"), "Stage B"),
        (("clip_txt_pooled_mapper.weight", "clip_img_mapper.weight", "clf.1.weight"), "Stage C"),
    ],
)
def test_stable_cascades_files_are_told_as_such(keys: tuple[str, ...], told: str, tmp_path: Path) -> None:
    file = save({f"model.{key}": torch.zeros(2, 2) for key in keys}, tmp_path / "x.safetensors")
    for said in (refused(lambda: find(file)), weight_files.misfit(file, ("stage_b",), B)):
        assert f"holds Stable Cascade's {told}, which is of another architecture" in str(said)


def test_the_last_batch_norm_tells_whether_it_was_fixed() -> None:
    drifted = spoilt(STATE_X, "mapper.1.weight", 41.5)
    assert "batch_norm=affine" in refused(lambda: require_fit(found("compressor", drifted), SMALL))
    affine = SMALL.model_copy(update={"batch_norm": "affine"})
    assert "batch_norm=fixed" in refused(lambda: require_fit(found("compressor", STATE_X), affine))
    require_fit(found("compressor", drifted), affine)


def test_a_size_is_told_only_if_the_file_fits_then() -> None:
    wider = C.model_copy(update={"width": 64})
    assert "it is a model of stage_c.model.width=32" in refused(lambda: require_fit(found("stage_c", STATE_C), wider))
    cut = {key: value for key, value in STATE_C.items() if key != "out_norm.bias" and "blocks.1." not in key}
    assert "it is a model of" not in refused(lambda: require_fit(found("stage_c", cut), wider))


def test_a_files_layout_and_sha256_are_told(tmp_path: Path) -> None:
    dome272(tmp_path)
    found = find(tmp_path / "stage_b.pt")
    assert {name: item.layout for name, item in found.items()} == {
        "stage_b": "dome272 state_dict",
        "compressor": "dome272 effnet_state_dict",
    }
    digest = hashlib.sha256((tmp_path / "stage_b.pt").read_bytes()).hexdigest()
    assert found["stage_b"].sha256() == {"stage_b.pt": digest}
    diffusers_models()["prior"].save_pretrained(tmp_path / "prior")
    assert find(tmp_path / "prior")["stage_c"].layout == "diffusers"


def test_torchs_old_format_is_read_too(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE_A}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_equal(find(tmp_path / "old.pt")["stage_a"].state(), STATE_A)


# ----------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["stage_c.pt", "stage_c.safetensors", "old.pt"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_one_sentence(name: str, share: float, tmp_path: Path) -> None:
    file = tmp_path / name
    if name.endswith(".pt"):
        torch.save({"ema_state_dict": STATE_C}, file, _use_new_zipfile_serialization=name == "stage_c.pt")
    else:
        save(STATE_C, file)
    os.truncate(file, int(file.stat().st_size * share))
    assert f"{file} is truncated or" in refused(lambda: find(file))


class Poison:
    """Unpickled carelessly, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("inside", ["zip", "old", "bare pickle"])
def test_a_poisoned_file_is_refused_and_nothing_in_it_runs(inside: str, tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "stage_c.pt"
    content = {"state_dict": STATE_C, "step": Poison(mark)}
    if inside == "bare pickle":
        file.write_bytes(pickle.dumps(Poison(mark)))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=inside == "zip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "holds more than tensors; nothing in it was executed" in refused(lambda: find(file))
    assert not mark.exists()
    torch.load(file, weights_only=False) if inside != "bare pickle" else pickle.loads(file.read_bytes())
    assert mark.exists(), "the poison would have worked"


def test_another_model_is_named(tmp_path: Path) -> None:
    save(STATE_A, tmp_path / "a.safetensors")
    told = refused(lambda: loading.existing("stage_c", str(tmp_path / "a.safetensors")))
    assert told == f"stage_c.weights={tmp_path}/a.safetensors holds Stage A, not Stage C"
    save({"lm_head.weight": torch.zeros(2)}, tmp_path / "llm.safetensors")
    assert "holds none of Stage A, B, C and the compressor" in refused(lambda: find(tmp_path / "llm.safetensors"))
    (tmp_path / "empty").mkdir()
    assert "holds none of" in refused(lambda: find(tmp_path / "empty"))
    assert "there is nothing at" in refused(lambda: find(tmp_path / "nowhere"))


def test_a_model_that_a_folder_holds_twice_has_to_be_named(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(STATE_C, tmp_path / f"{name}.safetensors")
    assert "holds Stage C twice, as one.safetensors and two.safetensors" in refused(lambda: find(tmp_path))


def test_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    diffusers_models()["prior"].save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    assert f"has {len(shards) - 1} of the {len(shards)} shards" in refused(lambda: find(tmp_path))


def found(model: Any, state: dict[str, Tensor], **settings: Any) -> Found:
    return Found(model, "test", (Path("file.pt"),), state, settings)


@pytest.mark.parametrize(
    ("model", "update", "told"),
    [
        ("stage_a", {"hidden": 32}, "stage_a.model.hidden=16"),
        ("stage_a", {"codebook_size": 8}, "vquantizer.codebook.weight is [16, 4], not [8, 4]"),
        ("stage_b", {"text_width": 64}, "clip_mapper.weight is [16, 32], not [16, 64]"),
        ("stage_b", {"widths": (16, 64)}, "stage_b.model.widths=[16, 32]"),
        ("stage_c", {"depth": 3}, "it has no blocks.6.depthwise.weight; it is a model of stage_c.model.depth=2"),
        ("stage_c", {"depth": 1}, "it has blocks.3.depthwise.weight, which the configured model has not"),
        ("compressor", {"batch_norm": "plain"}, "it has mapper.1.weight, which the configured model has not"),
        ("compressor", {"latent_channels": 8}, "compressor.model.latent_channels=16"),
    ],
)
def test_another_size_is_told_by_the_first_tensor_and_the_size(model: Any, update: dict[str, Any], told: str) -> None:
    wanted = getattr(MICRO, model).model.model_copy(update=update)
    assert told in refused(lambda: require_fit(found(model, STATES[model]), wanted))


@pytest.mark.parametrize(
    ("model", "update", "told"),
    [
        ("stage_a", {"scale": 0.43}, "scale_factor 1.0, not 0.43"),
        ("stage_b", {"heads": (0, 4)}, "nhead [-1, 2], not [-1, 4]"),
        ("stage_c", {"heads": 4}, "nhead 2, not 4"),
    ],
)
def test_what_no_shape_shows_is_held_against_the_config_beside_the_file(
    model: Any, update: dict[str, Any], told: str
) -> None:
    ours = getattr(MICRO, model).model
    stated = {"_class_name": "x", **convert.arguments(ours)}
    wanted = ours.model_copy(update=update)
    require_fit(found(model, STATES[model]), wanted)
    require_fit(found(model, STATES[model], **stated), ours.model_copy(update={"dropout": 0.5}))
    assert told in refused(lambda: require_fit(found(model, STATES[model], **stated), wanted))
    own = ours.model_dump(mode="json")
    assert "the config beside it has" in refused(lambda: require_fit(found(model, STATES[model], **own), wanted))


def test_full_sizes_fit_in_both_namings_and_biggs_text_is_recognised() -> None:
    full: list[tuple[Any, Any, Callable[[Any], nn.Module], int]] = [
        ("stage_a", StageAConfig(), StageA, 122),
        ("stage_b", StageBConfig(), StageB, 990),
        ("stage_c", StageCConfig(text_width=1280), StageC, 648),
        ("compressor", CompressorConfig(), Compressor, 786),
    ]
    for model, settings, build, keys in full:
        with torch.device("meta"):
            state = build(settings).state_dict()
        theirs = convert.to_diffusers(state) if model != "compressor" else state
        assert len(theirs) == keys
        require_fit(found(model, state), settings)
        require_fit(found(model, theirs), settings)
        if model == "stage_c":
            told = refused(lambda state=theirs: require_fit(found("stage_c", state), StageCConfig()))
            assert "its cond_mapper.0.weight is [1536, 1280], not [1536, 1024]" in told
            assert told.endswith("it is a model of stage_c.model.text_width=1280")
    with torch.device("meta"):
        large = Compressor(CompressorConfig(backbone="efficientnet_v2_l")).state_dict()
    told = refused(lambda: require_fit(found("compressor", large), CompressorConfig()))
    assert told.endswith("it is a model of compressor.model.backbone=efficientnet_v2_l")
