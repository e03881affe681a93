"""Files in local folders: shared as far as the folder is, created once also where there are no hard links."""

import errno
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from datasets.files import local, storage
from datasets.files.local import NO_LINKS


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def put(root: Path) -> list[Path]:
    """A file by each of the ways, and the folders made for them."""
    storage.publish(b"x", str(root / "a/b/published"))
    assert storage.create(b"x", str(root / "c/created"))
    storage.publish(b"x", str(root / "e/source"))
    storage.move(str(root / "e/source"), str(root / "f/moved"))
    return sorted(root.rglob("*"))


def test_a_root_of_a_group_stays_one(tmp_path, umask):
    root = tmp_path / "root"
    root.mkdir()
    root.chmod(0o2775)
    made = put(root)
    assert {path.name for path in made} == set("abcef") | {"published", "created", "moved"}
    for path in made:
        wanted = 0o2070 if path.is_dir() else 0o060
        assert mode(path) & wanted == wanted, path
        assert mode(path) & 0o007 == (0o007 if path.is_dir() else 0o006) & ~umask & 0o007  # others: as the umask says


def test_a_root_of_ones_own_stays_one(tmp_path, umask):
    root = tmp_path / "root"
    root.mkdir()
    root.chmod(0o755)
    made = put(root)
    assert {mode(path) for path in made if path.is_file()} == {0o666 & ~umask}
    assert {mode(path) for path in made if path.is_dir()} == {0o777 & ~umask}


def test_a_folder_that_is_everybodys_is_nobodys_group(tmp_path, umask):
    tmp_path.chmod(0o1777)
    storage.publish(b"x", str(tmp_path / "root/x"))
    assert mode(tmp_path / "root/x") == 0o666 & ~umask
    local.share_as(tmp_path / "root/below/that/is/not/there/yet")
    assert os.umask(umask) == umask


def test_what_other_programs_make_in_a_groups_root_is_the_groups_too(tmp_path, umask):
    tmp_path.chmod(0o2770)
    local.share_as(tmp_path / "not/there/yet")
    assert os.umask(umask) == umask & ~0o070


@pytest.mark.parametrize("number", sorted(NO_LINKS))
def test_without_hard_links_one_of_many_creates(tmp_path, monkeypatch, number):
    def no_link(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", no_link)
    place = str(tmp_path / "claim")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda who: storage.create(b"%d" % who, place), range(8)))
    assert made.count(True) == 1
    assert storage.read(place) == b"%d" % made.index(True)
    assert storage.listing(str(tmp_path)) == ["claim"]
    assert not list(tmp_path.glob(".*"))


def test_with_hard_links_one_of_many_creates(tmp_path):
    place = str(tmp_path / "claim")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda who: storage.create(b"%d" % who, place), range(8)))
    assert made.count(True) == 1
    assert storage.read(place) == b"%d" % made.index(True)


def test_a_link_whose_answer_was_lost_is_ours(tmp_path, monkeypatch):
    link = os.link

    def forgetful(source: str, target: str) -> None:  # as a client of NFS asks again, and finds its own first try
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", forgetful)
    assert storage.create(b"mine", str(tmp_path / "claim"))
    monkeypatch.undo()
    assert not storage.create(b"theirs", str(tmp_path / "claim"))


def test_a_name_that_was_taken_and_given_back_meanwhile_was_not_ours(tmp_path, monkeypatch):
    def taken(*_: str) -> None:
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", taken)
    assert not storage.create(b"mine", str(tmp_path / "claim"))
    assert not list(tmp_path.iterdir())


def test_other_failures_to_link_are_told(tmp_path, monkeypatch):
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", no_room)
    with pytest.raises(OSError, match="no space is left there"):
        storage.create(b"x", str(tmp_path / "claim"))
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_rights_of_its_own_takes_files(tmp_path, monkeypatch):
    def not_here(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    tmp_path.chmod(0o2770)
    monkeypatch.setattr(os, "fchmod", not_here)
    monkeypatch.setattr(os, "chmod", not_here)
    storage.publish(b"x", str(tmp_path / "a/x"))
    assert storage.read(str(tmp_path / "a/x")) == b"x"


def test_a_listing_follows_links_but_in_no_circle(tmp_path):
    """What is linked twice is there twice; what leads up would never end."""
    (tmp_path / "here/deep").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "here/deep/a").write_bytes(b"abc")
    (tmp_path / "other/b").write_bytes(b"b")
    for name, target in (
        ("up", ".."),
        ("deep/self", "."),
        ("once", "../other"),
        ("twice", "../other"),
        ("gone", "no"),
        ("me", "me"),
        ("bad", "deep/a/no"),
    ):
        (tmp_path / "here" / name).symlink_to(target, target_is_directory=True)
    (tmp_path / "other/back").symlink_to(tmp_path / "here")
    os.mkfifo(tmp_path / "here/fifo")
    found = {name: known.size for name, known in local.files(tmp_path / "here").items() if not name.startswith("up/")}
    assert found == {"deep/a": 3, "once/b": 1, "twice/b": 1}
    assert storage.sizes(str(tmp_path / "nothing")) == {}
    (tmp_path / "here/once").unlink()
    (tmp_path / "here/twice").unlink()
    (tmp_path / "here/up").unlink()
    assert storage.sizes(str(tmp_path / "here")) == {"deep/a": 3}
