"""Weights that are missing, damaged or another model's are told before anything is created."""

import os
import re
from pathlib import Path

import pytest
import torch

from pipeline.plan import weights
from pipeline.plan.wanted import planned_steps
from pipeline.run import invocation
from pipeline.settings.selection import Selection
from pipeline.store.artifacts import Look
from tests.existing_weights import (
    STATE_A,
    STATE_B,
    STATE_C,
    STATE_X,
    diffusers_models,
    dome272,
    imagenet,
    loaded,
    refused,
    save,
    spoilt,
)


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
        (["stage_a.weights=nothing.safetensors"], "stage_a.weights: {tmp}/nothing.safetensors holds none of Stage A"),
        (
            ["interpolate={first: nothing.safetensors, second: c.safetensors}"],
            "interpolate.first: {tmp}/nothing.safetensors holds none of",
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
    save({"a": torch.zeros(2)}, tmp_path / "nothing.safetensors")
    save(STATE_C, tmp_path / "cut.safetensors")
    os.truncate(tmp_path / "cut.safetensors", 1000)
    diffusers_models()["prior"].save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.store.identity.of_path", lambda path: path)  # what a store would be asked for
    settings = loaded(*words)
    planned = planned_steps(settings, Look(str(tmp_path / "root")), Selection())
    found = weights.misfit(settings, planned)
    assert found is None if told is None else told.format(tmp=tmp_path) in (found or "")


NOTHING = "cut.safetensors", "page.pth", "cut.pt"  # each damaged in its way
SCORED = (  # a view wants scores
    "data.views={fine: {min_aesthetic: 5.0}}",
    "stage_c.train.phases=[{steps: 4, batch_size: 2, size: 128, view: fine}]",
)
TOWER = ("stage_c.text=clip_h", "stage_c.model.text_width=1024", "text.clip_h={{model: ViT-H-14, weights: {file}}}")


def damaged(folder: Path) -> None:
    """A safetensors file cut short, a page of a server in a file's place, and one of torch's cut short."""
    save(STATE_C, folder / "cut.safetensors")
    os.truncate(folder / "cut.safetensors", 1000)
    (folder / "page.pth").write_text("<!DOCTYPE html><title>Not found</title>")
    torch.save(STATE_C, folder / "cut.pt")
    os.truncate(folder / "cut.pt", 1000)


@pytest.mark.parametrize("file", NOTHING)
@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("stage_c.weights", ["stage_c.weights={file}"]),
        ("compressor.weights", ["compressor.weights={file}"]),
        ("text.clip_h.weights", [*TOWER]),
        ("stage_a.loss.perceptual_weights", ["stage_a.loss.perceptual=1", "stage_a.loss.perceptual_weights={file}"]),
        ("eval.scorers.clip_h", ["eval.scorers.clip_h={file}"]),
        ("eval.distances.inception", ["eval.distances.inception={file}"]),
        ("data.captioners.new.weights", ["data.captioners={{new: {{weights: folder}}}}", "data.captions={{new: 1}}"]),
    ],
)
def test_damage_of_any_weights_is_told_by_plan_and_refused_by_run(
    file: str, key: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged(tmp_path)
    (tmp_path / "folder").mkdir()
    os.link(tmp_path / file, tmp_path / "folder" / file)
    monkeypatch.chdir(tmp_path)
    settings = loaded(*(word.format(file=file) for word in words))
    look = Look(str(tmp_path / "root"))
    planned = planned_steps(settings, look, Selection())
    told = weights.misfit(settings, planned) or ""
    assert re.fullmatch(
        rf"{re.escape(key)}: \S+{file} is truncated or no \.\w+ file: get it anew from its source", told
    )
    assert refused(lambda: invocation.run(settings, "stage_c", look, planned, "")) == told
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stage_a.loss.perceptual=1", "stage_a.loss.perceptual_weights=c.pt"], "stage_a.loss.perceptual_weights: "),
        (
            [word.format(file="c.pt") for word in TOWER],
            "text.clip_h.weights: c.pt holds nothing for",
        ),
        (["eval.scorers.clip_h=c.pt"], "c.pt does not hold the tensors of a CLIP ViT-H-14; give "),
        (["eval.scorers.clip_l=c.pt", "eval.scorers.aesthetic=c.pt"], "eval.scorers.clip_l: "),
        (
            ["data.captioners={new: {weights: bert}}", "data.captions={new: 1}"],
            "data.captioners.new.weights: bert is no image-to-text model in transformers' layout",
        ),
        (["data.scorer.clip_weights=c.pt", "data.scorer.head_weights=c.pt", *SCORED], "data.scorer.clip_weights: "),
        (  # of an evaluation alone: a training takes no such distance here
            ["stage_a.loss.perceptual_weights=c.pt", "stage_a.loss.perceptual_heads=c.pt"],
            "stage_a.loss.perceptual_weights: ",
        ),
    ],
)
def test_weights_of_another_model_are_refused_before_the_step_that_reads_them(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(STATE_C, tmp_path / "c.pt")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    save(STATE_C, tmp_path / "bert/model.safetensors")
    monkeypatch.chdir(tmp_path)
    settings = loaded(*words)
    look = Look(str(tmp_path / "root"))
    planned = planned_steps(settings, look, Selection())
    assert told in refused(lambda: invocation.run(settings, "stage_c", look, planned, ""))
    assert not (tmp_path / "root").exists()
