"""Runs of a root as their records tell them: found by ID, with what each asked for, and the config that it meant."""

import shlex
from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets.config import DataError
from datasets.files import json_files, storage
from pipeline.errors import UsageError
from pipeline.plan import rivals
from pipeline.plan.dag import order
from pipeline.plan.table import table
from pipeline.plan.wanted import prints_of
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.settings.words import parse
from pipeline.store import claims, readers
from pipeline.store.artifacts import Look
from pipeline.store.process import ProcessId

SHOWN = 5  # runs, in a message
Record = dict[str, Any]


def records(root: str, last: int | None = None) -> list[Record]:
    """All of them, or the last so many, oldest first: with paths below this root, which may have been moved since; one
    that could not say how it ended, because it was killed, gets that said."""
    folder = storage.join(root, readers.FOLDER)
    return list(json_files.read_each(folder, readers.RECORD, partial(_told, root), last=last).values())


def record(root: str, run: str) -> Record:
    """The record of a run, by its ID or the end of it, as MLflow's names have it.

    Raises:
        UsageError: there is none, or more than one; names those that there are.
    """
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


def fingerprints(record: Record) -> dict[str, str]:
    """What a run asked for, artifact -> fingerprint; earlier versions told only of what they built."""
    built = {name: step["artifact"].rpartition("/")[2] for name, step in record["steps"].items()}
    return {**built, **record.get("fingerprints", {})}


def config_of(record: Record, root: str) -> Config | None:
    """The config that a run's command means; None where that is not what it meant then, since files have changed."""
    try:
        words = parse(shlex.split(record["command"])[3:])
        config = rivals.with_runs(compose.load(words.required_conf(), words.overrides), root)
        now = prints_of(config, Look(root), order(table(config), config.targets))
    except (UsageError, DataError, ValueError, OSError):
        return None
    then = fingerprints(record)
    return config if all(then.get(name, print_.digest) == print_.digest for name, print_ in now.items()) else None


def _told(root: str, run: Record) -> Record:
    """A record as it is now; KeyError for another file."""
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
