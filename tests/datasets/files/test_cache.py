"""Files read again and again: hashed once, kept within a budget, fetched once by all processes of a node."""

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from datasets.files import notices, storage
from datasets.files.cache import VerifiedFiles
from datasets.files.errors import StorageError
from datasets.files.storage import CorruptFile, FileEntry

REMOTE = "memory://cache-test"


def put(name: str, content: bytes) -> tuple[str, FileEntry]:
    path = storage.join(REMOTE, name)
    return path, storage.publish(content, path)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read from where they come from; each takes a while."""
    paths: list[str] = []
    read = storage.read

    def slow(path: str, expect: FileEntry | None = None) -> bytes:
        paths.append(path)
        time.sleep(0.02)
        return read(path, expect)

    monkeypatch.setattr(storage, "read", slow)
    return paths


def test_a_local_file_is_hashed_when_it_is_new_or_changed(tmp_path):
    path = tmp_path / "x"
    entry = storage.publish(b"content", str(path))
    files = VerifiedFiles()
    assert files.read(str(path), entry).tobytes() == b"content"
    stamp = path.stat().st_mtime_ns
    path.write_bytes(b"c0ntent")
    os.utime(path, ns=(stamp, stamp))
    assert files.read(str(path), entry).tobytes() == b"c0ntent"  # not hashed: nothing seems to have changed
    os.utime(path, ns=(stamp, stamp + 1))
    with pytest.raises(CorruptFile, match="x does not hold the 7 bytes"):
        files.read(str(path), entry)


@pytest.mark.parametrize("content", [b"", b"conten", b"content!", b"c0ntent"])
@pytest.mark.parametrize("kept", [True, False])
def test_other_bytes_are_refused_and_not_kept(tmp_path, content, kept):
    path = tmp_path / "x"
    entry = storage.publish(b"content", str(path))
    path.write_bytes(content)
    files = VerifiedFiles(str(tmp_path / "cache") if kept else None, 100)
    for _ in range(2):
        with pytest.raises(CorruptFile):
            files.read(str(path), entry)


def test_what_is_kept_is_fetched_once_a_node(tmp_path, fetched):
    path, entry = put("x", b"content")
    with ThreadPoolExecutor(8) as pool:  # each with its own reader, as processes have
        read = [pool.submit(lambda: VerifiedFiles(str(tmp_path), 100).read(path, entry)) for _ in range(8)]
    assert {future.result().tobytes() for future in read} == {b"content"}
    assert fetched == [path]
    storage.remove(path)
    assert VerifiedFiles(str(tmp_path), 100).read(path, entry).tobytes() == b"content"


def test_a_kept_file_that_was_cut_is_fetched_again(tmp_path, fetched):
    path, entry = put("x", b"content")
    files = VerifiedFiles(str(tmp_path), 100)
    files.read(path, entry)
    (kept,) = (file for file in tmp_path.rglob("??/*") if file.is_file())
    kept.write_bytes(b"cont")
    left = kept.with_name(f".{kept.name}.0.tmp")  # by a process that was killed
    left.touch()
    assert files.read(path, entry).tobytes() == b"content"
    assert fetched == [path, path]
    assert not left.exists()


def test_what_was_read_longest_ago_goes_first(tmp_path, fetched):
    files = VerifiedFiles(str(tmp_path), 2000)
    entries = dict(put(name, name.encode() * 900) for name in "abc")
    a, b, c = entries
    for path in (a, b, a, c, a, b):  # c makes room by b, b by c
        files.read(path, entries[path])
        time.sleep(0.01)  # the file system's clock has steps
        assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 2000
    assert fetched == [a, b, c, b]


def test_all_files_are_looked_at_seldom(tmp_path, fetched, monkeypatch):
    """By two readers that share a folder with room for a hundred: once for each tenth of it."""
    looks = []
    monkeypatch.setattr(Path, "glob", lambda *words, glob=Path.glob: looks.append(words) or glob(*words))
    both = [VerifiedFiles(str(tmp_path), 10_000) for _ in range(2)]
    for number in range(300):
        path, entry = put(f"n{number}", number.to_bytes(2, "big") * 50)
        both[number % 2].read(path, entry)
    assert 10 < len(looks) < 25
    there = sum(file.stat().st_size for file in tmp_path.rglob("??/*") if file.is_file())
    assert 9_000 <= there <= 10_000
    assert int((tmp_path / "bytes").read_text()) == there
    (tmp_path / "bytes").write_text("")  # by a process that was killed in it
    both[0].read(path, entry)
    path, entry = put("next", bytes(100))
    both[1].read(path, entry)
    assert 9_000 <= int((tmp_path / "bytes").read_text()) <= 10_000


def test_a_file_beyond_the_budget_is_read_and_not_kept(tmp_path, fetched):
    path, entry = put("x", bytes(500))
    files = VerifiedFiles(str(tmp_path), 499)
    assert [files.read(path, entry).nbytes for _ in range(2)] == [500, 500]
    assert fetched == [path, path]
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_files_that_vanish_while_room_is_made_do_no_harm(tmp_path):
    entries = dict(put(f"n{number}", number.to_bytes(2, "big") * 50) for number in range(40))
    over = threading.Event()

    def churn() -> None:
        while not over.is_set():
            for file in Path(tmp_path).glob("??/[0-9a-f]*"):
                file.unlink(missing_ok=True)

    with ThreadPoolExecutor(1) as pool:
        churning = pool.submit(churn)
        files = VerifiedFiles(str(tmp_path), 1000)
        try:
            for path, entry in entries.items():
                assert files.read(path, entry).nbytes == 100
        finally:
            over.set()
        churning.result()


@pytest.mark.parametrize("broken", ["a file in its place", "no rights"])
def test_a_folder_that_cannot_be_used_makes_reading_slower_and_ends_nothing(tmp_path, monkeypatch, broken, fetched):
    if broken == "no rights":

        def refuses(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", refuses)
    else:
        (tmp_path / "cache").write_text("")
    path, entry = put("unkept", b"content")
    told: list[notices.Notice] = []
    with notices.heard_by(told.append):
        for _ in range(2):
            assert VerifiedFiles(str(tmp_path / "cache"), 100).read(path, entry).tobytes() == b"content"
    assert len(fetched) == 2
    assert ["not kept: " in str(notice) for notice in told] == [True, True]
    with pytest.raises(StorageError, match="there is no such file"):
        VerifiedFiles(str(tmp_path / "cache"), 100).read(f"{path}-none", entry)


def test_a_folder_of_another_user_is_not_trusted(tmp_path, fetched, monkeypatch):
    """In /tmp anybody may have made it: what lies there is not hashed again."""
    path, entry = put("x", b"content")
    (folder := tmp_path / "cache").mkdir()
    if os.geteuid() == 0:
        os.chown(folder, 1, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    heard: list[notices.Notice] = []
    with notices.heard_by(heard.append):
        assert VerifiedFiles(str(folder), 1000).read(path, entry).tobytes() == b"content"
    assert fetched == [path]
    assert [notice.reason for notice in heard] == ["not kept: the folder is another user's"]
    assert not any(folder.iterdir())


def test_a_folder_is_made_for_its_user_alone(tmp_path, fetched):
    path, entry = put("x", b"content")
    VerifiedFiles(str(tmp_path / "deep" / "cache"), 1000).read(path, entry)
    assert (tmp_path / "deep" / "cache").stat().st_mode & 0o777 == 0o700
