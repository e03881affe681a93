"""What no row of a plan could be made of: all counted by cause, and the first of each cause named by their places."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

FILE = "left_out.parquet"  # beside the parts of a plan
LISTED = 10_000  # of each cause
SCHEMA = pa.schema([(name, pa.string()) for name in ("source", "place", "cause", "sentence")])
PASSED_OVER = "passed_over"  # the cause of files that are neither picture nor caption


class LeftOut:
    """Rows that a source or a filter leaves out: `counts` by cause, and a list of where they stand and why.

    `others` counts by kind, such as a suffix, what is no row at all: it is named in the list too, and not a loss.
    Sentences are put down as `said` makes them; places are kept as they are, and told as `known_as` makes them.
    """

    def __init__(self, said: Callable[[str], str] = str, known_as: Callable[[str], str] = str) -> None:
        self._said, self._known_as = said, known_as
        self.counts: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self._listed: dict[tuple[str, str], list[tuple[str, str]]] = {}  # by cause, and kind; place and sentence

    def add(self, cause: str, place: object, sentence: str) -> None:
        """Count a row that is left out for `cause`, a word; a sentence says why.

        The place is a file, a URL, a line of a table.
        """
        self.add_all(cause, [place], 1, sentence)

    def add_all(self, cause: str, places: Iterable[object], count: int, sentence: str) -> None:
        """The same for many rows; of `places`, no more are asked for than are listed."""
        self.counts[cause] += count
        self._list((cause, ""), places, sentence)

    def pass_over(self, kind: str, place: object, sentence: str) -> None:
        """Note what is no row: a file of another kind, say."""
        self.others[kind] += 1
        self._list((PASSED_OVER, kind), [place], sentence)

    def told(self) -> str:
        """The counts in words; empty where nothing is left out."""
        return in_words(self.counts)

    def examples(self, each: int) -> list[str]:
        """The first few rows of each cause, in words."""
        listed = (rows for (cause, _), rows in self._listed.items() if cause != PASSED_OVER)
        return [one_line(f"{self._known_as(place)}: {told}") for rows in listed for place, told in rows[:each]]

    def rows(self, source: str) -> list[tuple[str, ...]]:
        """The list as rows of `SCHEMA`; of a cause with more than `LISTED` rows, the last tells the rest."""
        rows: list[tuple[str, ...]] = []
        for (cause, kind), listed in self._listed.items():
            rows += [(source, place, cause, sentence) for place, sentence in listed]
            more = (self.others[kind] if kind else self.counts[cause]) - len(listed)
            if more:
                rows.append((source, "", cause, f"{more:,} more are not listed"))
        return rows

    def _list(self, key: tuple[str, str], places: Iterable[object], sentence: str) -> None:
        rows = self._listed.setdefault(key, [])
        told = self._said(sentence).encode(errors="replace").decode()
        rows += [
            (str(place).encode(errors="replace").decode(), told) for place in islice(places, max(0, LISTED - len(rows)))
        ]


def one_line(text: str) -> str:
    """A place or a sentence as a line or a field shows it: a file's name may have breaks and tabs, so may an error."""
    return re.sub(r"[\t\n\v\f\r\x85\u2028\u2029]", lambda found: found[0].encode("unicode_escape").decode(), text)


def table(lists: Mapping[str, LeftOut]) -> bytes:
    """The lists of some sources by their names as a Parquet file of `SCHEMA`."""
    rows = [row for source, left_out in lists.items() for row in left_out.rows(source)]
    columns = zip(*rows, strict=True) if rows else ([],) * len(SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table([pa.array(column, pa.string()) for column in columns], SCHEMA), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def in_words(counts: Mapping[str, int]) -> str:
    """Counts by cause as a list in words, those of nothing left out."""
    return ", ".join(f"{cause} {count:,}" for cause, count in counts.items() if count)
