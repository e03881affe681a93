"""What was made from something unfinished is found, and opened where it is made shard by shard."""

from pathlib import Path

import pytest

from datasets.files import storage
from datasets.formats import shards
from pipeline.errors import ClaimLost
from pipeline.store import claims, deleting, unfinished
from pipeline.store.artifacts import MANIFEST, Artifact, Fingerprint, Store
from tests.pipeline.store.test_deleting import built, open_fence

KEY = f"{1:016x}{0:016x}"  # a row of shard 1


def made(store: Store, name: str, *parents: Artifact) -> Artifact:
    fingerprint = Fingerprint(name, 1, {}, dict(parent.called for parent in parents))
    entry = storage.publish(b"x", storage.join(store.path(name, fingerprint.digest), "x"))
    facts = {"files": {"x": entry}, "timed": [], "rows": 1, "notes": {}, "created": f"{len(list(store.finished()))}"}
    return store.commit(name, fingerprint, facts)


def test_what_is_torn_is_so_through_whatever_was_made_from_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    images = made(store, "images")
    text, other = made(store, "text_tiny", images), made(store, "metadata")
    stage = made(store, "stage_c", text)
    samples = made(store, "samples", stage, other)
    assert unfinished.torn(store.finished()) == []
    storage.remove(storage.join(text.path, MANIFEST))
    assert [artifact.path for artifact in unfinished.torn(store.finished())] == [stage.path, samples.path]
    storage.remove(storage.join(images.path, MANIFEST))
    assert [artifact.path for artifact in unfinished.torn(store.finished())] == [stage.path, samples.path]
    made(store, "text_tiny", images)
    torn = unfinished.torn(store.finished())
    assert {artifact.name for artifact in torn} == {"text_tiny", "stage_c", "samples"}


def test_only_shards_that_hold_a_picture_go_and_only_by_who_holds_the_claim(tmp_path: Path) -> None:
    artifact = built(tmp_path, "128", "256")

    def closed() -> None:
        raise ClaimLost("gone")

    with pytest.raises(ClaimLost):
        unfinished.reopen(artifact, {KEY}, closed)
    assert unfinished.reopen(artifact, {"f" * 32}, open_fence)  # nothing to open it for
    store = Store(str(tmp_path))
    assert store.find(*artifact.called)
    assert unfinished.reopen(artifact, {KEY}, open_fence)
    assert store.find(*artifact.called) is None
    for folder in ("128", "256"):
        assert sorted(shards.finished(f"{artifact.path}/{folder}")) == [0]
    assert {*deleting.kept(artifact.path)} == {"tower.safetensors"}
    assert not unfinished.reopen(made(store, "samples"), {KEY}, open_fence)


def test_of_unfinished_builds_goes_what_may_show_a_picture_and_the_rest_stays(tmp_path: Path) -> None:
    artifact = built(tmp_path)
    storage.publish(b"png", f"{artifact.path}/panel.png")
    store = Store(str(tmp_path))
    assert unfinished.drop(store, {KEY}, ("panel.png",), print) == 0  # it is finished
    storage.remove(f"{artifact.path}/{MANIFEST}")
    assert unfinished.drop(store, {KEY}, ("panel.png",), print) == 2
    assert storage.listing(artifact.path) == ["00000.parquet", "receipts/00000.json", "tower.safetensors"]


def test_so_does_a_shard_whose_files_are_called_after_a_picture(tmp_path: Path) -> None:
    where = Store(str(tmp_path)).path("previews", "0" * 16)
    for number, key in enumerate((KEY, "f" * 32)):
        files = {f"{key}.png": storage.publish(b"png", f"{where}/{key}.png")}
        shards.publish_receipt(where, number, rows_in=1, rows_out=1, files=files, clock=shards.Clock())
    assert unfinished.drop(Store(str(tmp_path)), {KEY}, (), print) == 1
    assert storage.listing(where) == [f"{'f' * 32}.png", "receipts/00001.json"]


def test_of_what_is_finished_no_file_is_listed_to_find_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be millions."""
    artifact, store = built(tmp_path), Store(str(tmp_path))
    begun = storage.join(store.path("stage_c", "0" * 16), "panel.png")
    storage.publish(b"png", begun)
    files, listed = storage._files, list[str]()
    monkeypatch.setattr(storage, "_files", lambda folder: listed.append(folder) or files(folder))
    assert claims.old_leases(store.root) == []
    assert unfinished.drop(store, {KEY}, ("panel.png",), print) == 1
    assert [place for place in listed if storage.join(artifact.path, "x").startswith(place)] == []
