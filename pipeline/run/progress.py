"""What a person sees while a step works: its line of progress."""

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipeline.terminal import console


class StepProgress:
    """One step's line: name, work done of total, rate, time left; a plain line where there is no terminal."""

    def __init__(self, name: str, position: str):
        self.name = name
        self.done = 0
        self._started = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._position = position
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[dim]{task.fields[position]}[/] {task.description:12}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]} {task.fields[rate]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(name, total=None, unit="", rate="", position=position)

    def update(self, done: int, total: int, unit: str) -> None:
        """Move the bar."""
        self.done = done
        if self._bar is not None and self._task is not None:
            rate = done / max(1e-6, time.monotonic() - self._started)
            self._bar.update(self._task, completed=done, total=total, unit=unit, rate=f"{rate:.1f}/s")

    def close(self, outcome: str) -> None:
        """Replace the bar by a line that says how it ended."""
        if self._bar is not None:
            self._bar.stop()
        seconds = time.monotonic() - self._started
        console.print(f"{self._position} {self.name:12} {outcome} in {seconds:.1f} s")
