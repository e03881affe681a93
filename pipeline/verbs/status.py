"""`status`: the last runs with their steps' logs, and every artifact with its size."""

from functools import partial
from typing import Any

from rich.table import Table

from datasets.files import json_files, storage
from pipeline.settings.words import Words
from pipeline.store import claims, readers
from pipeline.store.artifacts import Store
from pipeline.store.process import ProcessId
from pipeline.terminal import out, print_json, print_table


def handle(words: Words) -> None:
    status(storage.absolute(words.root), words.json)


def status(root: str, as_json: bool) -> None:
    """Last runs with their steps' logs, and every artifact with its size."""
    folder = storage.join(root, readers.FOLDER)
    runs = list(json_files.read_each(folder, readers.RECORD, partial(_told, root), last=10).values())
    artifacts = [artifact.manifest | {"path": artifact.path} for artifact in Store(root).finished()]
    if as_json:
        keys = ("name", "step", "fingerprint", "rows", "bytes", "seconds", "device_seconds", "created", "path")
        listed = [{key: artifact[key] for key in keys} for artifact in artifacts]
        print_json({"root": root, "runs": runs, "artifacts": listed})
        return
    if not runs and not artifacts:
        out.print(f"nothing has been run in {root} yet")
        return
    for run in runs:
        out.print(f"run {run['id']}  conf={run['conf']}  {run['outcome']}")
        for name, step in run["steps"].items():
            out.print(f"    {name:12} {step['state']:12} log {step['log']}")
    lines = Table("artifact", "fingerprint", "rows", "MiB", "seconds", "created", "where", box=None, pad_edge=False)
    for item in artifacts:
        size = f"{item['bytes'] / 2**20:.1f}"
        lines.add_row(
            item["name"],
            item["fingerprint"],
            str(item["rows"]),
            size,
            f"{item['seconds']:.1f}",
            item["created"],
            item["path"].removeprefix(f"{root}/"),
        )
    out.print(f"all in {root}")
    print_table(lines)


def _told(root: str, run: dict[str, Any]) -> dict[str, Any]:
    """A run's record with paths below this root, which may have been moved since; one that could not say how it ended,
    because it was killed, gets that said."""
    _ = run["id"], run["conf"]
    for step in run["steps"].values():
        _ = step["state"]
        for key in ("log", "artifact"):  # logs/<run>/<name>.log, artifacts/<name>/<fingerprint>
            step[key] = storage.join(root, *step[key].split("/")[-3:])
    if run["outcome"] == "running" and (ended := _ended(root, run)):
        steps = {
            name: {**step, "state": ended} if step["state"] == "running" else step
            for name, step in run["steps"].items()
        }
        return {**run, "outcome": ended, "steps": steps}
    return run


def _ended(root: str, run: dict[str, Any]) -> str | None:
    """What became of a run that says it is running; None where it is."""
    process = ProcessId.of(run["process"])
    if process.is_local:
        return "killed" if process.is_dead() else None
    sign = storage.join(root, claims.FOLDER, claims.RUNS, f"{run['id']}.json")
    if not storage.exists(sign):
        return "killed"
    silent = storage.age_s(sign)
    return f"silent for {silent / 60:.0f} minutes" if silent > claims.PACE.silence_s else None
