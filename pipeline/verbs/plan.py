"""`plan`: what a run would do with each step and why, what it costs, what would stop it; nothing is started."""

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from pipeline.plan import cost, obstacles
from pipeline.plan.dag import Planned
from pipeline.plan.wanted import planned_steps
from pipeline.settings.words import Words
from pipeline.store.removal_list import names_of, requests
from pipeline.terminal import console, print_table
from pipeline.verbs.configured import configured, print_json


def handle(words: Words) -> None:
    loaded, root = configured(words)
    planned = planned_steps(loaded, root, words.selection)
    costs = cost.estimates(planned, loaded)
    forgotten = names_of(requests(root))
    if not words.json:
        show_plan(planned, costs)
        if forgotten:
            console.print(f"left out of everything: {len(forgotten)} keys and URLs that this root was asked to forget")
    steps = [
        {
            "step": item.step.name,
            "artifact": item.step.output,
            "state": item.state,
            "reason": item.reason,
            "fingerprint": item.fingerprint.digest,
            "cost": estimate,
        }
        for item, estimate in zip(planned, costs, strict=True)
    ]
    print_json(words, {"steps": steps, "forgotten": len(forgotten)})
    for sentence in obstacles.every(loaded, planned):
        console.print(f"a run would stop at once: {sentence}", style="yellow", markup=False)
    for sentence in cost.large_trainings(planned, loaded):
        console.print(sentence, style="yellow", markup=False)
    cost.check_memory(planned, loaded)


def show_plan(planned: Sequence[Planned], costs: Sequence[dict[str, Any]]) -> None:
    """Print the plan as a table on stdout, and below it the phases of trainings that have several."""
    table = Table(
        "step", "artifact", "state", "reason", "estimated cost", "memory", box=None, header_style="bold", pad_edge=False
    )
    for item, estimate in zip(planned, costs, strict=True):
        colour = {"done": "green", "resume": "cyan", "run": "default", "stale": "yellow"}[item.state]
        memory = f"{estimate['memory']['total'] / 2**30:.1f} GiB" if estimate["memory"] else ""
        state = f"[{colour}]{item.state}[/]"
        table.add_row(item.step.name, item.step.output, state, escape(item.reason), estimate["text"], memory)
    print_table(table)
    for item, estimate in zip(planned, costs, strict=True):
        if len(estimate["phases"]) > 1:
            print(f"{item.step.name} in {len(estimate['phases'])} phases: {'; '.join(estimate['phases'])}")
