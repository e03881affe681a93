"""`report hours`: the device-hour table of a root, beside the paper's."""

from rich.table import Table

from datasets.files import storage
from pipeline.errors import UsageError
from pipeline.settings.words import Words
from pipeline.store import ledger
from pipeline.terminal import out, print_json, print_table


def handle(words: Words) -> None:
    if words.rest != ["hours"]:
        raise UsageError("report knows one table: python -m pipeline report hours")
    hours(storage.absolute(words.root), words.json)


def hours(root: str, as_json: bool) -> None:
    """The device-hour table of a root from its ledger, and each training beside the paper's."""
    rows = list(ledger.totals(root).steps.values())
    compared = [found for found in map(ledger.compare_with_paper, rows) if found]
    if as_json:
        listed = [
            {**vars(row), "device_seconds": row.device_seconds, "kind": row.kind, "unit": ledger.hours_unit(row.kind)}
            for row in rows
        ]
        paper = [vars(comparison) for comparison in compared]
        print_json({"root": root, "hours": listed, "paper": paper})
        return
    lines = Table("step", "fingerprint", "attempts", "failed", "device-hours", "kind", box=None, pad_edge=False)
    for row in rows:
        spent = f"{row.device_seconds / 3600:.4f}" + (" (estimated)" if row.estimated else "")
        lines.add_row(row.step, row.fingerprint, str(row.attempts), str(row.failed_attempts), spent, row.kind)
    print_table(lines)
    for comparison in compared:
        out.print(str(comparison))
