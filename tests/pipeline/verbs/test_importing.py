"""import: the words for the models in a folder or file, what it skips, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline.__main__ import main
from pipeline.store.artifacts import Store
from pipeline.verbs import importing
from stages.weights.pretrained import find
from tests.existing_weights import (
    STATE_C,
    STATE_X,
    STATES,
    assert_equal,
    diffusers_models,
    diffusers_pipelines,
    dome272,
    refused,
    save,
)


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
