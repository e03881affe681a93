"""Repairs: which artifacts are opened for which damaged files, what is refused, and in which order."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from datasets.files import storage
from datasets.formats import shard_table, shards
from datasets.formats.shards import Clock, ImageRow, Receipt
from pipeline.errors import LeaseHeld, UsageError
from pipeline.plan.dag import Step
from pipeline.repair import damage, repairing
from pipeline.store import claims, removal_list
from pipeline.store.artifacts import Artifact, Fingerprint, Store
from pipeline.store.deleting import Shard
from tests.pipeline.verbs.test_gc import record

FOLDERS = {"images": ("",), "captions_dense": ("",), "latents_a": ("128", "256"), "text_tiny": ("",)}


def commit(store: Store, name: str, *parents: Artifact, setting: int = 0) -> Artifact:
    """A finished artifact with two shards in each of its folders, and a file that belongs to none."""
    fingerprint = Fingerprint(f"make_{name}", 1, {"setting": setting}, dict(parent.called for parent in parents))
    path = store.path(name, fingerprint.digest)
    files = {"file": storage.publish(b"a file", f"{path}/file")}
    receipts: dict[str, list[Receipt]] = {}
    for folder in FOLDERS.get(name, ()):
        where = storage.join(path, *([folder] if folder else []))
        for shard in range(2):
            rows = [ImageRow(0, f"{shard:032x}", "u", "c", "png", b"x")]
            content = shards.write_tensors(rows, "text", np.full((1, 2), shard, np.float16))
            file = shards.tensor_name(shard)
            entry = storage.publish(content, storage.join(where, file))
            shards.publish_receipt(where, shard, rows_in=1, rows_out=1, files={file: entry}, clock=Clock())
        receipts[folder] = list(shards.finished(where).values())
    facts = {"files": files, "shards": receipts, "timed": [], "rows": 2, "notes": {}, "created": "2026-01-01"}
    return store.commit(name, fingerprint, facts)


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Artifact]:
    """Images, and all kinds of things that are made from them, latents by two confs."""
    store = Store(str(tmp_path))
    metadata = commit(store, "metadata")
    images = commit(store, "images", metadata)
    found = {"metadata": metadata, "images": images}
    for name in ("text_tiny", "view_all", "held_out", "stage_a"):
        found[name] = commit(store, name, images)
    found["latents_a"] = commit(store, "latents_a", images, found["stage_a"])
    found["others"] = commit(store, "latents_a", images, found["stage_a"], setting=1)
    found["samples"] = commit(store, "samples", images, found["stage_a"])
    return found


def harm(artifact: Artifact, name: str) -> tuple[Artifact, str]:
    file = Path(artifact.path) / name
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    return artifact, name


def finished(root: Path) -> set[str]:
    return {artifact.path for artifact in Store(str(root)).finished()}


def test_damage_is_found_and_told_from_what_is_whole(tmp_path, made):
    assert damage.damaged(made.values()) == []
    hit = [harm(made["latents_a"], "128/00001.parquet"), harm(made["stage_a"], "file")]
    gone = made["text_tiny"], "00000.parquet"
    (Path(made["text_tiny"].path) / "00000.parquet").unlink()
    found = damage.damaged(made.values())
    assert sorted(found, key=str) == sorted([*hit, gone], key=str)
    assert damage.of_no_shard(found) == [hit[1]]


@pytest.mark.parametrize("name", ["images", "latents_a"])
def test_a_damaged_table_of_shards_costs_no_shard(tmp_path, made, name):
    """It says no more than the receipts do: it is made from them when the artifact is finished again."""
    before = finished(tmp_path)
    hit = harm(made[name], shard_table.FILE)
    again = Store(str(tmp_path)).find(*made[name].called)
    assert again is not None
    assert damage.damaged([again]) == [(again, shard_table.FILE)]
    assert again.files == made[name].files
    assert damage.of_no_shard([hit]) == []
    (opened,) = repairing.open_damaged(Store(str(tmp_path)), [hit])
    assert opened.shards == set()
    assert before - finished(tmp_path) == {made[name].path}
    assert (
        sum(len(shards.finished(storage.join(made[name].path, *filter(None, [f])))) for f in FOLDERS[name])
        == len(FOLDERS[name]) * 2
    )


@pytest.mark.parametrize("folder", ["", "128"])
def test_a_damaged_receipt_costs_its_shard_alone(tmp_path, made, folder):
    artifact, name = made["latents_a" if folder else "text_tiny"], f"{folder}/receipts/00001.json".lstrip("/")
    (Path(artifact.path) / name).write_bytes(b'{"shard": 1, "rows_')
    found = damage.damaged(made.values())
    assert found == [(artifact, name)]
    assert damage.of_no_shard(found) == []
    (opened,) = repairing.open_damaged(Store(str(tmp_path)), found)
    assert opened.shards == {Shard(folder, 1)}
    assert sorted(shards.finished(storage.join(artifact.path, *filter(None, [folder])))) == [0]


@pytest.mark.parametrize("folder", ["", "128"])
def test_where_all_receipts_are_lost_all_shards_are_made_anew(tmp_path, made, folder):
    artifact = made["latents_a" if folder else "text_tiny"]
    where = storage.join(artifact.path, *filter(None, [folder]))
    shutil.rmtree(storage.join(where, "receipts"))
    found = damage.damaged(made.values())
    assert [name for _, name in found] == [f"{folder}/receipts/0000{n}.json".lstrip("/") for n in range(2)]
    assert damage.of_no_shard(found) == []
    (opened,) = repairing.open_damaged(Store(str(tmp_path)), found)
    assert opened.shards == {Shard(folder, 0), Shard(folder, 1)}


def test_parts_of_a_plan_are_no_shards(tmp_path, made):
    """They are numbered, but no receipt vouches for one alone."""
    storage.publish(b"rows", f"{made['metadata'].path}/plan/00000.parquet")
    assert damage.of_no_shard([(made["metadata"], "plan/00000.parquet")])


def test_of_what_is_not_images_only_the_damaged_shard_is_opened(tmp_path, made):
    before = finished(tmp_path)
    (opened,) = repairing.open_damaged(Store(str(tmp_path)), [harm(made["latents_a"], "128/00001.parquet")])
    assert opened.shards == {Shard("128", 1)}
    assert before - finished(tmp_path) == {made["latents_a"].path}
    assert sorted(shards.finished(f"{made['latents_a'].path}/128")) == [0]
    assert sorted(shards.finished(f"{made['latents_a'].path}/256")) == [0, 1]
    assert repairing.is_open(Store(str(tmp_path)), *made["latents_a"].called)
    assert not repairing.is_open(Store(str(tmp_path)), *made["images"].called)


def test_with_a_shard_of_images_goes_that_of_an_unfinished_build(tmp_path, made):
    """A killed one, or one whose manifest is damaged: it would go on with a shard of other pictures."""
    path = Path(made["text_tiny"].path)
    (path / "manifest.json").unlink()
    unfinished = Artifact("text_tiny", str(path), {**made["text_tiny"].manifest, "files": {}, "shards": []})
    opened = repairing.open_damaged(Store(str(tmp_path)), [harm(made["images"], "00001.parquet")], [unfinished])
    assert opened[-1].artifact.name == "images"
    assert sorted(shards.finished(str(path))) == [0]
    assert not repairing.is_open(Store(str(tmp_path)), *made["text_tiny"].called)


def test_with_a_shard_of_images_goes_what_was_made_from_it_of_any_conf(tmp_path, made):
    before = finished(tmp_path)
    opened = repairing.open_damaged(Store(str(tmp_path)), [harm(made["images"], "00001.parquet")])
    assert opened[-1].artifact.name == "images", "or a kill before it would hide the damage"
    hit = {"images", "text_tiny", "latents_a", "others", "view_all", "held_out"}
    assert before - finished(tmp_path) == {made[name].path for name in hit}
    for name in ("latents_a", "others"):
        assert sorted(shards.finished(f"{made[name].path}/256")) == [0]
    assert storage.exists(f"{made['view_all'].path}/file")


@pytest.mark.parametrize("reads", ["captions_dense", "images"])
def test_with_a_shard_of_captions_goes_the_text_that_was_encoded_from_it(tmp_path, made, reads):
    """A model may write others: text and captions of a shard are of one making."""
    captions = commit(Store(str(tmp_path)), "captions_dense", made["images"])
    text = commit(Store(str(tmp_path)), "text_tiny", made["images"], captions, setting=1)
    made |= {"captions_dense": captions, "text": text}
    before = finished(tmp_path)
    opened = repairing.open_damaged(Store(str(tmp_path)), [harm(made[reads], "00001.parquet")])
    names = [one.artifact.name for one in opened]
    assert names.index("text_tiny") < names.index("captions_dense"), "or a kill between them would hide the damage"
    hit = {text.path, captions.path}
    gone = before - finished(tmp_path)
    assert gone == hit if reads == "captions_dense" else gone > hit
    assert sorted(shards.finished(text.path)) == sorted(shards.finished(captions.path)) == [0]
    assert sorted(shards.finished(made["text_tiny"].path)) == ([0] if reads == "images" else [0, 1])


def step(name: str, *inputs: str) -> Step:
    return Step(f"make_{name}", name, inputs, (), "")


def test_what_is_made_from_something_beyond_repair_waits_for_it():
    opened = [step("images", "metadata"), step("latents_c", "images", "stage_b"), step("view", "latents_c")]
    assert repairing.held_up(opened, {"stage_b"}) == ["latents_c", "view"]
    assert repairing.held_up(opened, {"metadata"}) == ["images", "latents_c", "view"]
    assert repairing.held_up(opened, {"samples"}) == []
    assert repairing.held_up(opened, {"latents_c"}) == [], "what is opened is made anew, all of it"


def test_nothing_is_opened_that_a_run_reads_or_while_a_removal_waits(tmp_path, made):
    before = finished(tmp_path)
    record(tmp_path, 1, "run conf=stage_c", made["latents_a"], outcome="running", process={"host": "h", "pid": 1})
    files = [harm(made["images"], "00001.parquet")]
    with claims.at_work(str(tmp_path), "1"), pytest.raises(LeaseHeld, match="is in use by run 1"):
        repairing.open_damaged(Store(str(tmp_path)), files)
    removal_list.add(str(tmp_path), {"0" * 32})
    with pytest.raises(UsageError, match="go on with it: python -m pipeline data forget"):
        repairing.open_damaged(Store(str(tmp_path)), files)
    assert finished(tmp_path) == before
