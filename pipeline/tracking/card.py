"""Descriptions of runs, Markdown: what is to be seen first. MLflow shows four lines before somebody asks for more."""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from pipeline.hours import paper
from pipeline.hours.spent import Spent

LOG_LINES = 12  # of a step that failed
RUN = "run:"  # before the artifact of a step, in a link to the step's run: MLflow's id of it comes when it has one
MOST = 8  # scores that are seen first
WIDTH = 100  # characters of a line that is not broken, or fewer than four lines are seen before somebody asks for more
HEADLINES = (  # of an evaluation, the most telling first
    r"retrieval_top1(_heldout)?",
    r"[^/]+/[^/]+/(?!null/)[^/]+/win_rate",  # scorer, prompt set, rival
    r"[^/]+/[^/]+/mean",
    r"psnr_(generated|stage_b|stage_a)(_heldout)?",
)


@dataclass(frozen=True)
class Score:
    """A figure of an evaluation, and of how many pictures it is."""

    name: str
    value: float
    of: int


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
    """What a run of a command has to tell. `data` says which pictures there were; `error` ended it; `warnings` is what
    was got over."""

    unit: str
    cost: Spent
    steps: Sequence[StepLine]
    scores: Sequence[Score] = ()
    data: str = ""
    error: str | None = None
    warnings: Sequence[str] = ()
    pictures: Sequence[str] = ()
    command: str = ""


def headlines(metrics: Mapping[str, float]) -> list[Score]:
    """What is to be seen first of an evaluation, by its metrics, which tell how many pictures each is of."""
    named = [name for kind in HEADLINES for name in metrics if re.fullmatch(kind, name)]
    return [Score(name, metrics[name], _population(name, metrics)) for name in named[:MOST]]


def _population(name: str, metrics: Mapping[str, float]) -> int:
    scored, _, last = name.rpartition("/")
    counted = f"{scored}/n" if scored else "n_heldout" if last.endswith("_heldout") else "n_training"
    return int(metrics.get(counted, 0))


def verdict(story: Story) -> dict[str, float]:
    """Few figures by which runs are compared, each with what it is of."""
    return {f"{score.name} of {score.of}": score.value for score in story.scores}


def of_command(story: Story) -> str:
    """The description of a command's run."""
    scores = _in_a_line([f"{score.name} {score.value:.4g} of {score.of}" for score in story.scores])
    done = sum(step.state == "built" for step in story.steps)
    first = scores or f"{done} of {len(story.steps)} steps built"
    wrong = [story.error] if story.error else []
    wrong += list(story.warnings)
    lines = [
        f"**{first}**" if not story.error else f"**not finished: {first}**",
        f"Data: {story.data or 'none was read'}",
        f"Cost: {cost(story.cost, story.unit)}",
        f"Wrong with it: {'; '.join(wrong) if wrong else 'nothing known'}",
    ]
    table = ["| step | artifact | state | device-hours | where |", "|---|---|---|---|---|"]
    table += [
        f"| [{s.name}]({RUN}{s.output}) | {s.output} | {s.state} | {s.hours:.4f} | `{s.path}` |" for s in story.steps
    ]
    pictures = [f"- `{path}`" for path in story.pictures]
    command = [f"```\n{story.command}\n```"] if story.command else []
    parts = ["  \n".join(lines), "\n".join(table), "\n".join(pictures), *command]
    return "\n\n".join(part for part in parts if part)


def _in_a_line(scores: Sequence[str]) -> str:
    """As many of them as a line takes, the first in any case; the others stand among the metrics."""
    ends = list(accumulate(len(score) + len(", ") for score in scores))
    return ", ".join(scores[: max(1, bisect_right(ends, WIDTH))])


def cost(spent: Spent, unit: str) -> str:
    """Hours in words, with what of them was lost."""
    parts = {"failed": spent.failed, "repeated": spent.repeated}
    lost = [f"{seconds / 3600:.4g} {name}" for name, seconds in parts.items() if seconds]
    share = f", {spent.goodput:.0%} in steps that lasted" if spent.goodput is not None else ""
    money = f", {spent.money}" if spent.money else ""
    of_it = f" ({', '.join(lost)})" if lost else ""
    energy = f"; {told}" if (told := paper.energy(spent)) else ""
    return f"{spent.total / 3600:.4g} {unit}{of_it}{share}{money}{energy}"


def of_end(error: str, lines: Sequence[str], spent: Spent, unit: str) -> str:
    """The description of a step that failed or was stopped: the sentence, its hours, the end of its log."""
    log = "\n".join(lines[-LOG_LINES:])
    tail = f"\n\n```\n{log}\n```" if log else ""
    return f"**{error}**  \nCost: {cost(spent, unit)}{tail}"
