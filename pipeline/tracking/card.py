"""Descriptions of runs, Markdown: what is to be seen first. MLflow shows four lines before somebody asks for more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.hours.spent import Spent

LOG_LINES = 12  # of a step that failed


@dataclass(frozen=True)
class StepLine:
    """A step in the table of a run: what became of it, its device-hours in this run, where its artifact lies."""

    name: str
    output: str
    state: str
    hours: float
    path: str


@dataclass
class Story:
    """What a run of a command has to tell. `population` is how many pictures the scores are of; `data` says which
    pictures; `error` ended it; `warnings` is what was got over."""

    unit: str
    cost: Spent
    steps: Sequence[StepLine]
    scores: Mapping[str, float] = field(default_factory=dict)
    population: int = 0
    data: str = ""
    error: str | None = None
    warnings: Sequence[str] = ()
    pictures: Sequence[str] = ()
    command: str = ""


def verdict(story: Story) -> dict[str, float]:
    """Few figures by which runs are compared, each with what it is of."""
    return {f"{name} of {story.population}": value for name, value in story.scores.items()}


def of_command(story: Story) -> str:
    """The description of a command's run."""
    scores = ", ".join(f"{name} {value:.4g}" for name, value in story.scores.items())
    done = sum(step.state == "built" for step in story.steps)
    first = f"{scores} (of {story.population} pictures)" if scores else f"{done} of {len(story.steps)} steps built"
    wrong = [story.error] if story.error else []
    wrong += list(story.warnings)
    lines = [
        f"**{first}**" if not story.error else f"**not finished: {first}**",
        f"Data: {story.data or 'none was read'}",
        f"Cost: {cost(story.cost, story.unit)}",
        f"Wrong with it: {'; '.join(wrong) if wrong else 'nothing known'}",
    ]
    table = ["| step | artifact | state | device-hours | where |", "|---|---|---|---|---|"]
    table += [f"| {s.name} | {s.output} | {s.state} | {s.hours:.4f} | `{s.path}` |" for s in story.steps]
    pictures = [f"- `{path}`" for path in story.pictures]
    command = [f"```\n{story.command}\n```"] if story.command else []
    parts = ["  \n".join(lines), "\n".join(table), "\n".join(pictures), *command]
    return "\n\n".join(part for part in parts if part)


def cost(spent: Spent, unit: str) -> str:
    """Hours in words, with what of them was lost."""
    parts = {"failed": spent.failed, "repeated": spent.repeated}
    lost = [f"{seconds / 3600:.4g} {name}" for name, seconds in parts.items() if seconds]
    share = f", {spent.goodput:.0%} in steps that lasted" if spent.goodput is not None else ""
    money = f", cost {spent.cost:,.2f}" if spent.cost is not None else ""
    of_it = f" ({', '.join(lost)})" if lost else ""
    return f"{spent.total / 3600:.4g} {unit}{of_it}{share}{money}"


def of_end(error: str, lines: Sequence[str], spent: Spent, unit: str) -> str:
    """The description of a step that failed or was stopped: the sentence, its hours, the end of its log."""
    log = "\n".join(lines[-LOG_LINES:])
    tail = f"\n\n```\n{log}\n```" if log else ""
    return f"**{error}**  \nCost so far: {cost(spent, unit)}{tail}"
