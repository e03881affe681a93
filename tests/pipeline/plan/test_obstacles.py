"""What stands in a run's way is told before anything is created: weights of other models, bf16 without it."""

import os
from pathlib import Path

import pytest
import torch

from pipeline.errors import UsageError
from pipeline.plan import obstacles
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
from tests.pipeline.settings.loading import load


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
    found = obstacles.misfit_weights(settings, planned)
    assert found is None if told is None else told.format(tmp=tmp_path) in (found or "")


def test_bf16_is_refused_where_a_gpu_has_none(tmp_path):
    def check(kind: str, *words: str, selection: Selection = Selection()) -> None:  # noqa: B008
        loaded = load(*words)
        obstacles.check_precision(loaded, planned_steps(loaded, Look(str(tmp_path)), selection), kind)

    words = ("stage_c.train.precision=bf16", "sample.precision=bf16")
    for kind in ("cpu", "cuda:GPU", "cuda:A100+H100"):
        check(kind, *words)
    check("cuda:V100")
    check("cuda:V100", *words, selection=Selection(until="train_b"))
    told = "V100 GPUs cannot compute in bf16; give stage_c.train.precision=fp32 sample.precision=fp32"
    with pytest.raises(UsageError, match=told):
        check("cuda:A100+V100", *words)
