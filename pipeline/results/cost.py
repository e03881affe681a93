"""What an experiment has cost, from the ledger: each step alone and with what it stands on, all of it, and the run."""

from typing import Any

from pipeline.hours import paper
from pipeline.hours.spent import Spent, spent
from pipeline.hours.table import Row, sentences, table
from pipeline.results.subject import Subject
from pipeline.store import ledger


def section(subject: Subject) -> dict[str, Any]:
    """A row for each step that the experiment's artifacts needed, their sum, and what the run itself held."""
    prints = set(subject.prints.values())
    every = table(subject.root)
    rows = [row for row in every.rows if row.hours.fingerprint in prints]
    leases, _ = ledger.read(subject.root)
    ours = [lease for lease in leases if lease.fingerprint in prints]
    told: dict[str, Any] = {
        "rows": [_row(row) for row in rows],
        "total": total(spent(ours)),
        "torn_lines": every.torn_lines,
        "sentences": sentences(rows),
    }
    if subject.record:
        told["run"] = total(spent(lease for lease in leases if lease.run == subject.record["id"]))
    return told


def _row(row: Row) -> dict[str, Any]:
    hours, cost = row.hours, row.spent
    return {
        "step": hours.step,
        "artifact": row.output,
        "fingerprint": hours.fingerprint,
        "hours": cost.total / 3600,
        "failed": cost.failed / 3600,
        "repeated": cost.repeated / 3600,
        "discarded": cost.discarded / 3600,
        "phases": {phase: seconds / 3600 for phase, seconds in cost.phases.items()},
        "lineage": row.lineage.total / 3600,
        "kind": hours.kind,
        "unit": paper.hours_unit(hours.kind).partition(",")[0],
        "attempts": hours.attempts,
        "estimated": hours.estimated,
        "goodput": cost.goodput,
        "mfu": row.mfu,
        "foreign": row.foreign,
    }


def total(cost: Spent) -> dict[str, Any]:
    """Hours of some leases together, kg of CO2 by the paper's method where GPUs were held, energy where it was
    measured, and money where priced."""
    told = {"kg_co2_as_in_the_paper": paper.kg(cost), "energy": paper.energy(cost), "money": cost.money}
    return cost.as_hours() | told
