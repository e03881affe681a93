"""The two consoles, stderr for people and stdout for answers, and how tables and JSON get onto them."""

import io
import json
import os
import re
import sys
import time
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from datasets.files.notices import Notice, Retry
from pipeline.store.redact import redact_line

COLUMNS = 120  # of a table where there is no terminal
NAMED = 10  # of the files that were passed over
HEEDED = re.compile(  # controls but line ends and tabs, and what turns the direction of writing
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)
QUIET_S = 60.0  # between two lines about a store that keeps failing


class Console(RichConsole):
    """Rich's, where it goes into a pipe that nobody reads any more: an answer ends there, as with `print`; work goes
    on without being watched. Nothing in a text stands for another sign, or for a colour unless that is asked for, and
    secrets are left out: what goes onto a console is kept in the logs of jobs."""

    def __init__(self, **options: Any):
        super().__init__(**{"highlight": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """As Rich does, of a text that cannot move the cursor, change colours, turn others around or tell secrets."""
        return super().render_str(printable(redact_line(text)), **options)

    def on_broken_pipe(self) -> None:
        if not self.stderr:
            raise BrokenPipeError
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def printable(text: str) -> str:
    """A text with escapes in place of what a terminal would heed: servers, captions, file names may hold anything."""
    return HEEDED.sub(lambda sign: repr(sign[0])[1:-1], text)


console = Console(stderr=True, soft_wrap=True)
out = Console(soft_wrap=True, markup=False)


def print_table(table: Table, file: TextIO | None = None) -> None:
    """Print a table, on stdout unless told otherwise, with nothing cut off.

    It is folded to the terminal's width, or to `COLUMNS` in a pipe or file. Paths that people copy belong outside.
    """
    for column in table.columns:
        column.overflow = "fold"
    file = file or sys.stdout
    width = None if file.isatty() else COLUMNS
    Console(file=file, stderr=file is sys.stderr, markup=False, width=width).print(table)


def print_json(document: object) -> None:
    """Print a document on stdout, with the letters that its encoding has and escapes for all others."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(document, indent=1, ensure_ascii=not unicode)
    print(HEEDED.sub(lambda sign: json.dumps(sign[0])[1:-1], text))


def escape_what_cannot_be_shown() -> None:
    """Write letters that stdout's or stderr's encoding has not as escapes, instead of failing over them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Notices:
    """Says on stderr what the storage had to get over: tries at once, but not each of many; at the end, what was left
    out."""

    def __init__(self) -> None:
        self.tries = 0
        self._said: float | None = None
        self._passed_over: dict[str, str] = {}

    def __call__(self, notice: Notice) -> None:
        """Hear a notice."""
        if not isinstance(notice, Retry):
            self._passed_over[notice.path] = notice.reason
            return
        self.tries += 1
        if self._said is None or time.monotonic() - self._said > QUIET_S:
            self._said = time.monotonic()
            told = "" if self.tries == 1 else f" ({self.tries} times by now)"
            console.print(f"{notice}{told}", style="yellow", markup=False)

    def say_what_was_passed_over(self) -> None:
        """Count and name it, if it was anything."""
        if found := self._passed_over:
            named = "; ".join(f"{path}: {reason}" for path, reason in list(found.items())[:NAMED])
            more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
            files = "1 file" if len(found) == 1 else f"{len(found)} files"
            console.print(f"passed over {files}: {named}{more}", style="yellow", markup=False)


def counted(count: int, what: str) -> str:
    """So many of something, in words: "1 pair", "1,200 pairs"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
