"""Runs of a root as their records tell them: found by ID, with what each asked for."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NotRequired, TypedDict

from datasets.files import json_files, storage
from datasets.files.json_files import NUMBER
from pipeline.errors import UsageError
from pipeline.store import claims, readers
from pipeline.store.process import ProcessId

SHOWN = 5  # runs, in a message
Record = dict[str, Any]


class Progress(TypedDict):
    """How far a step at work is."""

    done: NUMBER
    total: NUMBER
    first: NUMBER
    at: NUMBER
    since: NUMBER
    unit: str
    device_hours: NotRequired[NUMBER | None]


class Shown(TypedDict):
    """What of a step is shown."""

    state: str
    log: str
    progress: NotRequired[Progress | None]


def records(root: str, last: int | None = None) -> list[Record]:
    """All of them, or the last so many, oldest first: with paths below this root, which may have been moved since; one
    that could not say how it ended, because it was killed, gets that said."""
    folder = storage.join(root, readers.FOLDER)
    found = json_files.read_each(folder, readers.RECORD, partial(_told, root), last=last)
    return list({one["id"]: one for one in found.values()}.values())  # somebody's copy of a record is no other run


def record(root: str, run: str) -> Record:
    """The record of a run, by its ID or the end of it, as MLflow's names have it.

    Raises:
        UsageError: there is none, or more than one; names those that there are.
    """
    own = json_files.read(storage.join(root, readers.FOLDER, f"{run}.json"), partial(_told, root))
    if own and own["id"] == run:  # of thousands no other is read
        return own
    every = records(root)
    found = [one for one in every if one["id"] == run] or [one for one in every if run and one["id"].endswith(run)]
    if len(found) == 1:
        return found[0]
    why = f"{len(found)} of root={root} end so" if found else f"root={root} has no run of that ID"
    raise UsageError(f"run={run}: {why}; {last(found or every)}")


def last(every: Sequence[Record]) -> str:
    """The last of some runs in words, the newest first."""
    names = ", ".join(f"{one['id']} ({one['conf']})" for one in reversed(every[-SHOWN:]))
    return f"the last runs: {names or 'none'}"


def _told(root: str, told: dict[str, Any]) -> Record:
    """A record as it is now; KeyError, TypeError or ValueError for another file."""
    run = readers.record_of(told)
    json_files.require(run, str, "conf")
    json_files.require(run, dict[str, Shown], "steps")
    for step in run["steps"].values():
        for key in ("log", "artifact"):  # logs/<run>/<name>.log, artifacts/<name>/<fingerprint>
            step[key] = storage.join(root, *step[key].split("/")[-3:])
    if run["outcome"] == "running" and (ended := _ended(root, run)):
        steps = {
            name: {**step, "state": ended} if step["state"] == "running" else step
            for name, step in run["steps"].items()
        }
        return {**run, "outcome": ended, "steps": steps}
    return run


def _ended(root: str, run: Record) -> str | None:
    """What became of a run that says it is running; None where it is."""
    process = ProcessId.of(run["process"])
    if process.is_local:
        return "killed" if process.is_dead() else None
    sign = storage.join(root, claims.FOLDER, claims.RUNS, f"{run['id']}.json")
    if not storage.exists(sign):
        return "killed"
    silent = storage.age_s(sign)
    return f"silent for {silent / 60:.0f} minutes" if silent > claims.PACE.silence_s else None
