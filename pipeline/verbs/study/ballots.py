"""The answers of raters as their browsers wrote them, and which of them count."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import UsageError
from pipeline.verbs.study.pairs import NEITHER, SIDES, Key

COLUMNS = ("study", "rater", "pair", "left", "chosen", "answered")
Row = Mapping[str, str]


@dataclass(frozen=True)
class Ballot:
    """An answer: by whom, to which pair, which side stood left, which was chosen (`a`, `b` or `neither`)."""

    rater: str
    pair: str
    left: str
    chosen: str


def rows(content: bytes, name: str) -> list[Row]:
    """The rows of a file of answers.

    Raises:
        UsageError: it is none; names it.
    """
    try:
        reader = csv.DictReader(
            io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True
        )  # or an open quote would swallow rows
        found: list[Row] = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{name} is no CSV in UTF-8 ({error}); give the files that the study's page made") from None
    if missing := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
        raise UsageError(
            f"{name} lacks the columns {', '.join(missing)}; give the files that the study's page made, as they are"
        )
    return found


def studies(found: Iterable[Row]) -> Counter[str]:
    """The studies that rows say they are of, with how many they are."""
    return Counter(str(row["study"] or "").strip() for row in found)


def sifted(found: Sequence[Row], key: Key) -> tuple[list[Ballot], Counter[str]]:
    """The answers that count, of what was answered twice the last; and how many rows do not, by cause."""
    last: dict[tuple[str, str], tuple[str, Ballot]] = {}
    dropped: Counter[str] = Counter()
    for row in found:
        if cause := _cause(row, key):
            dropped[cause] += 1
            continue
        ballot = Ballot(*(row[name].strip() for name in ("rater", "pair", "left", "chosen")))
        at, when = (ballot.rater, ballot.pair), row["answered"].strip()
        dropped["answered again"] += at in last
        if at not in last or when >= last[at][0]:
            last[at] = when, ballot
    return [ballot for _, ballot in last.values()], +dropped


def _cause(row: Row, key: Key) -> str | None:
    """Why a row does not count; None where it does."""
    values = {name: (row[name] or "").strip() for name in COLUMNS}
    if not all(values.values()):
        return "incomplete"
    if values["study"] != key.study:
        return "of another study"
    if values["pair"] not in key.pairs:
        return "of no pair of the study"
    if values["chosen"] not in (*SIDES, NEITHER) or values["left"] not in SIDES:
        return "no answer that the page gives"
    return None
