"""Forgetting while others are at work below the same root: nothing of theirs is touched."""

import json
from pathlib import Path
from typing import Any

import pytest

from datasets.files import storage
from pipeline.errors import ClaimLost, LeaseHeld, UsageError
from pipeline.store import claims, deleting
from pipeline.store.removal_list import check_carried_out, requests
from pipeline.verbs.data import forgetting
from pipeline.verbs.data.forgetting import forget
from tests.pipeline.verbs.data.forgettable import GONE, contents, found
from tests.pipeline.verbs.data.forgettable import store as store  # the fixture


def test_nothing_is_touched_while_a_run_is_at_work(store):
    before = contents(Path(store.root))
    with (
        claims.at_work(store.root, "7"),
        pytest.raises(LeaseHeld, match=r"is in use by run 7 of .*; nothing was changed"),
    ):
        forget(store.root, {GONE})
    assert contents(Path(store.root)) == before
    assert requests(store.root) == []


def test_nothing_is_touched_while_somebody_of_an_earlier_version_builds(store, monkeypatch):
    lease = {"token": "t", "host": "elsewhere", "pid": 1, "started": 0.0, "user": "bert", "heartbeat": 0}
    file = storage.join(store.path("stage_c", "other"), "building/lease.json")
    storage.publish(json.dumps(lease).encode(), file)
    read = storage.read

    def moving(path: str, *arguments: Any) -> bytes:
        if path == file:
            lease["heartbeat"] += 1
            storage.publish(json.dumps(lease).encode(), file)
        return read(path, *arguments)

    monkeypatch.setattr(storage, "read", moving)
    monkeypatch.setattr(claims.time, "sleep", lambda _: None)
    with pytest.raises(LeaseHeld, match="is being built by bert on elsewhere"):
        forget(store.root, {GONE})
    assert requests(store.root) == []


def test_of_two_who_delete_below_a_root_one_waits(store):
    with (
        claims.hold(store.root, claims.ROOT, print, "cleaned up"),
        pytest.raises(LeaseHeld, match="is being cleaned up"),
    ):
        forget(store.root, {GONE})
    assert requests(store.root) == []


def test_a_run_that_begins_while_the_request_is_written_is_noticed(store, monkeypatch):
    """It looks for requests after it has shown itself, and we for runs after the request: one sees the other."""
    before, add = contents(Path(store.root)), forgetting.removal_list.add

    def slowly(root: str, names: Any) -> None:
        add(root, names)
        storage.publish(claims.Owner.own("used").content(), f"{root}/claims/runs/8.json")

    monkeypatch.setattr(forgetting.removal_list, "add", slowly)
    with pytest.raises(LeaseHeld, match=r"run 8 of .*; once it has ended, go on with: python -m pipeline data forget"):
        forget(store.root, {GONE})
    assert contents(Path(store.root)) == before
    with pytest.raises(UsageError, match="data forget"):
        check_carried_out(store.root)
    monkeypatch.undo()
    storage.remove(f"{store.root}/claims/runs/8.json")
    assert forget(store.root, set()).pictures == {GONE}


def test_what_somebody_else_changes_is_left_alone(store, monkeypatch):
    images = claims.artifact("images", found(store)["images"].manifest["fingerprint"])
    with claims.hold(store.root, images, print), pytest.raises(LeaseHeld, match=r"images/.* is being built by"):
        forget(store.root, {GONE})
    assert forget(store.root, set()).pictures == {GONE}


def test_each_change_is_made_under_a_fence(store, monkeypatch):
    """Somebody takes the images over while they are rewritten."""
    images = found(store)["images"]
    what = claims.artifact("images", images.manifest["fingerprint"])
    tar = images.read("00001.tar")
    from_images = forgetting.removal.from_images

    def slowly(content: bytes, keys: Any) -> bytes:
        storage.publish(claims.Owner.own(deleting.CHANGED).content(), f"{store.root}/claims/{what}/000002.json")
        return from_images(content, keys)

    monkeypatch.setattr(forgetting.removal, "from_images", slowly)
    with pytest.raises(ClaimLost):
        forget(store.root, {GONE})
    assert storage.read(f"{images.path}/00001.tar") == tar
    assert not storage.exists(f"{images.path}/forgotten.json")
