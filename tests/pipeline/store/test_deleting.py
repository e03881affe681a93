"""Deletions: marks first, under a fence, and of a finished artifact only what is damaged."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from datasets.files import storage
from datasets.files.errors import StorageError
from datasets.formats import shards
from datasets.formats.shards import Clock, ImageRow
from pipeline.errors import ClaimLost, LeaseHeld
from pipeline.store import claims, deleting
from pipeline.store.artifacts import Artifact, Fingerprint, Store, lacking

PRINT = Fingerprint("encode_a", 2, {"size": 128}, {"images": "0" * 16})
WHAT = claims.artifact("latents_a", PRINT.digest)


def open_fence() -> None:
    """Nobody has taken over."""


def built(root: Path | str, *folders: str) -> Artifact:
    """A finished artifact with two shards in each folder and the tower that all of them share."""
    store = Store(str(root))
    path = store.path("latents_a", PRINT.digest)
    files = {"tower.safetensors": storage.publish(b"tower", f"{path}/tower.safetensors")}
    for folder in folders or ("",):
        where = storage.join(path, folder) if folder else path
        for shard in range(2):
            rows = [ImageRow(row, f"{shard:016x}{row:016x}", "u", "c", "png", b"x") for row in range(3)]
            content = shards.write_tensors(rows, "latents_a", np.full((3, 2), shard, np.float16))
            name = shards.tensor_name(shard)
            entry = storage.publish(content, storage.join(where, name))
            shards.publish_receipt(where, shard, rows_in=3, rows_out=3, files={name: entry}, clock=Clock())
            files[f"{folder}/{name}" if folder else name] = entry
    facts = {"files": files, "timed": [], "rows": 6, "notes": {}, "created": "2026-01-01"}
    return store.commit("latents_a", PRINT, facts)


def leftovers(artifact: Artifact) -> None:
    for name in ("result.json", "checkpoints/a/1.safetensors", "checkpoints/a/1.json", "log/a/1.json", "notes.txt"):
        storage.publish(b"{}", f"{artifact.path}/building/{name}")


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths below an artifact in the order in which they went."""
    seen: list[str] = []
    remove = storage.remove

    def told(path: str) -> None:
        seen.append(path.partition(f"{PRINT.digest}")[2].strip("/"))
        remove(path)

    monkeypatch.setattr(storage, "remove", told)
    return seen


MARKS = (
    "manifest.json",
    "building/result.json",
    *(f"{size}/receipts/0000{shard}.json" for size in (128, 256) for shard in (0, 1)),
    "building/checkpoints/a/1.json",
    "building/log/a/1.json",
)


@pytest.fixture
def store_root() -> Iterator[str]:
    """A root in an object store."""
    yield "memory://deleting"
    memory = fsspec.filesystem("memory")
    if memory.exists("/deleting"):
        memory.rm("/deleting", recursive=True)


def test_objects_of_an_artifact_go_with_its_marks_first(store_root, removed):
    artifact = built(store_root, "128", "256")
    leftovers(artifact)
    storage.publish(b"{}", f"{artifact.path}/forgotten.json")
    removed.clear()
    deleting.discard(artifact.path, open_fence)
    assert (removed[0], removed[1], set(removed[2:8])) == (*MARKS[:2], set(MARKS[2:]))
    assert storage.listing(artifact.path) == []


def test_objects_that_a_build_has_left_go_with_their_marks_first(store_root, removed):
    artifact = built(store_root)
    leftovers(artifact)
    removed.clear()
    deleting.tidy(artifact, open_fence)
    assert (removed[0], set(removed[1:3])) == (MARKS[1], set(MARKS[-2:]))
    assert storage.listing(f"{artifact.path}/building") == []
    assert lacking(artifact.path, artifact.files) is None


def test_of_many_objects_only_so_many_go_between_two_looks(store_root, monkeypatch):
    """Who wakes up in the middle deletes no more than that of who has taken over."""
    monkeypatch.setattr(deleting, "FENCED", 3)
    path, looks = f"{store_root}/artifacts/latents_a/0123456789abcdef", iter(range(100))
    for number in range(20):
        storage.publish(b"x", f"{path}/{number:02}")

    def fence() -> None:
        if next(looks) == 5:
            raise ClaimLost("gone")

    with pytest.raises(ClaimLost):
        deleting.discard(path, fence)
    assert storage.listing(path) == [f"{number:02}" for number in range(6, 20)]  # three looks were for marks


def test_a_local_folder_goes_in_one_step(tmp_path, monkeypatch):
    artifact = built(tmp_path)
    leftovers(artifact)
    storage.publish(b"{}", f"{artifact.path}/.lost.tmp")
    seen: list[bool] = []
    remove = storage.remove
    monkeypatch.setattr(storage, "remove", lambda path: (seen.append(Path(artifact.path).exists()), remove(path)))
    deleting.tidy(artifact, open_fence)
    assert lacking(artifact.path, artifact.files) is None
    deleting.discard(artifact.path, open_fence)
    assert seen == [True, False]
    assert storage.listing(f"{tmp_path}/deleted") == []
    deleting.discard(artifact.path, open_fence)  # nothing is there


def test_a_folder_on_another_disk_goes_in_place_with_its_marks_first(tmp_path, monkeypatch):
    """As where artifacts are a mount, or a link to one."""

    def move(source: str, target: str) -> None:
        raise StorageError(errno.EXDEV, "invalid cross-device link", source)

    monkeypatch.setattr(storage, "move", move)
    artifact = built(tmp_path)
    leftovers(artifact)
    order: list[str] = []
    remove_all = storage.remove_all
    monkeypatch.setattr(storage, "remove_all", lambda paths: (order.extend(paths), remove_all(paths)))
    deleting.tidy(artifact, open_fence)
    assert lacking(artifact.path, artifact.files) is None
    assert not Path(artifact.path, "building").exists()
    order.clear()
    deleting.discard(artifact.path, open_fence)
    assert order[0].endswith("manifest.json")
    assert not Path(artifact.path).exists()


def test_what_is_a_model_is_told_by_its_name():
    models = ("stage_a", "stage_c", "stage_c_phases", "previewer", "baseline")
    others = (
        "samples",
        "samples_mine",
        "baseline_samples",
        "null_samples",
        "latents_a",
        "text_tiny",
        "held_out",
        "scores",
    )
    assert all(map(deleting.is_model, models))
    assert not any(map(deleting.is_model, others))


@pytest.mark.parametrize("linked", [".", "receipts"])
def test_what_a_link_leads_to_on_another_disk_stays(tmp_path, monkeypatch, linked):
    """The artifact, or a folder in it, may be somebody's elsewhere."""

    def move(source: str, target: str) -> None:
        raise StorageError(errno.EXDEV, "invalid cross-device link", source)

    monkeypatch.setattr(storage, "move", move)
    artifact = built(tmp_path)
    (Path(artifact.path) / "receipts").mkdir(exist_ok=True)
    (Path(artifact.path) / "receipts/00000.json").write_text("{}")
    link = Path(artifact.path, linked)
    kept = link.rename(tmp_path / "elsewhere")
    link.symlink_to(kept)
    before = sorted(kept.rglob("*"))
    deleting.discard(artifact.path, open_fence)
    assert sorted(kept.rglob("*")) == before
    assert not Path(artifact.path).is_symlink()
    assert not Path(artifact.path).exists()


@pytest.mark.parametrize("begun", [False, True])
def test_who_moved_aside_what_has_passed_to_another_puts_it_back(tmp_path, begun):
    """As it was; unless that one has begun something new there by now."""
    artifact = built(tmp_path)
    looks = iter([None, ClaimLost("gone")])

    def fence() -> None:
        if error := next(looks):
            if begun:
                storage.publish(b"new", f"{artifact.path}/new")
            raise error

    with pytest.raises(ClaimLost):
        deleting.discard(artifact.path, fence)
    assert ("new" in storage.listing(artifact.path)) == begun
    assert (lacking(artifact.path, artifact.files) is None) == (not begun)
    assert bool(storage.listing(f"{tmp_path}/deleted")) == begun


@pytest.mark.parametrize("deletion", ["discard", "tidy", "drop_shard", "reopen"])
def test_nothing_goes_once_somebody_else_has_taken_over(tmp_path, deletion):
    artifact = built(tmp_path)
    leftovers(artifact)
    before = storage.listing(artifact.path)

    def closed() -> None:
        raise ClaimLost("gone")

    calls: dict[str, Callable[[], Any]] = {
        "discard": lambda: deleting.discard(artifact.path, closed),
        "tidy": lambda: deleting.tidy(artifact, closed),
        "drop_shard": lambda: deleting.drop_shard(artifact.path, shards.receipt(artifact.path, 0), closed),
        "reopen": lambda: deleting.reopen(artifact, [deleting.Shard("", 0)], closed),
    }
    with pytest.raises(ClaimLost):
        calls[deletion]()
    assert storage.listing(artifact.path) == before


def test_who_tidies_up_alone_leaves_what_somebody_else_claims(tmp_path):
    artifact = built(tmp_path)
    leftovers(artifact)
    with claims.hold(str(tmp_path), WHAT, print):
        deleting.tidy_alone(str(tmp_path), artifact, print)
        assert storage.exists(f"{artifact.path}/building")
    deleting.tidy_alone(str(tmp_path), artifact, print)
    assert not storage.exists(f"{artifact.path}/building")
    assert claims.holder(str(tmp_path), WHAT, print) is None


def test_who_tidies_up_alone_leaves_an_artifact_that_is_no_longer_finished(tmp_path):
    """Somebody has begun to build it anew since we read its manifest, and died."""
    artifact = built(tmp_path)
    leftovers(artifact)
    storage.remove(f"{artifact.path}/manifest.json")
    deleting.tidy_alone(str(tmp_path), artifact, print)
    assert storage.exists(f"{artifact.path}/building/checkpoints/a/1.json")


def test_where_there_is_nothing_to_tidy_nothing_is_claimed(tmp_path):
    deleting.tidy_alone(str(tmp_path), built(tmp_path), print)
    assert not (tmp_path / "claims").exists()


def test_the_claim_of_a_tidy_hand_is_told_from_a_builders(tmp_path, monkeypatch):
    artifact = built(tmp_path)
    leftovers(artifact)

    def look(*_: Any) -> None:
        owner = claims.holder(str(tmp_path), WHAT, print)
        assert owner is not None
        assert owner.doing == deleting.TIDIED
        with pytest.raises(LeaseHeld, match="is being tidied by"):
            claims.take(str(tmp_path), WHAT, print)

    monkeypatch.setattr(deleting, "tidy", look)
    deleting.tidy_alone(str(tmp_path), artifact, print)


@pytest.mark.parametrize("folders", [("",), ("128",), ("128", "256")])
def test_only_damaged_shards_are_dropped(tmp_path, removed, folders):
    artifact = built(tmp_path, *folders)
    prefix = f"{folders[-1]}/" if folders[-1] else ""
    removed.clear()
    assert deleting.receipt_folders(artifact) == set(folders)
    shard = deleting.shard_of(f"{prefix}00001.parquet")
    assert shard
    deleting.reopen(artifact, [shard], open_fence)
    assert removed[:2] == ["manifest.json", f"{prefix}receipts/00001.json"]
    left = {name for name in artifact.files if storage.exists(f"{artifact.path}/{name}")}
    assert artifact.files.keys() - left == {f"{prefix}00001.parquet"}
    assert Store(str(tmp_path)).find("latents_a", PRINT.digest) is None


def test_an_artifact_that_is_repaired_counts_as_what_it_was(tmp_path):
    """What was made from it must not be built again because of it; one that is built anew counts by its bytes."""
    artifact = built(tmp_path)
    deleting.reopen(artifact, [deleting.Shard("", 1)], open_fence)
    facts = {"files": {"00000.parquet": artifact.files["00000.parquet"]}, "timed": [], "rows": 3, "created": "now"}
    again = Store(str(tmp_path)).commit("latents_a", PRINT, facts)
    assert again.manifest["content"] == artifact.manifest["content"]
    deleting.tidy(again, open_fence)
    built_anew = Store(str(tmp_path)).commit("latents_a", PRINT, facts)
    assert built_anew.manifest["content"] != artifact.manifest["content"]


@pytest.mark.parametrize(("now", "stays"), [("a", True), ("b", False)])
def test_what_was_opened_goes_on_only_with_the_inputs_that_it_was_made_from(tmp_path, now, stays):
    """Weights are trained anew while it waits: its other shards were made with the old ones."""
    artifact = built(tmp_path)
    artifact = Artifact(artifact.name, artifact.path, {**artifact.manifest, "inputs": {"images": "x", "stage_a": "a"}})
    deleting.reopen(artifact, [deleting.Shard("", 1)], open_fence)
    inputs = {"stage_a": Artifact("stage_a", "", {"content": now}), "images": Artifact("images", "", {"content": "x"})}
    deleting.go_on(artifact.path, inputs, open_fence)
    assert sorted(shards.finished(artifact.path)) == ([0] if stays else [])
    assert Store(str(tmp_path)).started("latents_a", PRINT.digest) == stays


@pytest.mark.parametrize(("now", "stays"), [("a", True), ("b", False)])
def test_what_was_begun_goes_on_only_with_the_inputs_that_it_began_with(tmp_path, now, stays):
    """It was killed, and what it is made from built anew: its shards or steps are of the old."""
    path = str(tmp_path / "artifacts/latents_a/x")
    inputs = {"stage_a": Artifact("stage_a", "", {"content": "a"})}
    assert deleting.go_on(path, inputs, open_fence) == []
    assert not Store(str(tmp_path)).started("latents_a", "x")  # nothing yet to go on from
    storage.publish(b"1", f"{path}/00001.parquet")
    inputs["stage_a"] = Artifact("stage_a", "", {"content": now})
    assert deleting.go_on(path, inputs, open_fence) == ([] if stays else ["stage_a"])
    assert storage.exists(f"{path}/00001.parquet") == stays
    assert deleting.begun_from(path) == {"stage_a": now}


@pytest.mark.parametrize("name", ["manifest.json", "forgotten.json"])
@pytest.mark.parametrize("harm", [Path.mkdir, lambda file: file.write_text("{")])
def test_a_damaged_mark_goes_before_a_build_goes_on_and_an_old_one_with_it(tmp_path, removed, name, harm):
    """Else the artifact would count as unfinished again as soon as it is finished, and its files be passed over."""
    artifact = built(tmp_path)
    Path(artifact.path, name).unlink(missing_ok=True)
    harm(Path(artifact.path, name))
    deleting.go_on(artifact.path, {}, open_fence)
    assert removed == ["manifest.json", "forgotten.json"]
    assert sorted(shards.finished(artifact.path)) == [0, 1]
    again = built(tmp_path)
    assert Store(str(tmp_path)).find(*again.called) is not None


def test_a_shard_goes_with_its_receipt_first(tmp_path, removed):
    artifact = built(tmp_path)
    removed.clear()
    assert deleting.drop_shard(artifact.path, shards.receipt(artifact.path, 1), open_fence) == 1
    assert removed == ["receipts/00001.json", "00001.parquet"]


def test_receipts_whose_files_are_gone_or_cut_short_are_found(tmp_path):
    artifact = built(tmp_path)
    found = shards.finished(artifact.path)
    assert shards.lacking(artifact.path, found.values()) == []
    (Path(artifact.path) / "00001.parquet").write_bytes(b"short")
    assert shards.lacking(artifact.path, found.values()) == [found[1]]
    (Path(artifact.path) / "00000.parquet").unlink()
    assert shards.lacking(artifact.path, found.values()) == [found[0], found[1]]


def test_a_receipt_is_not_published_by_who_has_lost(tmp_path):
    def closed() -> None:
        raise ClaimLost("gone")

    with pytest.raises(ClaimLost):
        shards.publish_receipt(str(tmp_path), 0, rows_in=0, rows_out=0, files={}, clock=Clock(), fence=closed)
    assert storage.listing(str(tmp_path)) == []


def test_who_loses_the_claim_while_tidying_up_after_others_is_told_and_goes_on(tmp_path, monkeypatch):
    artifact, told = built(tmp_path), list[str]()
    leftovers(artifact)

    def lose(artifact: Artifact, fence: Callable[[], None]) -> None:
        raise ClaimLost("somebody has taken over")

    monkeypatch.setattr(deleting, "tidy", lose)
    deleting.tidy_alone(str(tmp_path), artifact, told.append)
    assert told == ["somebody has taken over"]
