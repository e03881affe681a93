"""Compressed files: what they hold, here and there; what the store has against them is not taken for damage."""

import gzip
import random

import pytest

from datasets.files import compressed, storage
from datasets.files.compressed import Unpacked, Unreadable


def test_a_compressed_file_is_read_here_and_there(tmp_path):
    content = random.Random(0).randbytes(40 * compressed.PIECE)
    (tmp_path / "x").write_bytes(gzip.compress(content, 1))
    assert compressed.is_compressed(str(tmp_path / "x"))
    with compressed.unpacked(str(tmp_path / "x")) as file:
        assert file.size() == len(content)
        assert file.read_at(50, len(content) - 50) == content[-50:]
        assert file.read_at(50, 7) == content[7:57]


@pytest.mark.parametrize("content", [b"", b"x", b"\x1f", b"plain" * 100])
def test_other_files_are_not_compressed(tmp_path, content):
    (tmp_path / "x.gz").write_bytes(content)
    assert not compressed.is_compressed(str(tmp_path / "x.gz"))


def test_of_a_damaged_file_what_comes_before_the_damage_is_read(tmp_path):
    content = random.Random(0).randbytes(40 * compressed.PIECE)
    packed = bytearray(gzip.compress(content, 1))
    packed[len(packed) // 2 :] = bytes(len(packed) // 2)
    (tmp_path / "x").write_bytes(packed)
    with compressed.unpacked(str(tmp_path / "x")) as file:
        found = file.read()
    assert 0 < len(found) < len(content)
    assert content.startswith(found[: len(found) - compressed.PIECE])


def test_a_store_that_fails_is_told_and_not_taken_for_damage(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(gzip.compress(bytes(100)))

    def away(self, buffer):
        self.failure = OSError("the store is away")
        raise self.failure

    monkeypatch.setattr(compressed._Pulled, "readinto", away)
    with pytest.raises(storage.StorageError, match="the store is away"), compressed.unpacked(str(tmp_path / "x")):
        pass


def test_a_bomb_is_refused_before_it_fills_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "FREE", 1 << 20)
    (tmp_path / "x").write_bytes(gzip.compress(bytes(8 << 20)))
    with pytest.raises(Unreadable, match="more than 1,048,576 bytes"), compressed.unpacked(str(tmp_path / "x")):
        pass


def test_unpacked_files_are_kept_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "KEPT", 1000)
    for number in range(5):
        (tmp_path / f"{number}.gz").write_bytes(gzip.compress(bytes([number]) * 400))
    unpacked = Unpacked()
    for number in (0, 1, 2, 3, 4, 0, 4):
        assert unpacked.read_at(str(tmp_path / f"{number}.gz"), 3, 397) == bytes([number]) * 3
    assert len(unpacked._files) == 2
