"""Disks that are full or read-only: real ones of a few MiB, which take root to mount."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from datasets.files import notices, storage
from datasets.files.cache import VerifiedFiles
from datasets.files.errors import StoreRefuses
from datasets.files.notices import PassedOver
from pipeline.__main__ import main
from pipeline.hours.spent import totals
from pipeline.run.step_log import logging_to
from pipeline.store import ledger
from pipeline.store.artifacts import Store
from pipeline.tracking.outbox import Outbox

CHECKOUT = Path(__file__).parents[2]
MICRO = ["conf=stage_c", "scale=micro"]
MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"nothing can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    """Leave no room; the file that takes it."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as stream:
        try:
            while stream.write(bytes(4096)):
                pass
        except OSError:
            pass
    return ballast


def test_what_finds_no_room_is_told_and_leaves_what_was_there(disk):
    place = str(disk / "root/x")
    entry = storage.publish(b"old", place)
    fill(disk)
    for content in (os.urandom(5 * MIB), b"new"):
        with pytest.raises(StoreRefuses, match=f"^{place}: no space is left there; make some"):
            storage.publish(content, place)
    with pytest.raises(StoreRefuses, match="no space is left there"):
        storage.create(b"mine", str(disk / "root/claim"))
    assert storage.read(place, expect=entry) == b"old"
    assert [path.name for path in (disk / "root").iterdir()] == ["x"]


def test_a_full_cache_makes_reading_slower_and_ends_nothing(disk, tmp_path):
    path = f"memory://full-disk/{tmp_path.name}"
    entry = storage.publish(os.urandom(2 * MIB), path)
    fill(disk)
    heard: list[notices.Notice] = []
    (disk / "ballast").write_bytes(bytes(3 * MIB))  # room for the folders
    fill_again = disk / "more"
    fill_again.write_bytes(bytes(MIB // 2))
    with notices.heard_by(heard.append):
        content = VerifiedFiles(str(disk / "cache"), 100 * MIB).read(path, entry)
    assert storage.entry_of(content) == entry
    assert [type(notice) for notice in heard] == [PassedOver]
    assert "no space is left there" in str(heard[0])


def test_records_that_find_no_room_are_sent_all_the_same(disk):
    sent: list[int] = []
    outbox = Outbox(disk / "unsent", "one", lambda records: sent.extend(record["number"] for record in records))
    outbox.add({"number": 0})
    fill(disk)
    for number in range(1, 400):
        outbox.add({"number": number, "text": "x" * 100})
    assert outbox.flush(60)
    assert sent == list(range(400))
    assert outbox.unkept > 0
    assert outbox.close(60) == 0


@pytest.mark.parametrize("room_comes", [True, False])
def test_records_that_are_neither_kept_nor_sent_are_counted_and_the_others_stay_whole(disk, room_comes):
    """Where there is room again at the end, none are lost."""

    def away(records: object) -> None:
        raise ConnectionError("nobody is there")

    outbox = Outbox(disk / "unsent", "one", away)
    outbox.add({"number": 0})
    ballast = fill(disk)
    for number in range(1, 400):
        outbox.add({"number": number, "text": "x" * 100})
    unkept = outbox.unkept
    assert 0 < unkept < 400
    if room_comes:
        ballast.unlink()
        outbox.add({"number": 400})
    assert outbox.close(60) == 400 + room_comes
    lines = [json.loads(line)["number"] for line in outbox.path.read_text().splitlines()]
    assert outbox.unkept == (0 if room_comes else unkept)
    assert lines == (list(range(401)) if room_comes else list(range(400 - unkept)))


def test_a_steps_log_that_finds_no_room_is_told_once(disk, capsys):
    import logging

    told: list[str] = []
    with logging_to(str(disk / "logs/step.log"), told.append):
        fill(disk)
        for _ in range(200):
            logging.getLogger("pipeline").info("x" * 200)
    assert len(told) == 1
    assert "step.log is not complete: no space is left there" in told[0]
    assert "Traceback" not in capsys.readouterr().err


def test_a_ledger_that_finds_no_room_does_not_end_the_work(disk, caplog):
    with ledger.Writer(str(disk), "one").lease("train_c", "0" * 16, 1, "cpu"):
        fill(disk)
        with open(disk / "ledger/one.jsonl", "a") as stream:  # what is left of its last block
            try:
                stream.write("\n" * 8192)
                stream.flush()
            except OSError:
                pass
    assert "missed a lease_close: " in caplog.text
    assert totals(str(disk)).steps["train_c", "0" * 16].estimated


# ------------------------------------------------------------------------------------------------------------ runs


def start(root: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pipeline", "run", *MICRO, f"root={root}", *words]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)


def the_error(err: str) -> str:
    (told,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "Traceback" not in err
    return told


def test_a_root_that_is_read_only_can_be_read(disk, capsys):
    root = disk / "root"
    with ledger.Writer(str(root), "one").lease("train_c", "0" * 16, 1, "cpu"):
        pass
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    before = sorted(root.rglob("*"))
    for words in (["status"], ["plan", *MICRO], ["report", "hours"], ["gc"]):
        assert main([*words, f"root={root}"]) == 0, words
    capsys.readouterr()
    for words in (["run", *MICRO], ["data", "forget", f"keys={'0' * 32}"], ["gc", "--yes"]):
        assert main([*words, f"root={root}"]) == 2, words
        assert "the file system is read-only" in the_error(capsys.readouterr().err)
    assert sorted(root.rglob("*")) == before


def test_a_run_on_a_full_disk_is_refused_before_it_begins(disk):
    ballast = fill(disk)
    done = start(disk / "root")
    assert done.returncode == 2
    assert "no space is left there" in the_error(done.stderr)
    ballast.unlink()
    assert main(["status", f"root={disk}/root"]) == 0


@pytest.mark.ray
@pytest.mark.chaos
def test_a_run_whose_disk_fills_up_ends_in_a_sentence_and_goes_on_when_there_is_room(disk, tmp_path):
    """There is room for the plan, not for the pictures: it is a worker that finds none."""
    root, words = disk / "root", [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "--until", "download"]
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(4 * MIB - 120 * 1024))
    done = start(root, *words)
    assert done.returncode == 2, done.stderr
    assert "no space is left there; make some and start the same command again" in the_error(done.stderr)
    assert [artifact.name for artifact in Store(str(root)).finished()] == ["metadata"]
    ballast.unlink()
    done = start(root, *words)
    assert done.returncode == 0, done.stderr
    assert {artifact.name for artifact in Store(str(root)).finished()} == {"metadata", "images"}
