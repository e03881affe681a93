"""Logs that can be read while they are written, on a disk and in pieces."""

import errno
import logging
import time
from pathlib import Path

import pytest

from datasets.files import storage
from pipeline.store import log_files
from pipeline.store.log_files import LogFile, Tail, attached

NAME = "logs.of.a.test"


@pytest.fixture(params=["disk", "store"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder; as a store, files of which are only ever put there whole."""
    if request.param == "store":
        monkeypatch.setattr(log_files, "can_grow", lambda path: False)
        monkeypatch.setattr(log_files, "PIECES_S", (0.01, 0.01))
        return f"file://{tmp_path}"
    return str(tmp_path)


def test_what_is_said_is_read_in_its_order_and_once(root, monkeypatch):
    fetched, read_all = list[str](), storage.read_all
    monkeypatch.setattr(storage, "read_all", lambda paths: fetched.extend(paths) or read_all(paths))
    path = log_files.of_step(root, "1", "stage_c")
    log, told = logging.getLogger(NAME), list[str]()
    handler = LogFile(path, told.append)
    close = attached(handler, NAME)
    for number in range(300):
        log.info("line %d of 300: Würstchen", number)
    deadline, tail, text = time.monotonic() + 60, Tail(path), ""
    while "line 299" not in text and time.monotonic() < deadline:  # while it is still open
        text += tail.read()
        time.sleep(0.01)
    log.warning("the last one")
    assert [line.split(" ", 3)[3] for line in handler.last][-2:] == ["line 299 of 300: Würstchen", "the last one"]
    assert len(handler.last) == log_files.LAST
    close()
    log.warning("after it")
    assert [line.split(" ", 3)[3] for line in text.splitlines()] == [f"line {n} of 300: Würstchen" for n in range(300)]
    assert tail.read().endswith("WARNING the last one\n")
    assert tail.read() == ""
    assert len(fetched) == len(set(fetched))
    assert told == []
    assert logging.getLogger(NAME).handlers == []


def test_the_logs_of_ranks_are_found_beside_their_steps(root):
    path = log_files.of_step(root, "1", "stage_c")
    assert log_files.ranks(path) == {}
    wanted = {}
    for attempt, rank in ((1, 0), (1, 1), (2, 0)):
        wanted[attempt, rank] = log_files.of_rank(path, attempt, rank)
        close = attached(LogFile(wanted[attempt, rank], print), NAME)
        logging.getLogger(NAME).info("attempt %d", attempt)
        close()
    storage.publish(b"", storage.join(f"{path.removesuffix('.log')}.ranks", ".DS_Store"))
    storage.publish(b"", storage.join(f"{path.removesuffix('.log')}.ranks", "²-0.log"))
    assert log_files.ranks(path) == wanted
    assert Tail(wanted[2, 0]).read().endswith("INFO attempt 2\n")


def test_what_cannot_be_kept_is_told_once_and_ends_nothing(root, monkeypatch):
    told: list[str] = []
    handler = LogFile(log_files.of_step(root, "1", "stage_c"), told.append)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if hasattr(handler, "_file"):
        monkeypatch.setattr(handler, "_file", type("Full", (), {"write": full, "close": full})())
    monkeypatch.setattr(storage, "publish", full)
    close = attached(handler, NAME)
    for _ in range(3):
        logging.getLogger(NAME).info("a line")
    close()
    assert len(told) == 1
    assert [line[-6:] for line in handler.last] == ["a line"] * 3
    assert "is not complete: " in told[0]
    assert "no space is left there" in told[0]


def test_a_piece_whose_arrival_nobody_heard_of_is_read_once_and_what_follows_it_too(tmp_path, monkeypatch):
    monkeypatch.setattr(log_files, "can_grow", lambda path: False)
    path, put = log_files.of_step(f"file://{tmp_path}", "1", "stage_c"), storage.publish
    answers = [TimeoutError("no answer")]

    def unheard(content: bytes, path: str) -> None:
        put(content, path)
        if answers:
            raise answers.pop()

    monkeypatch.setattr(storage, "publish", unheard)
    log, tail = logging.getLogger(NAME), Tail(path)
    close = attached(handler := LogFile(path, print), NAME)
    log.info("the first")
    handler.flush()
    text = tail.read()
    log.info("the second")
    close()
    text += tail.read()
    assert [line.split(" ", 3)[3] for line in text.splitlines()] == ["the first", "the second"]
