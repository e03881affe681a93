"""Artifacts and leases: what counts as done, what a reader may see, who may build."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from datasets.files import storage
from datasets.files.storage import CorruptFile
from pipeline.cluster.checkpoints import Checkpoints
from pipeline.errors import LeaseHeld
from pipeline.store import lease
from pipeline.store.artifacts import MANIFEST, Fingerprint, Store, rewrite

PRINT = Fingerprint("train_a", 1, {"lr": 0.1}, {"images": "0" * 16})


def commit(store: Store, content: bytes = b"weights"):
    entry = storage.publish(content, storage.join(store.path("stage_a", PRINT.digest), "weights"))
    facts = {"files": {"weights": entry}, "timed": [], "rows": 1, "notes": {}, "created": "2026-01-01"}
    return store.commit("stage_a", PRINT, facts)


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path) -> Store:
    """A store on a local folder, and one behind a URI that fsspec serves."""
    return Store(str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}")


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


def test_a_discarded_artifact_is_gone_but_its_lease_stays(tmp_path):
    store = Store(str(tmp_path))
    artifact = commit(store)
    with lease.hold(artifact.path, print):
        store.discard("stage_a", PRINT.digest)
        assert storage.listing(artifact.path) == ["building/lease.json"]
    assert store.find("stage_a", PRINT.digest) is None


def test_a_heartbeat_while_it_is_tidied_does_no_harm(store, monkeypatch):
    remove, raised = storage.remove, []

    def as_a_heartbeat_begins(path: str) -> None:
        if path.endswith("building") and not raised:
            raised.append(path)
            raise FileNotFoundError("Cannot get information for path .lease.json.0d31.tmp")
        remove(path)

    monkeypatch.setattr(storage, "remove", as_a_heartbeat_begins)
    artifact = commit(store)
    assert raised
    assert not storage.listing(storage.join(artifact.path, "building"))


def test_removals_from_an_earlier_build_do_not_count_for_a_later_one(store):
    artifact = commit(store)
    assert rewrite(artifact, "weights", lambda content: None)
    assert not store.find("stage_a", PRINT.digest).files
    storage.remove(storage.join(artifact.path, MANIFEST))  # and killed there, in the midst of `discard`
    commit(store)
    assert {*store.find("stage_a", PRINT.digest).files} == {"weights"}


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


HOLD = """
import sys, time
from pipeline.store import lease
with lease.hold(sys.argv[1], print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lease on `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_live_owner_is_respected_and_named(tmp_path, holder):
    with pytest.raises(LeaseHeld, match=f"pid {holder.pid}"), lease.hold(str(tmp_path), print):
        pass


def test_a_killed_owner_is_replaced(tmp_path, holder, capsys):
    holder.send_signal(signal.SIGKILL)
    while holder.poll() is None:
        time.sleep(0.01)
    with lease.hold(str(tmp_path), print):
        assert storage.listing(str(tmp_path)) == ["building/lease.json"]
    assert f"taking over from pid {holder.pid}" in capsys.readouterr().out
    assert storage.listing(str(tmp_path)) == []


def test_a_silent_owner_on_another_host_is_replaced_only_after_the_silence(tmp_path):
    owner = {"token": "t", "host": "elsewhere", "pid": 1, "started": 0, "user": "somebody", "heartbeat": 3}
    storage.publish(json.dumps(owner).encode(), str(tmp_path / "building/lease.json"))
    said: list[str] = []
    with lease.hold(str(tmp_path), said.append, silence_s=0.2):
        pass
    assert "watching the lease of pid 1 on elsewhere" in said[0]
    assert "taking over" in said[1]


def newest(states: Checkpoints) -> list[bytes] | None:
    found = states.newest()
    return list(states.read(found)) if found else None


def test_the_newest_valid_checkpoint_wins(tmp_path):
    warnings: list[str] = []
    states = Checkpoints(str(tmp_path), warnings.append)
    assert newest(states) is None
    for step in (10, 20, 30):
        states.save(step, b"state %d" % step, {})
    assert newest(states) == [b"state 30"]
    assert len(storage.listing(str(tmp_path))) == 4  # two kept, each with its marker
    (tmp_path / "000000030-0of1.safetensors").write_bytes(b"state 3x")
    assert newest(states) == [b"state 20"]
    assert "checkpoint of step 30 skipped" in warnings[0]
    (tmp_path / "000000020-0of1.json").unlink()
    assert newest(states) is None


def test_a_checkpoint_counts_once_all_its_parts_are_there(tmp_path):
    warnings: list[str] = []
    first, second = (Checkpoints(str(tmp_path), warnings.append, part, parts=2) for part in (0, 1))
    for step in (10, 20, 30):
        first.save(step, b"first %d" % step, {})
        if step < 30:
            second.save(step, b"second %d" % step, {})
    assert len(storage.listing(str(tmp_path))) == 10  # two whole ones are kept, and the half one
    assert newest(first) == [b"first 20"]
    assert newest(second) == [b"second 20"]
    assert newest(Checkpoints(str(tmp_path), warnings.append, 0, parts=4)) == [b"first 20", b"second 20"]
    assert "checkpoint of step 30 skipped" in warnings[0]
    second.save(30, b"second 30", {})
    second.save(40, b"second 40", {})
    first.save(40, b"first 40", {})
    assert newest(first) == [b"first 40"]
    assert len(storage.listing(str(tmp_path))) == 8


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_checkpoint_is_never_loaded(tmp_path, damage, suffix):
    """40 truncations, 100 flipped bits of a file and of a marker, or they are gone: always the one before."""
    generator = np.random.default_rng(0)
    warnings: list[str] = []
    states = Checkpoints(str(tmp_path), warnings.append)
    content = generator.bytes(5000)
    for step in (1, 2):
        states.save(step, content + b"%d" % step, {"seed": step})
    file = tmp_path / f"000000002-0of1.{suffix}"
    whole = file.read_bytes()
    for number in range({"truncate": 40, "flip": 100}.get(damage, 1)):
        if damage == "truncate":
            file.write_bytes(whole[: generator.integers(len(whole))])
        elif damage == "flip":
            place = generator.integers(len(whole))
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << generator.integers(8)]) + whole[place + 1 :])
        else:
            file.unlink()
        assert newest(states) == [content + b"1"]
        assert len(warnings) == (0 if (damage, suffix) == ("delete", "json") else number + 1)
        assert states.recipes() == [{"seed": 1}, {"seed": 2}][: 1 if suffix == "json" else 2]
