"""Weights that stand in for a training: in the config and the table, and the artifact that a step makes of them."""

import hashlib
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipeline.models import loading
from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.settings import config
from pipeline.steps import bring, interpolate
from stages.models.stage_c import StageC
from stages.weights import pretrained
from tests.existing_weights import (
    MICRO,
    STATE_C,
    STATES,
    C,
    assert_equal,
    building,
    dome272,
    loaded,
    refused,
    save,
    spoilt,
)


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


def test_every_step_that_reads_weights_refuses_broken_ones(tmp_path: Path) -> None:
    file = save(spoilt(STATE_C, "blocks.1.mapper.weight", -torch.inf), tmp_path / "c.safetensors")
    item = loading.existing("stage_c", str(file))["stage_c"]
    told = "its blocks.1.mapper.weight holds values that are no finite numbers"
    assert told in refused(lambda: pretrained.fill(StageC(C), item, C))
    taken = loaded(f"stage_c.weights={file}", "stage_c.train=null")
    assert told in refused(lambda: bring.bring(building(taken, "stage_c", tmp_path / "out")))
    between = loaded(f"interpolate={{first: {file}, second: {file}}}")
    assert told in refused(lambda: interpolate.interpolate(building(between, "stage_c", tmp_path / "out")))


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
