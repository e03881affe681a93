"""Tables of what is measured beside scores: distances of sets of pictures, seconds a picture; for page and terminal.

Rows are made of the lines that `scores` has in its files, as JSON; the paper's own figures stand below them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pipeline.models import distances, drawing_speed
from pipeline.results.scores import OTHER_SEED
from pipeline.settings.evaluation import NULL

TABLE_2 = Path(__file__).with_name("table_2.yaml")
FID = "fid"  # what it is called where the network is Inception
COCO, PAPER = "coco", "paper"  # the prompt set of which the paper reports FID and IS; rows of its own
STAGES = {"stage_c": "Stage C", "stage_b": "Stage B", "stage_a": "Stage A"}
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number that it stands for, if it is one."""

    shown: str
    value: float | None = None


@dataclass(frozen=True)
class Row:
    """A line of a table; `kind` is `null` of the same model with another seed, `paper` of the paper's, else empty."""

    cells: tuple[Cell, ...]
    kind: str = ""


@dataclass(frozen=True)
class Measures:
    """A table: so many columns, of which the last `texts` are words, as the first `about` are."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    about: int
    texts: int = 0

    def is_number(self, column: int) -> bool:
        """Whether a column has numbers."""
        return self.about <= column < len(self.columns) - self.texts


def distance_table(lines: Sequence[Line]) -> Measures:
    """A row a set of pictures: how far it lies from the real ones. FID of too few pictures is not told."""
    called = lines[0]["called"]
    names = called["fid"].upper(), f"{called['kid'].upper()} x 1000", called["is"].upper()
    rows = [_distance(line) for line in lines]
    if called["fid"] == FID and any(line["set"] == COCO for line in lines):  # of another network it is no FID
        rows += [_theirs(row) for row in _table_2()]
    return Measures(("pictures", "for", "changed by", "n", "real", *names), tuple(rows), about=3)


def _distance(line: Line) -> Row:
    null, altered = line["whose"] == NULL, line["part"] != distances.EVERYTHING
    cells = (
        Cell(OTHER_SEED if null else line["whose"]),
        Cell(line["set"]),
        Cell(line["part"] if altered else ""),
        Cell(f"{line['n']:,}", line["n"]),
        Cell("" if line["n_real"] is None else f"{line['n_real']:,}", line["n_real"]),
        _fid(line),
        _kid(line),
        Cell(f"{line['inception_score']:.2f} ± {line['inception_score_std']:.2f}", line["inception_score"]),
    )
    return Row(cells, NULL if null else "")


def _fid(line: Line) -> Cell:
    if line["fid"] is None:
        return Cell("" if line["n_real"] is None else "too few")
    return Cell(f"{line['fid']:.2f}", line["fid"])


def _kid(line: Line) -> Cell:
    if line["kid"] is None:
        return Cell("")
    mean, low, high = (1000 * line[name] for name in ("kid", "kid_low", "kid_high"))
    return Cell(f"{mean:.2f} [{low:.2f}, {high:.2f}]", line["kid"])


def _theirs(row: Line) -> Row:
    fid, score = Cell(f"{row['fid']:.1f}", row["fid"]), Cell(f"{row['inception_score']:.1f}", row["inception_score"])
    texts = Cell(f"{row['model']}, the paper's"), Cell(COCO), Cell("")
    return Row((*texts, Cell("30,000", 30_000), Cell(""), fid, Cell(""), score), PAPER)


@cache
def _table_2() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = yaml.safe_load(TABLE_2.read_text("utf-8"))["rows"]
    return rows


def speed_table(lines: Sequence[Line]) -> Measures:
    """Seconds a picture by stage; a row for each number of pictures at a time."""
    columns = ("drawn", "at a time", *(STAGES[stage] for stage in drawing_speed.STAGES), "all", "on", "in")
    return Measures(columns, tuple(map(_speed, lines)), about=1, texts=2)


def _speed(line: Line) -> Row:
    seconds = [line[stage] for stage in drawing_speed.STAGES]
    cells = (Cell(f"{value:.3g}", value) for value in (*seconds, sum(seconds)))
    batch = Cell(str(line["batch"]), line["batch"])
    return Row((Cell(line["mode"]), batch, *cells, Cell(line["device"]), Cell(line["precision"])))
