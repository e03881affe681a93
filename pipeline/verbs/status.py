"""`status`: the last runs with how far they are and their steps' logs, and every artifact with its size."""

import time
from typing import Any

from rich.table import Table

from datasets.files import storage
from pipeline.plan import recorded
from pipeline.settings.words import Words
from pipeline.store.artifacts import Store
from pipeline.terminal import out, print_json, print_table

POLL_S = 5.0


def handle(words: Words) -> None:
    root = storage.absolute(words.root)
    status(root, words.json)
    if words.follow:
        follow(root)


def follow(root: str) -> None:
    """Go on telling how far the last run is, until it has ended."""
    before: list[str] = []
    while (runs := _runs(root, last=1)) and runs[0]["outcome"] == "running":
        lines = [_line(name, step) for name, step in runs[0]["steps"].items()]
        for line in lines:
            if line not in before:
                out.print(line)
        before = lines
        time.sleep(POLL_S)
    for run in runs:
        out.print(f"run {run['id']}  conf={run['conf']}  {run['outcome']}")


def _runs(root: str, last: int | None = None) -> list[dict[str, Any]]:
    """The records of runs as they are now, without their configs, which are long."""
    return [{key: told for key, told in run.items() if key != "config"} for run in recorded.records(root, last)]


def status(root: str, as_json: bool) -> None:
    """Last runs with how far they are and their steps' logs, and every artifact with its size."""
    runs = _runs(root, last=10)
    artifacts = [artifact.manifest | {"path": artifact.path} for artifact in Store(root).finished()]
    if as_json:
        keys = ("name", "step", "fingerprint", "rows", "bytes", "seconds", "device_seconds", "created", "path")
        listed = [{key: artifact.get(key) for key in keys} for artifact in artifacts]
        print_json({"root": root, "runs": runs, "artifacts": listed})
        return
    if not runs and not artifacts:
        out.print(f"nothing has been run in {root} yet")
        return
    for run in runs:
        out.print(f"run {run['id']}  conf={run['conf']}  {run['outcome']}")
        for name, step in run["steps"].items():
            out.print(f"{_line(name, step)}\n                 log {step['log']}")
    lines = Table("artifact", "fingerprint", "rows", "MiB", "seconds", "created", "where", box=None, pad_edge=False)
    for item in artifacts:
        size = f"{item['bytes'] / 2**20:.1f}"
        lines.add_row(
            item["name"],
            item["fingerprint"],
            str(item["rows"]),
            size,
            f"{item.get('seconds', 0):.1f}",
            item["created"],
            item["path"].removeprefix(f"{root}/"),
        )
    out.print(f"all in {root}")
    print_table(lines)


def _line(name: str, step: dict[str, Any]) -> str:
    """A step of a run: its state, and where it is at work, how far it is."""
    line = f"    {name:12} {step['state']}"
    if step["state"] != "running" or not (far := step.get("progress")):
        return line
    line += f"  {far['done']:,} of {far['total']:,} {far['unit']}"
    gained, seconds = far["done"] - far["first"], far["at"] - far["since"]
    if gained > 0 and seconds > 0:
        line += f", {gained / seconds:.3g}/s, {_duration((far['total'] - far['done']) * seconds / gained)} left"
    if far.get("device_hours") is not None:
        line += f", {far['device_hours']:.4g} device-hours"
    return f"{line}, told {_duration(max(0.0, time.time() - far['at']))} ago"


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
