"""The two consoles, stderr for people and stdout for answers, and how a table gets onto them."""

import sys
from typing import TextIO

from rich.console import Console
from rich.table import Table

COLUMNS = 120  # of a table where there is no terminal
console = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True, markup=False)


def print_table(table: Table, file: TextIO | None = None) -> None:
    """Print a table, on stdout unless told otherwise, with nothing cut off.

    It is folded to the terminal's width, or to `COLUMNS` in a pipe or file. Paths that people copy belong outside.
    """
    for column in table.columns:
        column.overflow = "fold"
    file = file or sys.stdout
    Console(file=file, highlight=False, width=None if file.isatty() else COLUMNS).print(table)
