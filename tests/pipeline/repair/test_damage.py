"""Damage: what is found, of which artifacts a repair can begin, and what is said of all others."""

import shutil
from pathlib import Path

import pytest

from pipeline.repair import damage
from pipeline.store.artifacts import Artifact, Fingerprint, Store
from tests.pipeline.repair.test_repairing import commit, harm

SAME = "conf=stage_c"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


@pytest.fixture
def made(store: Store) -> dict[str, Artifact]:
    """What a conf makes, parents first."""
    found = {"images": commit(store, "images")}
    found["stage_a"] = commit(store, "stage_a", found["images"])
    found["text_tiny"] = commit(store, "text_tiny", found["images"])
    found["latents_a"] = commit(store, "latents_a", found["images"], found["stage_a"])
    return found


def examined(store: Store, made: dict[str, Artifact]) -> damage.Damage:
    prints = {}
    for name, artifact in made.items():
        of = {key: artifact.manifest[key] for key in ("step", "version", "settings", "parents")}
        prints[name] = Fingerprint(**of)
    return damage.examine(store, prints)


def test_what_is_whole_has_no_damage(store, made):
    found = examined(store, made)
    assert list(found.artifacts) == list(made)
    assert (found.paths, found.waiting, list(found.remedies(SAME))) == ([], [], [])


def test_what_cannot_be_made_anew_does_not_keep_the_rest_from_it(store, made):
    """Weights are damaged, and shards of what is made from them and of what is not."""
    shard = [harm(made[name], file) for name, file in (("images", "00001.parquet"), ("latents_a", "128/00000.parquet"))]
    alone = [harm(made["stage_a"], "file")]
    found = examined(store, made)
    assert (found.mendable, found.alone, found.waiting) == (shard[:1], alone, ["latents_a"])
    (remedy,) = found.remedies(SAME)
    anew = "python -m pipeline run conf=stage_c --force make_stage_a --until make_stage_a"
    path = f"{made['stage_a'].path}/file"
    assert remedy == f"{path}: damaged, and of no shard; put back a copy, or make all of stage_a anew: {anew}"
    assert found.left() == [path]
    assert list(found.remedies(SAME, ["stage_a"])) == found.left(["stage_a"]) == []


def test_what_can_only_be_made_anew_from_what_waits_comes_later(store, made):
    """A run that is forced to it would fail on the shard."""
    made["stage_b"] = commit(store, "stage_b", made["latents_a"])
    made["samples"] = commit(store, "samples", made["stage_a"])
    for name, file in (
        ("stage_a", "file"),
        ("latents_a", "128/00000.parquet"),
        ("stage_b", "file"),
        ("samples", "file"),
    ):
        harm(made[name], file)
    found = examined(store, made)
    assert found.later == ["latents_a", "stage_b"]
    assert ["stage_a" in told for told in found.remedies(SAME)] == [True, False]
    assert len(found.left()) == 3


def test_so_it_is_with_what_waits_itself_and_with_what_is_made_anew_as_a_whole(store, made):
    """Of an artifact that is opened all files are made."""
    text = commit(store, "captions_dense", made["text_tiny"])
    made["captions_dense"] = text
    for artifact, file in ((made["images"], "file"), (made["text_tiny"], "00000.parquet"), (text, "00000.parquet")):
        harm(artifact, file)
    assert examined(store, made).waiting == ["text_tiny", "captions_dense"]
    harm(made["images"], "00000.parquet")
    assert examined(store, made).waiting == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 2, "files": 7}'])
def test_a_damaged_manifest_hides_no_other_damage(store, made, content):
    marks = [f"{made[name].path}/manifest.json" for name in ("stage_a", "text_tiny")]
    for mark in marks:
        Path(mark).write_bytes(content)
    shard = harm(made["images"], "00001.parquet")
    waits = harm(made["latents_a"], "128/00000.parquet")
    found = examined(store, made)
    assert found.paths == [*marks, f"{shard[0].path}/{shard[1]}", f"{waits[0].path}/{waits[1]}"]
    assert (found.mendable, found.waiting) == ([shard], ["latents_a"])
    told = list(found.remedies(SAME))
    assert [one.partition(" is damaged: ")[0] for one in told] == found.left() == marks
    assert [(build.name, build.path) for build in found.unfinished] == [
        (name, made[name].path) for name in ("stage_a", "text_tiny")
    ]
    assert all("put it back from a copy, or start a run of the same conf" in one for one in told)


def test_a_folder_in_a_files_place_is_damage_like_another(store, made):
    file = Path(made["images"].path) / "00001.parquet"
    file.unlink()
    file.mkdir()
    assert examined(store, made).files == [(made["images"], "00001.parquet")]
    shutil.rmtree(file)
