"""What is put into a folder for others is whole, or is not taken for it, wherever the command is killed."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from datasets.files import notices, storage
from datasets.files.errors import StorageError
from pipeline.errors import UsageError
from pipeline.run.delivery import LOCK, _beside, _held, deliver
from pipeline.settings import compose
from pipeline.store.artifacts import Artifact
from pipeline.verbs import export
from tests.killing import swept

FILES = {"a/one": b"1", "two": b"22", "index": b"333"}
KILLED = """
from pipeline.run.delivery import deliver
FILES = {"a/one": b"1", "two": b"22", "index": b"333"}

def work(root):
    deliver([(name, lambda name=name: FILES[name]) for name in FILES], str(root / "out"))

def again(root):
    if not (root / "out" / "index").exists():
        work(root)

def tree(root):
    files = (file for file in root.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {str(file.relative_to(root)): file.read_bytes() for file in files if ".delivery" not in str(file.parent)}

def interrupted(root, before, calm):
    there = PREPARED and set(before) != set(calm) and "out/index" not in before
    return [] if before in ({}, calm) or there else [f"the folder holds {sorted(before)}"]

def prepare(root):
    root.mkdir()
    if PREPARED:
        (root / "out").mkdir()

print(json.dumps(sweep(work, tree, interrupted, prepare, recover=again)))
"""


def contents(files=FILES):
    return [(name, lambda name=name: files[name]) for name in files]


@pytest.mark.parametrize(("there", "every"), [(False, 1), (True, 3)])
def test_a_killed_call_leaves_all_or_no_last_file_and_the_next_one_ends_it(tmp_path, there, every):
    assert swept(tmp_path, f"PREPARED = {there}\n{KILLED}", every) >= 12 // every


def test_a_new_folder_appears_at_once_and_takes_along_what_killed_calls_have_left(tmp_path):
    left, *others = (f".{name}.delivery" for name in ("out.0123456789ab", "out2.0123456789ab", "out.old", "out.0"))
    for folder in (left, *others, ".out.0123456789ab.tmp"):
        (tmp_path / folder / "a").mkdir(parents=True)
        (tmp_path / f"{folder}{LOCK}").touch()
    (tmp_path / ".out.ba9876543210.delivery").symlink_to(tmp_path / others[0])
    (tmp_path / f".out.ba9876543210.delivery{LOCK}").touch()
    (tmp_path / f".out.00123456789a.delivery{LOCK}").touch()  # of a call that was killed before it had a folder

    def looking():
        assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
        return b"1"

    deliver([("a/one", looking), ("two", looking)], str(tmp_path / "out"))
    stay = {*others, ".out.0123456789ab.tmp", ".out.ba9876543210.delivery"}
    assert {path.name for path in tmp_path.iterdir()} == {*stay, *(f"{name}{LOCK}" for name in stay), "out"}
    assert storage.listing(str(tmp_path / "out")) == ["a/one", "two"]


@pytest.mark.parametrize("lock", ["none", "not ours"])
def test_what_nobody_can_know_of_stays_and_is_told(tmp_path, lock):
    """By an earlier version, which locked otherwise, or by somebody whose lock cannot be opened."""
    left, told = tmp_path / ".out.0123456789ab.delivery", list[notices.Notice]()
    left.mkdir()
    if lock == "not ours":
        Path(f"{left}{LOCK}").symlink_to(tmp_path / "nothing")  # which root cannot open either
    with notices.heard_by(told.append):
        deliver(contents(), str(tmp_path / "out"))
    assert left.exists()
    assert [str(one) for one in told if "has left it or is at work on it" in str(one)] == [str(one) for one in told]
    assert len(told) == 1


def test_of_two_at_once_one_ends_in_a_sentence_and_neither_harms_the_other(tmp_path):
    out = tmp_path / "out"

    def meanwhile():
        deliver(contents(), str(out))
        return b"other"

    with pytest.raises(StorageError, match=f"{out}: somebody else"):
        deliver([("index", meanwhile)], str(out))
    assert {name: (out / name).read_bytes() for name in storage.listing(str(out))} == FILES
    assert list(tmp_path.iterdir()) == [out]


def test_what_somebody_is_at_work_on_stays(tmp_path):
    with _beside(tmp_path / "out") as staged, _beside(tmp_path / "out") as other:
        assert staged != other
        with _held(Path(f"{staged}{LOCK}")) as held:
            assert not held
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_call_has_left_goes_on_nfs_too(tmp_path, monkeypatch):
    """Which locks for itself no folder, and no file that is open for reading alone (flock(2))."""

    def flock(descriptor, operation, flock=fcntl.flock):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    dies = f"""
import os
from pipeline.run.delivery import deliver

def dies():
    os._exit(9)

deliver([("one", lambda: b"1"), ("two", dies)], {str(tmp_path / "out")!r})
"""
    assert subprocess.run([sys.executable, "-c", dies]).returncode == 9
    assert storage.listing(str(tmp_path)) != []
    deliver(contents(), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path):
    def fails():
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        deliver([("one", lambda: b"1"), ("two", fails)], str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["new", "there", "store"])
def test_a_release_comes_whole_and_its_index_last(tmp_path, place, request, monkeypatch):
    out = f"{request.getfixturevalue('s3_root')}/out" if place == "store" else str(tmp_path / "out")
    names = ["README.md", "model_index.json", "prior/model_index.json", "vqgan/config.json"]
    inside = str(tmp_path / "artifact")
    files = {name: vars(storage.publish(name.encode(), f"{inside}/{name}")) for name in names}
    made = Artifact("release", inside, {"files": files, "fingerprint": "0" * 16})
    config = compose.load("stage_c", ["scale=micro"])
    monkeypatch.setattr(export, "wanted", lambda *_: {"release": made})
    monkeypatch.setattr(export.Store, "find", lambda *_: made)
    if place == "there":
        (tmp_path / "out").mkdir()
    put = []
    monkeypatch.setattr(
        storage, "publish", lambda *words, publish=storage.publish: put.append(words) or publish(*words)
    )

    if place != "new":
        storage.publish(b"mine", f"{out}/README.md")
        with pytest.raises(UsageError, match="not empty"):
            export.export(config, str(tmp_path), out)
        storage.publish(b"README.md", f"{out}/README.md")  # as ours, by a call that was killed
    export.export(config, str(tmp_path), out)
    assert storage.listing(out) == names
    assert all(storage.read(f"{out}/{name}") == name.encode() for name in names)
    assert put[-1][1].endswith("/model_index.json")
    assert put[-2][1].endswith("/prior/model_index.json")
    before = len(put)
    export.export(config, str(tmp_path), out)  # as after a kill at its very end
    assert len(put) == before
    storage.publish(b"of another release", f"{out}/vqgan/config.json")
    with pytest.raises(UsageError, match="not empty"):
        export.export(config, str(tmp_path), out)
    storage.publish(b"vqgan/config.json", f"{out}/vqgan/config.json")
    storage.remove(f"{out}/model_index.json")
    storage.publish(b"mine", f"{out}/notes.txt")
    with pytest.raises(UsageError, match="not empty"):
        export.export(config, str(tmp_path), out)
