"""Other runs on the same root: what a run counts on is looked at again, what others read is not built anew."""

import json
from pathlib import Path
from typing import Any

import pytest

from datasets.files import storage
from pipeline.errors import LeaseHeld
from pipeline.run.neighbours import check_standing, check_unread
from pipeline.store import claims, deleting
from pipeline.store.artifacts import Artifact, Fingerprint, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def commit(store: Store, name: str, *parents: Artifact) -> Artifact:
    fingerprint = Fingerprint(name, 1, {}, {parent.name: parent.manifest["fingerprint"] for parent in parents})
    entry = storage.publish(b"content", storage.join(store.path(name, fingerprint.digest), "file"))
    return store.commit(name, fingerprint, {"files": {"file": entry}, "timed": [], "rows": 1, "created": "now"})


def what(artifact: Artifact) -> str:
    return claims.artifact(artifact.name, artifact.manifest["fingerprint"])


def record(store: Store, run: str, *wanted: Artifact, **about: Any) -> None:
    told = {
        "id": run,
        "user": "anna",
        "outcome": "done",
        "command": "python -m pipeline run conf=stage_c",
        "started": "2026-01-01T00:00:00+00:00",
        "steps": {},
        "fingerprints": {artifact.name: artifact.manifest["fingerprint"] for artifact in wanted},
    }
    storage.publish(json.dumps(told | about).encode(), f"{store.root}/invocations/{run}.json")


def test_what_stands_is_left_and_tidied(store):
    artifact = commit(store, "images")
    storage.publish(b"state", f"{artifact.path}/building/checkpoints/1.safetensors")
    check_standing(store, [artifact])
    assert storage.listing(artifact.path) == ["file", "manifest.json"]


@pytest.mark.parametrize("doing", [deleting.DELETED, "built"])
def test_what_somebody_deletes_or_builds_anew_is_not_counted_on(store, doing):
    artifact = commit(store, "images")
    told = rf"images/\w+ is being {doing} by .*; wait for that, then start again"
    with claims.hold(store.root, what(artifact), print, doing), pytest.raises(LeaseHeld, match=told):
        check_standing(store, [artifact])
    check_standing(store, [artifact])


def test_who_only_tidies_is_no_hindrance(store):
    artifact = commit(store, "images")
    storage.publish(b"state", f"{artifact.path}/building/state")
    with claims.hold(store.root, what(artifact), print, deleting.TIDIED):
        check_standing(store, [artifact])
    assert storage.exists(f"{artifact.path}/building/state")


def test_what_was_deleted_since_it_was_planned_is_missed(store):
    artifact = commit(store, "images")
    deleting.discard(artifact.path, lambda: None)
    with pytest.raises(LeaseHeld, match="was deleted while this run began"):
        check_standing(store, [artifact])


def test_nothing_is_built_anew_that_a_run_at_work_reads(store):
    images = commit(store, "images")
    text = commit(store, "text", images)
    digest = images.manifest["fingerprint"]
    record(store, "other", text)
    check_unread(store, "images", digest, "own")
    with claims.at_work(store.root, "other"):
        with pytest.raises(LeaseHeld, match=rf"images/{digest} is in use by run other of anna; wait for that run"):
            check_unread(store, "images", digest, "own")
        check_unread(store, "images", digest, "other")  # its own wants are no hindrance
        check_unread(store, "images", "0" * 16, "own")
    check_unread(store, "images", digest, "own")
