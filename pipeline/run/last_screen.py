"""The last screen of a run, on stderr."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table

from datasets.files import storage
from pipeline.results.scores import in_lines
from pipeline.results.trainings import TITLES, left_out
from pipeline.store.artifacts import Artifact
from pipeline.terminal import console, counted, print_table

SHEETS = ("grid.png", "panel.png")  # pictures of an artifact for people, the best first


@dataclass
class Built:
    """What the last screen says of one step."""

    name: str
    output: str
    state: str
    path: str
    seconds: float = 0.0
    training_seconds: float = 0.0
    device_hours: float = 0.0
    attempts: int = 0
    interruptions: int = 0
    preemptions: int = 0  # of them, those with notice
    steps_again: int = 0


@dataclass
class Summary:
    """What the last screen shows of a run."""

    root: str = ""
    steps: list[Built] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    devices: str = "cpu"
    predicted_hours: float | None = None  # device-hours, of all that was to do
    paper: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    scores: list[str] = field(default_factory=list)  # a line a prompt set
    left_out: dict[str, str] = field(default_factory=dict)  # by training, in words
    caption: str = ""  # of a picture that was drawn
    next_command: str = ""
    warnings: list[str] = field(default_factory=list)
    storage_tries: int = 0  # requests to the storage that were made again
    storage_reason: str = ""  # why the last of them was

    @property
    def overhead(self) -> float:
        """Share of the wall time in which no training step ran."""
        training = sum(step.training_seconds for step in self.steps)  # some of it, maybe, in a run that was killed
        return max(0.0, 1 - training / max(self.seconds, 1e-9))

    def take(self, artifacts: Mapping[str, Artifact]) -> None:
        """Note what the run's artifacts have for people: contact sheets, scores, a caption that was drawn,
        what their trainings left out."""
        for artifact in artifacts.values():
            self.left_out |= left_out(artifact.manifest["metrics"])
            sheets = [name for name in SHEETS if name in artifact.manifest["files"]]
            self.pictures += [storage.join(artifact.path, name) for name in sheets[:1]]
        if scores := artifacts.get("scores"):
            self.scores = in_lines(scores)
        if samples := artifacts.get("samples"):
            self.caption = json.loads(samples.read("captions.json"))[0]["caption"]


def show_summary(summary: Summary) -> None:
    """Print the last screen."""
    unit = "GPU-hours" if summary.devices.startswith("cuda") else "CPU-hours"
    table = Table("step", "artifact", "state", "seconds", unit, "where", box=None, header_style="bold", pad_edge=False)
    for step in summary.steps:
        place = step.path.removeprefix(f"{summary.root}/")
        table.add_row(step.name, step.output, step.state, f"{step.seconds:.1f}", f"{step.device_hours:.4f}", place)
    console.print()
    console.print(f"all in {summary.root}", markup=False)
    print_table(table, sys.stderr)
    for number, line in enumerate(summary.scores):
        console.print(f"{'' if number else 'scores':<12}{line}", markup=False)
    built = [step for step in summary.steps if step.training_seconds]
    if built:
        console.print(
            f"time        {summary.seconds:.0f} s, of which {sum(s.training_seconds for s in built):.0f} s training "
            f"steps (overhead {summary.overhead:.0%})"
        )
    else:
        console.print(f"time        {summary.seconds:.0f} s")
    console.print(f"memory      {summary.peak_bytes / 2**30:.2f} GiB at most (summed PSS of all processes)")
    total = sum(step.device_hours for step in summary.steps)
    console.print(f"device time {total:.3f} {unit} for everything above")
    if summary.predicted_hours is not None:
        console.print(f"            predicted {summary.predicted_hours:.3g}, spent {total:.3g}")
    for line in summary.paper:
        console.print(f"            {line}")
    for step in [step for step in summary.steps if step.interruptions]:
        console.print(f"interrupted {step.name}: {_interruptions(step)}")
    for training, what in summary.left_out.items():
        console.print(f"left out    {TITLES[training]}: {what}")
    if summary.storage_tries:
        times = "1 request was" if summary.storage_tries == 1 else f"{summary.storage_tries:,} requests were"
        console.print(f"storage     {times} made again (the last: {summary.storage_reason})", markup=False)
    for warning in summary.warnings:
        console.print(f"[yellow]warning[/]     {escape(warning)}")
    for picture in summary.pictures:
        console.print(f"pictures    {picture}", markup=False)
    console.print(f"next        {summary.next_command}", markup=False)


def _interruptions(step: Built) -> str:
    """What they cost, in words."""
    steps, times = counted(step.steps_again, "step"), counted(step.interruptions, "interruption")
    notice = f", {step.preemptions} of them because a node was taken away" if step.preemptions else ""
    return f"{steps} done again after {times}{notice}"
