"""Storage, in steps: what is on the disk when a call returns, what moves, what goes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datasets.files import storage


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://durable-{tmp_path.name}"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Syncs, links and renames, with the names of files and folders, as they come; no sync is of a file still empty."""
    seen: list[str] = []

    def told(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            first = Path(f"/proc/self/fd/{arguments[0]}").resolve() if name == "fsync" else Path(arguments[0])
            assert name != "fsync" or first.stat().st_size > 0 or first.is_dir()
            seen.append(f"{name} {first.name.rpartition('.')[2] if first.name.startswith('.') else first.name}")
            return function(*arguments)

        return call

    for name in ("fsync", "replace", "link", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, told(name, getattr(os, name)))
    return seen


def test_a_published_file_is_on_the_disk_before_its_name_and_its_name_before_the_return(tmp_path, steps):
    storage.publish(b"content", f"{tmp_path}/folder/file")
    assert steps == [f"fsync {tmp_path.name}", "fsync tmp", "replace tmp", "unlink tmp", "fsync folder"]


def test_so_is_one_that_is_created(tmp_path, steps):
    assert storage.create(b"content", f"{tmp_path}/file")
    assert steps == ["fsync tmp", "link tmp", "unlink tmp", f"fsync {tmp_path.name}"]
    steps.clear()
    assert not storage.create(b"content", f"{tmp_path}/file")
    assert steps == ["fsync tmp", "link tmp", "unlink tmp"]


def test_a_moved_file_has_its_name_on_the_disk(tmp_path, steps):
    storage.publish(b"content", f"{tmp_path}/from/file")
    steps.clear()
    storage.move(f"{tmp_path}/from/file", f"{tmp_path}/to/other")
    assert steps[:2] == [f"fsync {tmp_path.name}", "replace file"]
    assert sorted(steps[2:]) == ["fsync from", "fsync to"]


def test_what_is_removed_is_gone_from_the_disk(tmp_path, steps):
    storage.publish(b"content", f"{tmp_path}/folder/inside/file")
    steps.clear()
    storage.remove(f"{tmp_path}/folder/inside")
    assert steps == ["unlink file", "rmdir inside", "fsync folder"]
    storage.remove(f"{tmp_path}/folder/inside/file")  # neither it nor its folder is there


def test_a_move_puts_one_file_in_place_of_another(folder):
    for name in ("old", "new"):
        storage.publish(name.encode(), f"{folder}/{name}")
    storage.move(f"{folder}/new", f"{folder}/old")
    assert storage.read(f"{folder}/old") == b"new"
    assert storage.listing(folder) == ["old"]


def test_what_is_not_there_is_not_moved(folder):
    storage.publish(b"old", f"{folder}/old")
    with pytest.raises(FileNotFoundError):
        storage.move(f"{folder}/new", f"{folder}/old")
    assert storage.read(f"{folder}/old") == b"old"


def test_a_move_whose_source_somebody_deletes_after_the_copy_is_one(folder, monkeypatch):
    storage.publish(b"new", f"{folder}/new")
    filesystem, inner = storage.open_filesystem(f"{folder}/new")

    class Slow:
        """The store, at which somebody else is at work too."""

        def __getattr__(self, name: str) -> Any:
            return getattr(filesystem, name)

        def delete_file(self, path: str) -> None:
            filesystem.delete_file(path)
            filesystem.delete_file(path)

    monkeypatch.setattr(
        storage, "open_filesystem", lambda path, tries=1: (Slow(), f"{inner.rpartition('/')[0]}/{path[-3:]}")
    )
    storage.move(f"{folder}/new", f"{folder}/old")
    monkeypatch.undo()
    assert storage.listing(folder) == ["old"]


def test_a_copy_that_fails_for_another_reason_says_so(tmp_path, monkeypatch):
    folder = f"memory://durable-{tmp_path.name}"
    storage.publish(b"new", f"{folder}/new")

    class Full:
        """A store that takes nothing."""

        def copy_file(self, *_: str) -> None:
            raise OSError("no room")

    found = storage.open_filesystem
    full = iter([Full(), Full()])
    monkeypatch.setattr(
        storage, "open_filesystem", lambda path, tries=1: (next(full, None) or found(path)[0], found(path)[1])
    )
    with pytest.raises(OSError, match="no room"):
        storage.move(f"{folder}/new", f"{folder}/old")


def test_sizes_are_those_of_all_files_below(folder):
    storage.publish(b"content", f"{folder}/a/b/c")
    storage.publish(b"", f"{folder}/d")
    assert storage.sizes(folder) == {"a/b/c": 7, "d": 0}
    assert storage.sizes(f"{folder}/a") == {"b/c": 7}
    assert storage.sizes(f"{folder}/none") == {}


def test_a_folder_goes_with_all_that_is_in_it_and_with_nothing_that_links_lead_to(tmp_path):
    (tmp_path / "kept").mkdir()
    storage.publish(b"content", f"{tmp_path}/kept/file")
    storage.publish(b"content", f"{tmp_path}/gone/deep/down/file")
    storage.publish(b"content", f"{tmp_path}/gone/.half.tmp")
    (tmp_path / "gone/deep/link").symlink_to(tmp_path / "kept")
    (tmp_path / "gone/dangling").symlink_to(tmp_path / "nowhere")
    storage.remove(f"{tmp_path}/gone")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept/file").exists()


def test_two_may_delete_the_same_at_once(tmp_path, monkeypatch):
    for name in ("a", "b"):
        storage.publish(b"content", f"{tmp_path}/gone/{name}")
    unlink = Path.unlink

    def first(path: Path, missing_ok: bool = False) -> None:
        monkeypatch.undo()
        storage.remove(f"{tmp_path}/gone")  # the other one is faster
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", first)
    storage.remove(f"{tmp_path}/gone")
    assert not (tmp_path / "gone").exists()
