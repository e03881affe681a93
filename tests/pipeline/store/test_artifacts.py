"""Artifacts: what counts as done, what a reader may see, which checkpoint is gone on from."""

import contextlib
import itertools
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from datasets.files import storage
from datasets.files.storage import CorruptFile
from datasets.formats import shards
from datasets.formats.shards import Clock
from pipeline.errors import ClaimLost, InfrastructureError
from pipeline.store import claims
from pipeline.store.artifacts import MANIFEST, Fingerprint, Store
from pipeline.store.removals import rewrite

FACTS: dict[str, Any] = {"files": {}, "timed": [], "rows": 1, "notes": {}, "created": "2026-01-01"}
PRINT = Fingerprint("train_a", 1, {"lr": 0.1}, {"images": "0" * 16})


def commit(store: Store, content: bytes = b"weights"):
    entry = storage.publish(content, storage.join(store.path("stage_a", PRINT.digest), "weights"))
    return store.commit("stage_a", PRINT, {**FACTS, "files": {"weights": entry}})


def test_without_its_manifest_an_artifact_does_not_exist(store):
    storage.publish(b"weights", storage.join(store.path("stage_a", PRINT.digest), "weights"))
    assert store.find("stage_a", PRINT.digest) is None
    assert store.started("stage_a", PRINT.digest)
    artifact = commit(store)
    found = store.find("stage_a", PRINT.digest)
    assert found is not None
    assert found.manifest == artifact.manifest
    assert found.read("weights") == b"weights"
    assert [other.path for other in store.finished()] == [artifact.path]


def test_a_flipped_byte_is_noticed(store):
    artifact = commit(store)
    storage.publish(b"weighty", storage.join(artifact.path, "weights"))
    with pytest.raises(CorruptFile, match="weights does not hold the 7 bytes"):
        artifact.read("weights")


def test_the_content_hash_depends_on_bytes_only(store):
    first = commit(store).manifest["content"]
    assert commit(store).manifest["content"] == first
    assert commit(store, b"other").manifest["content"] != first


def test_the_content_hash_leaves_out_what_tells_of_times(store):
    def content(card: bytes, weights: bytes) -> str:
        path = store.path("release", PRINT.digest)
        contents = {"README.md": card, "weights": weights}
        files = {name: storage.publish(data, storage.join(path, name)) for name, data in contents.items()}
        facts = {"files": files, "timed": ["README.md"], "rows": 1, "created": "2026-01-01"}
        return store.commit("release", PRINT, facts).manifest["content"]

    assert content(b"card", b"weights") == content(b"another card", b"weights")
    assert content(b"card", b"weights") != content(b"card", b"others")
    assert content(b"card", b"weights") == "6b6c1d28df54a7c0948f30d3908bba678cf29c6d14a2cb85098abad4be25304c"


def test_fingerprints_of_today_are_those_of_every_day():
    """Roots name their folders by them."""
    clear = Fingerprint("train_c", 3, {"a.b": [1, 2.5, None, "Fuß"], "a": {"y": True, "x": {}}}, {"text": "0" * 16})
    assert clear.digest == "94ed7a3f60bfa4b5"
    assert PRINT.digest == "100d01f411d0c2b0"


def test_only_what_lies_at_its_place_is_an_artifact(store):
    """A release has files of diffusers' below it, somebody may have copied an artifact into another."""
    artifact = commit(store)
    text = storage.read(storage.join(artifact.path, MANIFEST))
    for place in ("", "stage_a", f"stage_a/{PRINT.digest}/inside", f"stage_a/{PRINT.digest}/in/side"):
        storage.publish(text, storage.join(store.root, "artifacts", place, MANIFEST))
    assert [found.path for found in store.finished()] == [artifact.path]
    assert [found.path for found in store.finished("stage_a")] == [artifact.path]


@pytest.mark.parametrize("content", [None, b"", b"weight"], ids=["missing", "empty", "cut short"])
def test_nothing_is_done_whose_files_are_not_there(store, content):
    path = store.path("stage_a", PRINT.digest)
    files = {"weights": storage.entry_of(b"weights"), "panel.png": storage.publish(b"", f"{path}/panel.png")}
    if content is not None:
        storage.publish(content, f"{path}/weights")
    facts = {"files": files, "timed": [], "rows": 1, "created": "2026-01-01"}
    with pytest.raises(
        InfrastructureError, match=rf"1 of 2 files in .*{PRINT.digest} are missing or cut short: weights$"
    ):
        store.commit("stage_a", PRINT, facts)
    assert store.find("stage_a", PRINT.digest) is None
    storage.publish(b"weights", f"{path}/weights")
    store.commit("stage_a", PRINT, facts)


def test_many_missing_files_are_not_all_named(store):
    files = dict.fromkeys("abcd", storage.entry_of(b"x"))
    with pytest.raises(InfrastructureError, match=r"4 of 4 files .*: a, b, c, \.\.\.$"):
        store.commit("stage_a", PRINT, {"files": files, "timed": [], "rows": 1, "created": "2026-01-01"})


@pytest.mark.parametrize("when", ["before", "after"])
def test_nothing_is_done_whose_folder_is_moved_aside_at_the_last_moment(store, when, monkeypatch):
    """By an earlier holder that wakes up, and cannot put it back: there is a new one, with the manifest on its way."""
    claim = claims.take(store.root, claims.artifact("stage_a", PRINT.digest), print)
    path = store.path("stage_a", PRINT.digest)
    facts = {"timed": [], "rows": 1, "created": "2026-01-01"}
    facts["files"] = {"weights": storage.publish(b"weights", f"{path}/weights")}
    publish = storage.publish

    def meanwhile(content: bytes, place: str) -> storage.FileEntry:
        if "/commit-" not in place:
            return publish(content, place)
        if when == "before":
            storage.move(path, f"{store.root}/aside")
        entry = publish(content, place)
        if when == "after":
            storage.move(path, f"{store.root}/aside")
        return entry

    monkeypatch.setattr(storage, "publish", meanwhile)
    with pytest.raises(InfrastructureError, match=r"1 of 1 files .* missing or cut short: weights"):
        store.commit("stage_a", PRINT, facts, claim)
    assert store.find("stage_a", PRINT.digest) is None
    monkeypatch.undo()
    publish(b"weights", f"{path}/weights")
    store.commit("stage_a", PRINT, facts, claim)


def test_a_holder_that_lost_commits_nothing_and_touches_nothing(store):
    claim = claims.take(store.root, claims.artifact("stage_a", PRINT.digest), print)
    path = store.path("stage_a", PRINT.digest)
    files = {"weights": storage.publish(b"weights", f"{path}/weights")}
    storage.publish(b"{}", f"{path}/forgotten.json")
    claim.release()
    claims.take(store.root, claims.artifact("stage_a", PRINT.digest), print)
    facts = {"files": files, "timed": [], "rows": 1, "created": "2026-01-01"}
    with pytest.raises(ClaimLost):
        store.commit("stage_a", PRINT, facts, claim)
    assert storage.listing(path) == ["forgotten.json", "weights"]


def test_a_fence_stands_before_every_change_of_a_finished_artifact(store):
    artifact = commit(store)

    def closed() -> None:
        raise ClaimLost("gone")

    with pytest.raises(ClaimLost):
        rewrite(artifact, "weights", lambda content: None, closed)
    assert storage.listing(artifact.path) == ["manifest.json", "weights"]
    assert rewrite(artifact, "weights", lambda content: None)
    storage.publish(b"weights", f"{artifact.path}/weights")
    (found,) = store.finished()
    with pytest.raises(ClaimLost):
        rewrite(found, "weights", lambda content: None, closed)
    assert storage.exists(f"{artifact.path}/weights")


def test_removals_from_an_earlier_build_do_not_count_for_a_later_one(store):
    artifact = commit(store)
    assert rewrite(artifact, "weights", lambda content: None)
    assert not store.find("stage_a", PRINT.digest).files
    storage.remove(storage.join(artifact.path, MANIFEST))  # and killed there, in the midst of `discard`
    commit(store)
    assert {*store.find("stage_a", PRINT.digest).files} == {"weights"}


def test_a_holder_that_slept_anywhere_in_its_commit_takes_no_removal_of_the_next_one_away(tmp_path, monkeypatch):
    """A build was forgotten in, discarded and is made anew; at each touch of that commit another run takes over,
    commits, and a picture is forgotten there, before the first one wakes up."""

    class Sleep:
        """Before the n-th touch of the artifact by a commit; what happens meanwhile does not sleep."""

        def __init__(self, touch: int, meanwhile: Callable[[], None]):
            self.left, self.meanwhile = touch, meanwhile

        def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                self.left -= 1
                if self.left == 0:
                    self.meanwhile()
                return function(*arguments, **named)

            return call

    def facts(store: Store) -> dict[str, Any]:
        path = store.path("text", PRINT.digest)
        receipt = shards.publish_receipt(
            path,
            0,
            rows_in=4,
            rows_out=4,
            files={"00000.parquet": storage.publish(b"0", f"{path}/00000.parquet")},
            clock=Clock(),
        )
        files = {"panel.png": storage.publish(b"all of them", f"{path}/panel.png")}
        about = {"timed": [], "rows": 4, "notes": {}, "created": "2026-01-01"}
        return {"files": files, "shards": {"": [receipt]}, **about}

    def take_over(store: Store, claim: claims.Claim) -> None:
        claim.release()  # as if it were dead
        other = claims.take(store.root, claim.fence.what, print)
        if not store.find("text", PRINT.digest):
            store.commit("text", PRINT, facts(store), other)
        found = store.find("text", PRINT.digest)
        assert found is not None
        rewrite(found, "panel.png", lambda content: None, other.fence)

    touches = 0
    for touch in itertools.count(1):
        store = Store(str(tmp_path / str(touch)))
        first = store.commit("text", PRINT, facts(store))
        rewrite(first, "panel.png", lambda content: b"fewer")
        storage.remove(storage.join(first.path, MANIFEST))  # and killed there, in the midst of `discard`
        told, claim = facts(store), claims.take(store.root, claims.artifact("text", PRINT.digest), print)
        sleep = Sleep(touch, partial(take_over, store, claim))
        with monkeypatch.context() as patch:
            for name in ("publish", "remove", "move", "exists", "sizes", "sweep"):
                patch.setattr(storage, name, sleep.before(getattr(storage, name)))
            with contextlib.suppress(ClaimLost, InfrastructureError):  # the other one's removal took a file of ours
                store.commit("text", PRINT, told, claim)
        if sleep.left > 0:
            break
        touches += 1
        now = store.find("text", PRINT.digest)
        assert now is not None
        assert "panel.png" not in now.files, f"asleep before touch {touch}"
        assert now.shards().counts() == {0: 4}
    assert touches >= 7


def test_a_removal_of_a_build_before_builds_had_names_counts_for_it_and_for_no_later_one(store):
    artifact = commit(store)
    manifest = {key: value for key, value in artifact.manifest.items() if key != "build"}
    storage.publish(json.dumps(manifest).encode(), storage.join(artifact.path, MANIFEST))
    (found,) = store.finished()
    assert rewrite(found, "weights", lambda content: b"less")
    record = {**json.loads(storage.read(f"{artifact.path}/forgotten.json"))}
    assert record.pop("build") == ""
    storage.publish(json.dumps(record).encode(), f"{artifact.path}/forgotten.json")
    (found,) = store.finished()
    assert found.read("weights") == b"less"
    commit(store)
    (found,) = store.finished()
    assert found.read("weights") == b"weights"
    assert rewrite(found, "weights", lambda content: None)
    (found,) = store.finished()
    assert not found.files


def test_a_manifest_of_another_format_is_refused(store):
    artifact = commit(store)
    text = json.dumps({**artifact.manifest, "format": 99}).encode()
    storage.publish(text, storage.join(artifact.path, "manifest.json"))
    with pytest.raises(CorruptFile, match="has format 99"):
        store.find("stage_a", PRINT.digest)


def test_a_failed_publish_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    storage.publish(b"old", str(target))
    with pytest.raises(FileNotFoundError):
        storage.publish(tmp_path / "missing", str(target))
    assert target.read_bytes() == b"old"
    assert storage.listing(str(tmp_path)) == ["file"]


@pytest.mark.parametrize(
    ("notes", "place"),
    [
        ({"licence": "MIT", "source": "w.safetensors"}, None),  # of weights that were brought
        ({"licence": None}, None),
        ({"licence": {"licence": None}, "sources": []}, None),
        ({"captions": {"alt": 3, "long": 4}}, None),  # by their names
        ({"captions": "3"}, "captions"),
        ({"rejected": {"url": "1"}}, "rejected.url"),
    ],
)
def test_what_is_committed_is_what_every_reader_takes(store, notes, place):
    if place is None:
        store.commit("metadata", PRINT, {**FACTS, "notes": notes})
        assert store.find("metadata", PRINT.digest).manifest["notes"] == notes
    else:
        with pytest.raises(TypeError, match=rf"its notes\.{place} is"):
            store.commit("metadata", PRINT, {**FACTS, "notes": notes})
        assert store.find("metadata", PRINT.digest) is None
