"""Runs of a root as their records tell them: found by ID, with what each asked for, and the config that it meant."""

import shlex
from collections.abc import Mapping
from functools import partial
from typing import Any

from datasets.config import DataError
from datasets.files import json_files, storage
from pipeline.errors import UsageError
from pipeline.plan.dag import order
from pipeline.plan.table import table
from pipeline.plan.wanted import prints_of
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.settings.words import parse
from pipeline.store import readers
from pipeline.store.process import ProcessId

SHOWN = 5  # runs, in a message
Record = dict[str, Any]


def records(root: str) -> list[Record]:
    """All of them, oldest first; of one that could not say how it ended, because it was killed, that is said."""
    found = json_files.read_each(storage.join(root, readers.FOLDER), readers.RECORD, partial(_told, root))
    return sorted(found.values(), key=lambda record: str(record["started"]))


def record(root: str, run: str, asked: str | None = None) -> Record:
    """The record of a run, by its ID or the end of it, as MLflow's names have it.

    Raises:
        UsageError: there is none, or more than one; names those that there are.
    """
    every = records(root)
    found = [one for one in every if one["id"] == run] or [one for one in every if run and one["id"].endswith(run)]
    if len(found) == 1:
        return found[0]
    why = f"{len(found)} of root={root} end so" if found else f"root={root} has no run of that ID"
    last = ", ".join(f"{one['id']} ({one['conf']})" for one in reversed((found or every)[-SHOWN:])) or "none"
    raise UsageError(f"{asked or f'run={run}'}: {why}; its last runs: {last}")


def fingerprints(record: Record) -> dict[str, str]:
    """What a run asked for, artifact -> fingerprint; earlier versions told only of what they built."""
    built = {name: step["artifact"].rpartition("/")[2] for name, step in record["steps"].items() if "artifact" in step}
    return {**built, **record.get("fingerprints", {})}


def config_of(record: Record, root: str) -> Config | None:
    """The config that a run's command means; None where that is not what it meant then, since files have changed."""
    try:
        words = parse(shlex.split(record["command"])[3:])
        config = compose.load(words.required_conf(), words.overrides)
        now = prints_of(config, root, order(table(config), config.targets))
    except (UsageError, DataError, ValueError, OSError):
        return None
    then = fingerprints(record)
    return config if all(then.get(name, print_.digest) == print_.digest for name, print_ in now.items()) else None


def _told(root: str, told: Mapping[str, Any]) -> Record:
    """A record with paths below this root, which may have been moved since; KeyError for another file."""
    found = {"steps": {}, **told, "id": str(told["id"])}
    _ = found["conf"], found["started"], found["outcome"]
    for step in found["steps"].values():
        for key in {"log", "artifact"} & step.keys():  # logs/<run>/<name>.log, artifacts/<name>/<fingerprint>
            step[key] = storage.join(root, *step[key].split("/")[-3:])
    if found["outcome"] == "running" and "process" in found:
        process = ProcessId.of(found["process"])
        if process.is_local and process.is_dead():
            found["outcome"] = "killed"
    return found
