"""Checkpoints as several ranks find them together: each reads its share, all get the same one."""

import itertools
import json
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.files import storage
from pipeline.cluster.ranks.checkpoints import KEEP, Checkpoints, Found
from pipeline.errors import ClaimLost

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


class Killed(BaseException):
    """The rank ends here."""


class Attempt:
    """One attempt at a training: ranks that have agreed on what they go on from, and save until they are killed."""

    def __init__(self, folder: str, world: int) -> None:
        self.name, self.step, self.world = uuid.uuid4().hex, 0, world
        self.ranks = [Checkpoints(folder, lambda text: None, part, world) for part in range(world)]
        if newest := self.ranks[0].newest():
            self.step = newest.saved.step
            self.check([read() for read in newest.parts])
            self.check([read() for read in self.ranks[0].after(self.step).parts])
        for rank in self.ranks:  # the first one has told them
            rank.attempt = self.ranks[0].attempt

    def check(self, parts: Sequence[bytes]) -> None:
        """All parts of one state, of one attempt."""
        told = [json.loads(part) for part in parts]
        assert [part["part"] for part in told] == list(range(len(told)))
        assert {part["step"] for part in told} == {self.step}
        assert len({part["attempt"] for part in told}) == 1, "of two attempts"

    def save(self, step: int, rank: int, half: bool = False) -> None:
        """A rank's part; where it is killed by half, without a marker."""

        def killed() -> None:
            raise Killed

        content = json.dumps({"attempt": self.name, "step": step, "part": rank}).encode()
        states = self.ranks[rank]
        states.fence = killed if half else lambda: None
        try:
            states.save(step, content, {})
        except Killed:
            assert half

    def save_all(self, step: int) -> None:
        for rank in reversed(range(self.world)):
            self.save(step, rank)


PROGRESS = list(itertools.product((0, 1, 2), repeat=2))  # of two ranks: nothing, the part alone, its marker too


@pytest.mark.parametrize("worlds", [(2, 2), (2, 1), (1, 2)])
def test_parts_of_two_attempts_that_were_killed_at_one_step_are_no_checkpoint(worlds: tuple[int, int]) -> None:
    """Each at each of its moments, and either rank first; the third one saves that step and goes on."""
    for number, (first, second, turned) in enumerate(itertools.product(PROGRESS, PROGRESS, (False, True))):
        folder = f"memory://attempts-{worlds[0]}{worlds[1]}-{number}"
        Attempt(folder, 2).save_all(10)
        whole = 10
        for world, progress in zip(worlds, (first, second), strict=True):
            attempt = Attempt(folder, world)
            assert attempt.step == whole
            if whole == 20:
                continue
            for rank in sorted(range(world), reverse=turned):
                if progress[rank]:
                    attempt.save(20, rank, half=progress[rank] == 1)
            whole = 20 if progress[:world] == (2,) * world else 10
        third = Attempt(folder, 2)
        assert third.step == whole
        third.save_all(20)
        assert Attempt(folder, 2).step == 20
        for step in (30, 40):
            third.save_all(step)
        assert {name[:9] for name in storage.listing(folder)} == {"000000030", "000000040"}
        assert len(storage.listing(folder)) == KEEP * 2 * 2  # nothing is left of those that were killed
        storage.remove(folder)


@given(st.lists(st.tuples(st.integers(1, 3), st.lists(st.integers(0, 7), min_size=3, max_size=3)), max_size=12))
@settings(max_examples=60, deadline=None)
def test_no_attempt_loses_what_one_before_has_saved(attempts: Sequence[tuple[int, Sequence[int]]]) -> None:
    """Attempts of 1 to 3 ranks, each killed after so many halves of saves; ranks are at most a state apart."""
    folder, whole = f"memory://history-{uuid.uuid4().hex}", 0
    for world, halves in attempts:
        attempt = Attempt(folder, world)
        assert attempt.step == whole
        least = min(halves[:world])
        for step, rank in itertools.product(range(4), range(world)):
            done = min(halves[rank], 2 * (least // 2 + 1)) - 2 * step
            if done > 0:
                attempt.save(whole + 1 + step, rank, half=done == 1)
        whole += least // 2
        assert len({name[:9] for name in storage.listing(folder)}) <= KEEP + 2
    storage.remove(folder)


def test_checkpoints_of_before_attempts_had_names_are_gone_on_from_and_go_in_their_turn(tmp_path: Path) -> None:
    save(tmp_path, 10, 2)
    save(tmp_path, 20, 2)
    assert "000000020-1of2.json" in storage.listing(str(tmp_path))
    (tmp_path / "000000030-0of2.safetensors").write_bytes(b"half")
    attempt = Checkpoints(str(tmp_path), print)
    newest = attempt.newest()
    assert newest is not None
    assert newest.saved.step == 20
    for step in (30, 40):
        attempt.save(step, b"%d" % step, {})
    assert len(storage.listing(str(tmp_path))) == 2 * KEEP
    assert all(attempt.attempt in name for name in storage.listing(str(tmp_path)))


def test_a_state_that_is_saved_again_stands_for_the_one_that_could_not_be_read(tmp_path: Path) -> None:
    folder = str(tmp_path)
    save(tmp_path, 10, 1)
    for wrong in ("0", "f"):  # whose names come before and after
        states = Checkpoints(folder, print, milestones=(20, 40))
        states.attempt = wrong
        states.save(20, b"to be damaged", {})
        (tmp_path / f"000000020-0of1-{wrong}.safetensors").write_bytes(b"damaged")
    states = Checkpoints(folder, print, milestones=(20, 40))
    newest = states.newest()
    assert newest is not None
    assert newest.saved.step == 10
    states.save(20, b"anew", {})
    assert [read() for read in states.after(20).parts] == [b"anew"]
    for step in (30, 40, 50):
        states.save(step, b"later", {})
    assert {name[:9] for name in storage.listing(folder)} == {"000000020", "000000040", "000000050"}
    assert all(states.attempt in name for name in storage.listing(folder))
    newest = Checkpoints(folder, print).newest()
    assert newest is not None
    assert newest.saved.step == 50


@pytest.mark.parametrize("wrong", ["0", "f"])  # whose name comes before and after
def test_the_copy_that_could_be_read_outlives_those_that_could_not(tmp_path: Path, wrong: str) -> None:
    folder = str(tmp_path)
    damaged, good = Checkpoints(folder, print, milestones=(20,)), Checkpoints(folder, print, milestones=(20,))
    damaged.attempt, good.attempt = wrong, "8"
    damaged.save(20, b"to be damaged", {})
    good.save(20, b"good", {})
    (tmp_path / f"000000020-0of1-{wrong}.safetensors").write_bytes(b"damaged")
    states = Checkpoints(folder, print, milestones=(20,))
    newest = states.newest()
    assert newest is not None
    assert newest.saved.attempt == "8"
    for step in (30, 40, 50):
        states.save(step, b"later", {})
    assert [read() for read in states.after(20).parts] == [b"good"]


def newest(states: Checkpoints) -> list[bytes] | None:
    found = states.newest()
    return [read() for read in found.parts] if found else None


def test_the_newest_valid_checkpoint_wins(tmp_path):
    warnings: list[str] = []
    states = Checkpoints(str(tmp_path), warnings.append)
    assert newest(states) is None
    for step in (10, 20, 30):
        states.save(step, b"state %d" % step, {})
    assert newest(states) == [b"state 30"]
    assert len(storage.listing(str(tmp_path))) == 4  # two kept, each with its marker
    next(tmp_path.glob("000000030-*.safetensors")).write_bytes(b"state 3x")
    assert newest(states) == [b"state 20"]
    assert "checkpoint of step 30 skipped" in warnings[0]
    next(tmp_path.glob("000000020-*.json")).unlink()
    assert newest(states) is None


def test_a_checkpoint_counts_once_all_its_parts_are_there(tmp_path):
    warnings: list[str] = []
    first, second = (Checkpoints(str(tmp_path), warnings.append, part, parts=2) for part in (0, 1))
    for step in (10, 20, 30):
        first.save(step, b"first %d" % step, {})
        if step < 30:
            second.save(step, b"second %d" % step, {})
    assert len(storage.listing(str(tmp_path))) == 10  # two whole ones are kept, and the half one
    for parts in (1, 2, 4):
        assert newest(Checkpoints(str(tmp_path), warnings.append, 0, parts)) == [b"first 20", b"second 20"]
    assert "checkpoint of step 30 skipped" in warnings[0]
    second.save(30, b"second 30", {})
    second.save(40, b"second 40", {})
    first.save(40, b"first 40", {})
    assert newest(Checkpoints(str(tmp_path), warnings.append)) == [b"first 40", b"second 40"]
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
        assert list(states.recipes()) == [{"seed": 2}, {"seed": 1}][1 if suffix == "json" else 0 :]


def test_a_checkpoint_of_a_holder_that_lost_does_not_count(tmp_path):
    def closed() -> None:
        raise ClaimLost("gone")

    Checkpoints(str(tmp_path), print).save(1, b"state", {})
    lost = Checkpoints(str(tmp_path), print, fence=closed)
    with pytest.raises(ClaimLost):
        lost.save(2, b"state 2", {})
    assert newest(lost) == [b"state"]
