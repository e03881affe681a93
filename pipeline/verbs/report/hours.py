"""`report hours`: the device-hour table of a root, beside the paper's where that can be."""

from typing import Any

from rich.table import Table as Lines

from pipeline.hours import paper
from pipeline.hours.paper import hours_unit
from pipeline.hours.table import Row, Table, sentences, table
from pipeline.settings import compose
from pipeline.settings.words import Words
from pipeline.terminal import console, out, print_json, print_table
from pipeline.tracking.mlflow_store import locate_store


def rebuild(words: Words, root: str) -> None:
    """Make MLflow's hours what the ledger says; a conf, or `tracking=`, says which MLflow that is."""
    from pipeline.tracking.mlflow_runs import rebuild_hours

    tracking = compose.load(words.conf or "stage_c", words.overrides).tracking
    store = locate_store(root, tracking.uri)
    if store.artifacts is not None and not store.database.exists():
        console.print(f"there is no MLflow store {store.database} yet: nothing to make anew", markup=False)
        return
    count = rebuild_hours(store, tracking.experiment, root)
    console.print(f"the hours of {count} runs in MLflow are the ledger's", markup=False)


def hours(root: str, as_json: bool) -> None:
    """The device-hour table of a root from its ledger, and each training beside the paper's."""
    found = table(root)
    if as_json:
        print_json({"root": root, **_document(found)})
    else:
        _show(found)


def _document(found: Table) -> dict[str, Any]:
    return {
        **found.total.as_hours(),
        "kg_co2_as_in_the_paper": paper.kg(found.total),
        "hours": [_row(row) for row in found.rows],
        "paper": [vars(row.comparison) for row in found.rows if row.comparison],
        "savings_of_the_paper": paper.savings(),
        "references": paper.references(),
        "torn_lines": found.torn_lines,
        "overlapping_device_seconds": found.overlapping_s,
    }


def _row(row: Row) -> dict[str, Any]:
    hours = row.hours
    told = {"device_seconds": hours.device_seconds, "kind": hours.kind, "unit": hours_unit(hours.kind)}
    return {
        **vars(hours),
        **told,
        "artifact": row.output,
        **{key: value for key, value in row.spent.as_hours().items() if key != "by_kind"},
        "lineage": row.lineage.as_hours(),
        "foreign_weights": row.foreign,
        "mfu": row.mfu,
    }


def _show(found: Table) -> None:
    columns = ("step", "fingerprint", "tries", "failed", "device-hours", "with all before", "goodput", "kind")
    lines = Lines(*columns, box=None, pad_edge=False)
    for row in found.rows:
        hours, cost = row.hours, row.spent
        spent = f"{cost.total / 3600:.4f}" + (" (estimated)" if hours.estimated else "")
        tries = str(hours.attempts), str(hours.failed_attempts)
        goodput = "" if cost.goodput is None else f"{cost.goodput:.0%}"
        before = f"{row.lineage.total / 3600:.4f}"
        lines.add_row(hours.step, hours.fingerprint, *tries, spent, before, goodput, hours.kind)
    print_table(lines)
    for sentence in _sentences(found):
        out.print(sentence, markup=False)


def _sentences(found: Table) -> list[str]:
    """What the table has no column for."""
    total = found.total
    kinds = "; ".join(f"{seconds / 3600:.4f} {hours_unit(kind)}" for kind, seconds in sorted(total.by_kind.items()))
    said = [f"total {total.total / 3600:.4f} device-hours{f': {kinds}' if kinds else ''}"]
    lost = {"failed": total.failed, "repeated": total.repeated, "thrown away by building anew": total.discarded}
    if parts := [f"{seconds / 3600:.4f} {name}" for name, seconds in lost.items() if seconds]:
        said.append(f"of these {', '.join(parts)}")
    if total.queued_s:
        said.append(f"not in these: {total.queued_s / 3600:.4f} hours of waiting for devices")
    said += [f"{row.hours.step}: {_phases(row)}" for row in found.rows if len(row.spent.phases) > 1]
    if (kg := paper.kg(total)) is not None:
        said.append(f"{kg:,.1f} kg of CO2 by the paper's method: GPU-hours x {paper.KW} kW x {paper.KG_PER_KWH} kg/kWh")
    if energy := paper.energy(total):
        said.append(energy)
    if total.money:
        said.append(total.money)
    said += sentences(found.rows)
    if found.torn_lines:
        said.append(f"{found.torn_lines} lines of the ledger are cut off, and in none of this")
    if found.overlapping_s:
        said.append(
            f"{found.overlapping_s / 3600:.4f} device-hours were held twice at a time: by runs beside each other"
        )
    return said


def _phases(row: Row) -> str:
    total = row.spent.total or 1.0
    phases = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in row.spent.phases.items())
    return phases + (f"; MFU {row.mfu:.1%} of all its time" if row.mfu is not None else "")
