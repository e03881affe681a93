"""Checkpoints as several ranks find them together: each reads its share, all get the same one."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from datasets.files import storage
from pipeline.cluster.checkpoints import Checkpoints, Found

SIZE = 1000


class Ranks:
    """Ranks that are threads, and tell each other things."""

    def __init__(self, world: int) -> None:
        self.world, self.said = world, [None] * world
        self.barrier = threading.Barrier(world, timeout=60)

    def together(self, work: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(lambda rank: work(rank, lambda own: self._told(rank, own)), range(self.world)))

    def _told(self, rank: int, own: Any) -> list[Any]:
        self.said[rank] = own
        self.barrier.wait()
        every = [*self.said]
        self.barrier.wait()
        return every


def save(folder: Path, step: int, parts: int) -> None:
    for part in range(parts):
        content = b"%d/%d" % (step, part)
        Checkpoints(str(folder), print, part, parts).save(step, content.ljust(SIZE), {})


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_each_part_is_read_by_one_rank(tmp_path: Path, parts: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10, parts)
    read, counted = storage.read, []

    def noted(path: str, expect: storage.FileEntry | None = None) -> bytes:
        counted.extend([path] if path.endswith(".safetensors") else [])
        return read(path, expect)

    monkeypatch.setattr(storage, "read", noted)

    def work(rank: int, told: Callable[[Any], list[Any]]) -> list[bytes]:
        found = Checkpoints(str(tmp_path), print, rank, world).newest(rank, world, told)
        assert found is not None
        return [part() for part in found.parts[rank::world]]

    shares = Ranks(world).together(work)
    assert {content.strip() for share in shares for content in share} == {b"10/%d" % part for part in range(parts)}
    assert len(counted) == len(set(counted)) == parts  # also with the look at whether they are whole


def test_what_one_rank_finds_damaged_none_goes_on_from(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step, 4)
    (tmp_path / "000000020-3of4.safetensors").write_bytes(b"x" * SIZE)
    warnings: list[str] = []

    def work(rank: int, told: Callable[[Any], list[Any]]) -> Found | None:
        return Checkpoints(str(tmp_path), warnings.append, rank, 2).newest(rank, 2, told)

    assert [found.saved.step for found in Ranks(2).together(work)] == [10, 10]
    (warning,) = warnings
    assert "checkpoint of step 20 skipped" in warning
