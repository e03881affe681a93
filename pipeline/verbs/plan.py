"""`plan`: what a run would do with each step and why, what it costs, what would stop it; nothing is started."""

from collections.abc import Callable, Sequence

from rich.table import Table
from rich.text import Text

from datasets.config import DataError
from datasets.planning import preview
from datasets.planning.plan import Counts
from datasets.sources import laion
from pipeline.errors import UsageError, nearest
from pipeline.plan import budget, cost, lanes, obstacles, rivals, training_memory
from pipeline.plan.budget import Line
from pipeline.plan.cost import Estimate
from pipeline.plan.dag import Planned
from pipeline.plan.wanted import planned_steps
from pipeline.settings.config import Config
from pipeline.settings.words import Words
from pipeline.store.artifacts import Look
from pipeline.store.provenance import other_versions
from pipeline.store.removal_list import names_of, requests
from pipeline.terminal import console, out, print_table
from pipeline.verbs.configured import configured_run, print_json

TOLD = 3  # changes of a stale step in the table


def handle(words: Words) -> None:
    loaded, root = configured_run(words)
    look = Look(root)
    planned = planned_steps(loaded, look, words.selection)
    counts, refusal = _listed(loaded, planned)
    costs = cost.estimates(planned, loaded, counts)
    lines = budget.lines(planned, costs, loaded, look.finished())
    forgotten = names_of(requests(root))
    if words.why is not None:
        tell_why(planned, words.why)
    elif not words.json:
        show_plan(planned, costs)
        show_budget(lines)
        if others := other_versions(item.artifact.manifest for item in planned if item.artifact):
            console.print(f"built by other versions, and used as it is: {', '.join(others)}", markup=False)
        if forgotten:
            console.print(f"left out of everything: {len(forgotten)} keys and URLs that this root was asked to forget")
    steps = [
        {
            "step": item.step.name,
            "artifact": item.step.output,
            "state": item.state,
            "reason": item.reason,
            "changes": item.changes,
            "fingerprint": item.fingerprint.digest,
            "cost": estimate.document(),
            "budget": [vars(line) for line in lines if line.step == item.step.name],
        }
        for item, estimate in zip(planned, costs, strict=True)
    ]
    if refusal:
        raise refusal
    taken = obstacles.columns(loaded, planned)
    document = {"steps": steps, "budget": vars(budget.total(lines)), "forgotten": len(forgotten)}
    print_json(words, document | ({"data": preview.document(counts)} if counts else {}) | {"columns": taken})
    for key, found in taken.items():
        console.print(f"{key}: {laion.told(found)}", markup=False)
    for sentence in [
        *((*preview.told(loaded.data, counts), *preview.as_asked(loaded.data, counts)) if counts else ()),
        *obstacles.unread(loaded, planned, counts),
    ]:
        console.print(sentence, markup=False)
    for sentence in obstacles.every(loaded, planned, counts):
        console.print(f"a run would stop at once: {sentence}", style="yellow", markup=False)
    try:
        remarks = rivals.remarks(loaded, planned)
    except DataError as error:
        remarks = [f"a run would stop at once: {error}"]
    for sentence in remarks:
        console.print(sentence, style="yellow", markup=False)
    for sentence in (*training_memory.large_trainings(planned, loaded), *lanes.remarks(planned, loaded)):
        console.print(sentence, style="yellow", markup=False)
    training_memory.check(planned, loaded)


def _listed(config: Config, planned: list[Planned]) -> tuple[Counts | None, DataError | None]:
    """What sources would give that are listed before a run, or why they give nothing: it is told after the table."""
    try:
        return obstacles.ahead(config, planned), None
    except DataError as error:
        return None, error


def tell_why(planned: Sequence[Planned], name: str) -> None:
    """Print the whole reason of the steps of one name, a change a line.

    Raises:
        UsageError: there is no such step in the plan.
    """
    found = [item for item in planned if item.step.name == name]
    if not found:
        names = dict.fromkeys(item.step.name for item in planned)
        raise UsageError(f"--why {name}: this plan has no such step{nearest(name, names)}; it has {', '.join(names)}")
    for item in found:
        out.print(f"{item.step.name} ({item.step.output}): {item.state}{'' if item.changes else ', ' + item.reason}")
        for change in item.changes:
            out.print(f"    {change}")


def _brief(item: Planned) -> str:
    """The reason with the most telling changes alone."""
    left = len(item.changes) - TOLD
    if left <= 0:
        return item.reason
    return f"{'; '.join(item.changes[:TOLD])}; and {left} more (--why {item.step.name})"


def show_plan(planned: Sequence[Planned], costs: Sequence[Estimate]) -> None:
    """Print the plan as a table on stdout, and below it the phases of trainings that have several."""
    table = Table(
        "step", "artifact", "state", "reason", "estimated cost", "memory", box=None, header_style="bold", pad_edge=False
    )
    for item, estimate in zip(planned, costs, strict=True):
        colour = {"done": "green", "resume": "cyan", "run": "default", "stale": "yellow"}[item.state]
        memory = f"{estimate.memory.total / 2**30:.1f} GiB" if estimate.memory else ""
        state = Text(item.state, style=colour)
        table.add_row(item.step.name, item.step.output, state, _brief(item), estimate.text, memory)
    print_table(table)
    for item, estimate in zip(planned, costs, strict=True):
        if len(estimate.phases) > 1:
            out.print(f"{item.step.name} in {len(estimate.phases)} phases: {'; '.join(estimate.phases)}")


def show_budget(lines: Sequence[Line]) -> None:
    """Print what the steps would take, a line a phase, and the total, without columns of which nothing is known."""
    if not any(line.hours for line in lines):
        return
    columns: dict[str, Callable[[Line], str]] = {
        "step": lambda line: line.step,
        "phase": lambda line: line.phase,
        "params": lambda line: _count(line.parameters),
        "GiB/rank": lambda line: "" if line.rank_bytes is None else f"{line.rank_bytes / 2**30:.1f}",
        "FLOP/img": lambda line: _count(line.flops),
        "images": lambda line: _count(line.images),
        "dev-hours": lambda line: _number(line.hours),
        "wall h": lambda line: _number(line.wall_h),
        "stored": lambda line: "" if line.stored_bytes is None else _count(line.stored_bytes) + "B",
        "kg CO2": lambda line: _number(line.kg),
        "cost": lambda line: _number(line.cost),
        "rate from": lambda line: line.basis,
    }
    rows = [*lines, budget.total(lines)]
    told = {name: [cell(line) for line in rows] for name, cell in columns.items()}
    kept = {name: cells for name, cells in told.items() if any(cells)}
    table = Table(*kept, box=None, header_style="bold", pad_edge=False)
    for row in zip(*kept.values(), strict=True):
        table.add_row(*row)
    print()
    print_table(table)
    print(f"rate from: {budget.BASES}")


def _count(value: int | None) -> str:
    """Three digits and a letter."""
    if value is None:
        return ""
    number, letters = float(value), iter(" kMGTPE")
    letter = next(letters)
    while number >= 1000:
        number, letter = number / 1000, next(letters)
    return f"{number:.3g}{letter}".strip()


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
