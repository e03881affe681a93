"""Existing weights: every layout that can be read, what is refused and in which words, and what a run makes of them."""

import hashlib
import json
import os
import pickle
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from torch import Tensor, nn

from pipeline.__main__ import main
from pipeline.cluster.ranks import trainings
from pipeline.cluster.ranks.trainings import Order
from pipeline.errors import UsageError
from pipeline.models import loading
from pipeline.models.training_data import Reading
from pipeline.plan import obstacles
from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.plan.wanted import planned_steps
from pipeline.run import invocation
from pipeline.settings import compose, config
from pipeline.settings.selection import Selection
from pipeline.steps import bring, interpolate
from pipeline.store.artifacts import Artifact, Look, Store
from pipeline.verbs import importing
from stages import weight_files
from stages.models.compressor import Compressor
from stages.models.stage_a import StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC
from stages.settings.models import CompressorConfig, StageAConfig, StageBConfig, StageCConfig
from stages.state_dicts import read
from stages.weight_files import BadWeights
from stages.weights import convert, pretrained
from stages.weights.pretrained import Found, find, require_fit

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


def test_tensors_of_a_large_file_are_not_read_before_they_are_used(tmp_path: Path) -> None:
    """A file of holes, 8 GB by its header: whoever reads it whole runs out of memory or time."""
    size = 2 * 10**9
    entry = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
    header = json.dumps({"projection.weight": entry}).encode()
    with (tmp_path / "large.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + 4 * size)
    assert read(tmp_path / "large.safetensors")["projection.weight"].shape == (size,)


# ----------------------------------------------------------------------------------------------- what is refused


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises((BadWeights, UsageError)) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


# ------------------------------------------------------------------------------------------------ the compressor


def imagenet() -> dict[str, Tensor]:
    features = {f"features.{key[9:]}": value for key, value in STATE_X.items() if key.startswith("backbone.")}
    return {**features, "classifier.1.weight": torch.zeros(3, 2), "classifier.1.bias": torch.zeros(3)}


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


# ------------------------------------------------------------------------------------- config, table, steps, runs


def loaded(*words: str) -> config.Config:
    return compose.load("stage_c", ["scale=micro", *words])


def names(settings: config.Config) -> list[str]:
    return [step.name for step in table(settings)]


def test_weights_take_the_place_of_a_training_in_the_table() -> None:
    before = names(MICRO)
    assert not any(name.startswith(("import_", "interpolate")) for name in before)
    taken = loaded("stage_a.weights=a.pt", "stage_a.train=null", "stage_c.weights=c.pt", "stage_c.train=null")
    swaps = {"train_a": "import_a", "train_c": "import_c"}
    assert names(taken) == [swaps.get(name, name) for name in before]
    assert names(loaded("stage_c.weights=c.pt")) == before
    rest = {"previewer.train", "baseline.train"}
    assert taken.trainings().keys() == {"stage_b.train", "compressor.warmup.train"} | rest
    stages = {"stage_a.train", "stage_b.train", "stage_c.train"}
    assert loaded("stage_b.weights=b.pt").trainings().keys() == stages | rest
    assert taken.frames_of("train_c") == []


def test_an_import_depends_on_content_and_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(*words: str) -> str:
        settings = loaded("stage_c.train=null", *words)
        return fingerprints(order(table(settings), ["stage_c"]), settings.lookup)["stage_c"].digest

    monkeypatch.chdir(tmp_path)
    for name, content in {"c.pt": b"one", "same.pt": b"one", "d.pt": b"another"}.items():
        (tmp_path / name).write_bytes(content)
    before = digest("stage_c.weights=c.pt")
    assert before == digest("stage_c.weights=c.pt", "seed=3", "data.image.quality=90", "stage_b.loss.text_drop=0.5")
    assert before == digest(f"stage_c.weights={tmp_path}/same.pt")
    assert before != digest("stage_c.weights=d.pt")
    assert before != digest("stage_c.weights=c.pt", "stage_c.model.depth=3")
    assert digest("stage_c.weights=none.pt") != digest("stage_c.weights=neither.pt")


def test_neither_training_nor_weights_is_refused_and_so_are_two_origins() -> None:
    assert refused(lambda: loaded("stage_b.train=null")).startswith("stage_b: train and weights are both null")
    between = "interpolate={first: a, second: b}"
    assert "stage_c.weights and interpolate both" in refused(lambda: loaded("stage_c.weights=c.pt", between))
    assert [name for name in names(loaded(between)) if name in ("train_c", "import_c", "interpolate")] == [
        "interpolate"
    ]
    assert loaded(between, "stage_c.train=null").trainings().keys() == loaded(between).trainings().keys()


def test_workers_get_absolute_paths_of_all_weights_and_of_their_cache() -> None:
    words = [
        "stage_a.weights=a.pt",
        "interpolate={first: c.pt, second: s3://bucket/d.pt}",
        "cluster.cache.folder=cache",
    ]
    tree = loaded(*words).with_absolute_paths()
    assert tree.stage_a.weights == f"{os.getcwd()}/a.pt"
    assert tree.cluster.cache.folder == f"{os.getcwd()}/cache"
    assert tree.interpolate == config.Interpolation(first=f"{os.getcwd()}/c.pt", second="s3://bucket/d.pt")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stage_a.weights=nowhere.pt"], "stage_a.weights: there is nothing at nowhere.pt; put it there or change"),
        (["stage_a.weights=weights/vqgan_f4_v1_500k.pt"], "get it with: python -m pipeline weights get vqgan"),
        (["compressor.weights=w/efficientnet_v2_s-dd5fe13b.pth"], "weights get efficientnet_v2_s out=w"),
        (["stage_a.weights={tmp}/stage_c.pt"], "holds Stage C, not Stage A"),
        (["stage_b.weights={tmp}/bare.safetensors"], "holds no compressor"),
        (["stage_c.weights={tmp}/stage_c.pt", "stage_c.model.depth=4"], "it is a model of stage_c.model.depth=2"),
        (["compressor.weights={tmp}/stage_c.pt"], "holds neither a compressor nor"),
        (
            ["interpolate={{first: {tmp}/stage_c.pt, second: {tmp}/vqgan.pt}}"],
            "interpolate.second={tmp}/vqgan.pt holds Stage A",
        ),
        (
            ["stage_a.weights=nowhere.pt", "stage_b.weights=weights/model_v2_stage_b.pt"],
            "stage_a.weights: there is nothing at nowhere.pt; stage_b.weights: there is nothing at "
            "weights/model_v2_stage_b.pt; put nowhere.pt there or change the key; get it with: python -m pipeline "
            "weights get stage_b",
        ),
        (["stage_c.weights={tmp}/cut.safetensors"], "stage_c.weights: {tmp}/cut.safetensors is truncated"),
        (["stage_c.weights={tmp}/nan.safetensors"], "stage_c.weights: {tmp}/nan.safetensors is damaged: its blocks.1."),
        (
            ["compressor.weights={tmp}/inf.safetensors"],
            "compressor.weights: {tmp}/inf.safetensors is damaged: its mapper",
        ),
    ],
)
def test_a_run_refuses_wrong_weights_before_anything_is_created(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dome272(tmp_path)
    save(STATE_B, tmp_path / "bare.safetensors")
    save(STATE_C, tmp_path / "cut.safetensors")
    os.truncate(tmp_path / "cut.safetensors", 1000)
    save(spoilt(STATE_C, "blocks.1.mapper.weight", torch.nan), tmp_path / "nan.safetensors")
    save(spoilt(STATE_X, "mapper.0.weight", torch.inf), tmp_path / "inf.safetensors")
    monkeypatch.chdir(tmp_path)
    settings = loaded(*(word.format(tmp=tmp_path) for word in words))
    look = Look(str(tmp_path / "root"))
    planned = planned_steps(settings, look, Selection())
    assert told.format(tmp=tmp_path) in refused(lambda: invocation.run(settings, "stage_c", look, planned, ""))
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stage_c.weights=c.safetensors", "stage_c.model.depth=3"], "it is a model of stage_c.model.depth=2"),
        (["stage_c.weights=sharded", "stage_c.model.width=64"], "it is a model of stage_c.model.width=32"),
        (["stage_a.weights=c.safetensors"], "stage_a.weights: {tmp}/c.safetensors holds Stage C, not Stage A"),
        (["compressor.weights=c.safetensors"], "holds Stage C, not the compressor or an EfficientNetV2 classifier"),
        (["compressor.weights=imagenet.safetensors"], None),
        (["stage_c.weights=cut.safetensors"], "cut.safetensors is truncated or no .safetensors file"),
        (
            ["interpolate={first: c.safetensors, second: a.safetensors}"],
            "interpolate.second: {tmp}/a.safetensors holds",
        ),
        (["stage_b.weights=stage_b.pt", "stage_b.model.cond_width=48"], None),  # not a header's
        (["stage_c.weights=s3://there/c.safetensors"], None),
    ],
)
def test_a_plan_tells_of_other_models_by_headers_alone(
    words: list[str], told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dome272(tmp_path)
    save({f"module.{key}": value for key, value in STATE_C.items()}, tmp_path / "c.safetensors")
    save(STATE_A, tmp_path / "a.safetensors")
    save(imagenet(), tmp_path / "imagenet.safetensors")
    save(STATE_C, tmp_path / "cut.safetensors")
    os.truncate(tmp_path / "cut.safetensors", 1000)
    diffusers_models()["prior"].save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.store.identity.of_path", lambda path: path)  # what a store would be asked for
    settings = loaded(*words)
    planned = planned_steps(settings, Look(str(tmp_path / "root")), Selection())
    found = obstacles.misfit_weights(settings, planned)
    assert found is None if told is None else told.format(tmp=tmp_path) in (found or "")


@pytest.mark.parametrize("write", [diffusers_pipelines, combined_release, own_artifacts])
def test_headers_tell_the_sizes_of_every_layout(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    for model in ("stage_a", "stage_b", "compressor", "stage_c"):
        ours = getattr(MICRO, model).model
        assert weight_files.misfit(tmp_path, [model], ours) is None
        other = ours.model_copy(update={"latent_channels": 5, "text_width": 7})
        assert f"is not {pretrained.NAMES[model]} of this config" in str(weight_files.misfit(tmp_path, [model], other))


def test_every_step_that_reads_weights_refuses_broken_ones(tmp_path: Path) -> None:
    file = save(spoilt(STATE_C, "blocks.1.mapper.weight", -torch.inf), tmp_path / "c.safetensors")
    item = loading.existing("stage_c", str(file))["stage_c"]
    told = "its blocks.1.mapper.weight holds values that are no finite numbers"
    assert told in refused(lambda: pretrained.fill(StageC(C), item, C))
    taken = loaded(f"stage_c.weights={file}", "stage_c.train=null")
    assert told in refused(lambda: bring.bring(building(taken, "stage_c", tmp_path / "out")))
    between = loaded(f"interpolate={{first: {file}, second: {file}}}")
    assert told in refused(lambda: interpolate.interpolate(building(between, "stage_c", tmp_path / "out")))


def building(settings: config.Config, output: str, path: Path) -> Any:
    """A step's build whose calls run here."""
    return SimpleNamespace(
        config=settings,
        step=SimpleNamespace(output=output),
        path=str(path),
        inputs={},
        call=lambda function, *arguments: function(*arguments),
    )


def test_an_import_is_the_artifact_that_a_training_would_have_made(tmp_path: Path) -> None:
    dome272(tmp_path)
    settings = loaded(f"stage_b.weights={tmp_path}/stage_b.pt", "stage_b.train=null")
    facts = bring.bring(building(settings, "stage_b", tmp_path / "out"))
    assert facts.files.keys() == {"stage_b.safetensors", "compressor.safetensors"}
    for name in ("stage_b", "compressor"):
        assert_equal(safetensors.torch.load_file(tmp_path / f"out/{name}.safetensors"), STATES[name])
    assert facts.notes["source"] == f"{tmp_path}/stage_b.pt"
    digest = hashlib.sha256((tmp_path / "stage_b.pt").read_bytes()).hexdigest()
    assert facts.notes["models"]["compressor"] == {
        "layout": "dome272 effnet_state_dict",
        "sha256": {"stage_b.pt": digest},
    }


def test_half_precision_becomes_fp32(tmp_path: Path) -> None:
    file = save({key: value.half() for key, value in STATE_C.items()}, tmp_path / "stage_c.safetensors")
    settings = loaded(f"stage_c.weights={file}", "stage_c.train=null")
    bring.bring(building(settings, "stage_c", tmp_path / "out"))
    state = safetensors.torch.load_file(tmp_path / "out/stage_c.safetensors")
    assert_equal(state, {key: value.half().float() for key, value in STATE_C.items()})


@pytest.mark.parametrize("share", [0.5, 0.0, 0.3, 1.0])
def test_interpolated_weights_lie_between_two_others(share: float, tmp_path: Path) -> None:
    """Computed again in float64 from the formula (1 - share) a + share b."""
    second = random_state(StageC(C), seed=5)
    torch.save({"ema_state_dict": STATE_C}, tmp_path / "first.pt")
    save(convert.to_diffusers(second), tmp_path / "second.safetensors")
    between = f"interpolate={{first: {tmp_path}/first.pt, second: {tmp_path}/second.safetensors, share: {share}}}"
    facts = interpolate.interpolate(building(loaded(between), "stage_c", tmp_path / "out"))
    assert facts.files.keys() == {"stage_c.safetensors"}
    state = safetensors.torch.load_file(tmp_path / "out/stage_c.safetensors")
    assert state.keys() == STATE_C.keys()
    for key, value in state.items():
        expected = (1 - share) * STATE_C[key].double() + share * second[key].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


class FirstStep:
    """Stands in for a rank: keeps the weights that each training begins with, and trains nothing."""

    begun: dict[str, dict[str, Tensor]]

    device = torch.device("cpu")

    def __init__(self, payload: dict[str, Any]) -> None:
        FirstStep.begun = {}

    def logged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def sampled(self) -> AbstractContextManager[None]:
        return nullcontext()

    def train(self, name: str, objective: nn.Module, *_: Any) -> bool:
        FirstStep.begun[name] = {key: value.clone() for key, value in objective.state_dict().items()}
        return False


@pytest.mark.parametrize("existing", [True, False])
def test_a_training_begins_with_the_weights(existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dome272(tmp_path)
    monkeypatch.setattr("pipeline.cluster.ranks.trainings.Rank", FirstStep)
    monkeypatch.setattr("pipeline.models.loading.null_text", lambda _: torch.zeros(16, 32))
    files = {"stage_a": "vqgan.pt", "stage_b": "stage_b.pt", "stage_c": "stage_c.pt"}
    settings = loaded(*(f"{stage}.weights={tmp_path}/{file}" for stage, file in files.items() if existing))
    reading = Reading((), [], {}, [], {}, None, seed=0, cache=settings.cluster.cache)
    for stage in config.STAGES:
        order = Order(
            trainings=settings.trainings_of(f"train_{stage[-1]}"),
            settings=getattr(settings, stage),
            compressor=settings.compressor,
            stage_a_model=settings.stage_a.model,
            stage_a=None,
            text=Artifact("text_tiny", "", {}),
            reading=reading,
            seed=0,
        )
        trainings.run({"order": order})
        parts = [stage, "compressor"] if stage == "stage_b" else [stage]
        if not existing and stage == "stage_b":
            assert FirstStep.begun.keys() == {"compressor"}  # its warm-up, which weights make superfluous
            continue
        assert FirstStep.begun.keys() == {stage}
        for part in parts:
            begun = FirstStep.begun[stage]
            same = [torch.equal(begun[f"{part}.{key}"], value) for key, value in STATES[part].items()]
            assert all(same) if existing else not all(same)


# ---------------------------------------------------------------------------------------------------- the verb


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "import needs from=DIR or from=FILE"),
        (["from=nowhere"], "from=nowhere: there is nothing; put it there"),
        (["from=weights/model_v3_stage_c.pt"], "python -m pipeline weights get stage_c"),
        (
            ["from=llm.safetensors"],
            "error: from: {tmp}/llm.safetensors holds none of Stage A, B, C and the compressor",
        ),
        (
            ["from=bad"],
            "error: from: {tmp}/bad holds none of Stage A, B, C and the compressor, to go by its tensors' names: ",
        ),
        (
            ["from=stage_c.pt", "stage_c.model.width=64"],
            "stage_c.weights: {tmp}/stage_c.pt is not Stage C of this config",
        ),
        (["from=stage_c.pt", "stage_c.model.width=64"], "it is a model of stage_c.model.width=32"),
        (["from=stage_c.pt", "stage_d=1"], "stage_d: there is no such key"),
        (["from=stage_c.pt", "now"], "'now' is neither a flag nor key=value"),
    ],
)
def test_an_import_that_cannot_be_is_refused(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    dome272(tmp_path)
    save({"lm_head.weight": torch.zeros(2)}, tmp_path / "llm.safetensors")
    for name in ("bad/one.pt", "bad/two.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert main(["import", "conf=stage_c", "scale=micro", *words]) == 2
    message = capsys.readouterr().err
    assert told.format(tmp=tmp_path) in message
    assert not (tmp_path / "runs").exists()


def test_a_compressor_alone_is_only_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save(STATE_X, tmp_path / "it's.safetensors")
    assert main(["import", "conf=stage_c", "scale=micro", "from=it's.safetensors"]) == 0
    said = capsys.readouterr().err
    assert "found the compressor in" in said
    assert "nothing to build by itself; use with run, sample, export: conf=stage_c scale=micro" in said
    assert not (tmp_path / "runs").exists()


def test_diffusers_decoder_brings_stage_a_and_says_where_a_compressor_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = diffusers_models()
    for name in ("vqgan", "decoder"):
        parts[name].save_pretrained(tmp_path / "decoder" / name)
    lines, overrides = importing.composed("stage_c", [], str(tmp_path / "decoder"))
    assert overrides == [
        f"stage_a.weights={tmp_path}/decoder/vqgan/diffusion_pytorch_model.safetensors",
        "stage_a.train=null",
    ]
    assert list(lines) == ["Stage A"]
    said = capsys.readouterr().err
    assert "skipped: Stage B in" in said
    assert "compressor.weights=PATH" in said
    assert "weights get stage_b" in said
    words = [f"compressor.weights={save(STATE_X, tmp_path / 'x.safetensors')}"]
    _, overrides = importing.composed("stage_c", words, str(tmp_path / "decoder"))
    assert [word.partition("=")[0] for word in overrides[1::2]] == ["stage_b.weights", "stage_a.weights"]


def test_what_nothing_tells_is_said_to_be_assumed(tmp_path: Path) -> None:
    lines, _ = importing.composed("stage_c", [], str(save(STATE_C, tmp_path / "c.safetensors")))
    assert "stage_c.model.heads, stage_c.model.scaled_codes: taken as the config has it" in lines["Stage C"]


def test_files_that_cannot_be_used_do_not_stand_in_the_way_of_an_import(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dome272(tmp_path)
    (tmp_path / "broken.pt").write_bytes(b"x")
    save({"lm_head.weight": torch.zeros(2)}, tmp_path / "llm.safetensors")
    diffusers_models()["prior"].save_pretrained(tmp_path / "old/prior", max_shard_size="20KB")
    next(tmp_path.glob("old/prior/*.safetensors")).unlink()
    found, overrides = importing.composed("stage_c", ["scale=micro"], str(tmp_path))
    assert len(found) == 4
    assert overrides == [
        "scale=micro",
        f"stage_b.weights={tmp_path}/stage_b.pt",
        "stage_b.train=null",
        f"stage_c.weights={tmp_path}/stage_c.pt",
        "stage_c.train=null",
        f"stage_a.weights={tmp_path}/vqgan.pt",
        "stage_a.train=null",
    ]
    *skipped, count = capsys.readouterr().err.splitlines()
    assert count == "files skipped: 3; models found: 4"
    for line, told in zip(
        skipped, ("broken.pt is truncated", "llm.safetensors holds none", "shards of diff"), strict=True
    ):
        assert line.startswith("skipped: ")
        assert told in line
    told = refused(lambda: find(tmp_path))
    assert "broken.pt is truncated" in told, "a run is not content with a folder that is not whole"


def test_an_import_names_the_files_of_each_model(tmp_path: Path) -> None:
    diffusers_pipelines(tmp_path)
    _, overrides = importing.composed("stage_c", [], str(tmp_path))
    assert dict(word.split("=") for word in overrides if ".weights=" in word) == {
        "stage_a.weights": f"{tmp_path}/wuerstchen/vqgan/diffusion_pytorch_model.safetensors",
        "stage_b.weights": f"{tmp_path}/wuerstchen/decoder/diffusion_pytorch_model.safetensors",
        "compressor.weights": f"{tmp_path}/compressor/model.safetensors",
        "stage_c.weights": f"{tmp_path}/wuerstchen-prior/prior",  # in shards
    }


@pytest.mark.ray
def test_import_through_the_command_line(pipeline: Any, answer: Any, tmp_path: Path) -> None:
    """All four models of a folder at once; the words that it prints are those that find them again."""
    root, source = tmp_path / "root", tmp_path / "public, (v2)"
    source.mkdir()
    dome272(source)
    done = pipeline("import", "conf=stage_c", "scale=micro", f"root={root}", f"from={source}")
    stages = {artifact.name: artifact for artifact in Store(str(root)).finished()}
    assert stages.keys() == {"stage_a", "stage_b", "stage_c"}
    for name, state in STATES.items():
        artifact = stages["stage_b" if name == "compressor" else name]
        assert_equal(safetensors.torch.load(artifact.read(f"{name}.safetensors")), state)
        assert artifact.path in done.stderr
    assert stages["stage_b"].manifest["notes"]["source"] == f"{source}/stage_b.pt"
    use = next(line for line in done.stderr.splitlines() if line.startswith("use with"))
    import shlex

    words = shlex.split(use.split(": ", 1)[1])
    assert f"root={root}" in words
    plan = json.loads(answer("plan", *words, "--json").stdout)
    states = {step["artifact"]: step["state"] for step in plan["steps"]}
    assert [states[name] for name in ("stage_a", "stage_b", "stage_c")] == ["done"] * 3
    again = answer("import", "conf=stage_c", "scale=micro", f"root={root}", f"from={source}")
    assert stages["stage_c"].path in again.stderr
