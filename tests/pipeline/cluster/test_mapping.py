"""Actors over shards: what is published of one, in which order, and what stops it."""

import pytest

from datasets.files import storage
from datasets.files.fence import unfenced
from datasets.formats import shards
from pipeline.cluster.mapping import Made, ShardActor, chunked
from pipeline.cluster.messages import Advanced, Message
from pipeline.errors import ClaimLost


class Board:
    """What an actor tells its driver, and hears of it."""

    def __init__(self) -> None:
        self.said: list[Message] = []
        self.stop = False

    def post(self, message: Message) -> None:
        self.said.append(message)

    def stopping(self) -> bool:
        return self.stop


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    monkeypatch.setattr("pipeline.cluster.board.BoardClient", lambda board: board)
    return Board()


class Upper:
    """Makes lines of a shard upper case, but for empty ones; calls are counted."""

    def __init__(self, suffix: str):
        self.suffix = suffix

    def __call__(self, number: int, work: list[str]) -> Made:
        kept = [line.upper() + self.suffix for line in work if line]
        lost = len(work) - len(kept)
        dropped = {"empty": lost} if lost else {}
        return Made(len(work), {f"{number}.txt": "\n".join(kept).encode()}, dropped, {"kept": len(kept)}, bucket="1x1")


def test_files_then_the_receipt_then_word_of_it(tmp_path, board):
    there = []

    def fence() -> None:
        there.append(storage.listing(str(tmp_path)))

    actor = ShardActor(Upper, ("!",), 7, "lines", str(tmp_path), fence, board)
    actor((3, ["a", "", "b"]))
    assert there == [["3.txt"]]  # the fence stands before the receipt, when the file is there
    assert storage.read(str(tmp_path / "3.txt")) == b"A!\nB!"
    receipt = shards.receipt(str(tmp_path), 3)
    assert (receipt.rows_in, receipt.rows_out, receipt.dropped) == (3, 2, {"empty": 1})
    assert (receipt.counts, receipt.bucket, [*receipt.files]) == ({"kept": 2}, "1x1", ["3.txt"])
    assert board.said == [Advanced(3, 7, "lines")]


def test_a_run_that_is_to_stop_makes_nothing_more(tmp_path, board):
    actor = ShardActor(Upper, ("!",), 7, "lines", str(tmp_path), unfenced, board)
    board.stop = True
    actor((0, ["a"]))
    assert storage.listing(str(tmp_path)) == board.said == []


def test_without_the_claim_there_is_no_receipt_and_no_word_of_it(tmp_path, board):
    def closed() -> None:
        raise ClaimLost("gone")

    actor = ShardActor(Upper, ("!",), 7, "lines", str(tmp_path), closed, board)
    with pytest.raises(ClaimLost):
        actor((0, ["a"]))
    assert shards.finished(str(tmp_path)) == {}
    assert board.said == []


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 9])
def test_chunks_are_all_rows_in_their_order(count):
    found = chunked(list(range(count)), 4)
    assert [row for n in sorted(found) for row in found[n]] == list(range(count))
    assert [*found] == list(range(-(-count // 4)))
    assert all(0 < len(rows) <= 4 for rows in found.values())
