"""Of what a report is asked: a run by its ID, or whatever a config, exactly as typed, has in the root."""

import shlex
from collections.abc import Sequence
from typing import Any

from datasets.config import DataError
from datasets.files import storage
from pipeline.errors import UsageError
from pipeline.plan import recorded, rivals
from pipeline.plan.dag import order
from pipeline.plan.table import table
from pipeline.plan.wanted import prints_of
from pipeline.results.subject import Subject, of_prints
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.settings.resources import Tracking
from pipeline.settings.words import Words, parse
from pipeline.store.artifacts import Artifact, Look, Store
from pipeline.store.readers import asked_for
from pipeline.verbs.configured import configured

DEFAULT = "stage_c"  # whose tracking stands for that of a run that does not tell its own


def subject(words: Words) -> tuple[Subject, Tracking]:
    """What the words ask for, and where its MLflow is.

    Raises:
        UsageError: there is no such run, or nothing of this config yet; names the runs that there are.
    """
    if "run" in words.own:
        return _of_run(storage.absolute(words.root), _record(words))
    config, root = configured(words)
    steps = order(table(config), config.targets)
    prints = {name: print_.digest for name, print_ in prints_of(config, Look(root), steps).items()}
    every = [one for one in recorded.records(root) if one["conf"] == words.conf]
    ours = [one for one in every if _asked_for(one, prints)]
    record = ours[-1] if ours else None
    found = of_prints(
        root,
        words.required_conf(),
        prints,
        record=record,
        earlier=_before(every, record),
        config=config,
    )
    if record is None and not any(found.state(name) != "missing" for name in config.targets):
        runs = recorded.last(recorded.records(root))
        raise UsageError(f"root={root} has nothing of exactly this conf; {runs}; run=ID takes one")
    return found, config.tracking


def _of_run(root: str, record: recorded.Record) -> tuple[Subject, Tracking]:
    every = [one for one in recorded.records(root) if one["conf"] == record["conf"]]
    config = config_of(record, root)
    prints = asked_for(record)
    about = {"record": record, "earlier": _before(every, record), "config": config}
    return of_prints(root, record["conf"], prints, **about), _tracking(record, config)


def config_of(record: recorded.Record, root: str) -> Config | None:
    """The config that a run's command means; None where that is not what it meant then, since files have changed."""
    try:
        words = parse(shlex.split(record["command"])[3:])
        config = rivals.with_runs(compose.load(words.required_conf(), words.overrides), root)
        now = prints_of(config, Look(root), order(table(config), config.targets))
    except (UsageError, DataError, ValueError, OSError):
        return None
    then = asked_for(record)
    return config if all(then.get(name, print_.digest) == print_.digest for name, print_ in now.items()) else None


def _before(every: Sequence[recorded.Record], record: recorded.Record | None) -> tuple[recorded.Record, ...]:
    """The runs that began before one, or all of them, the newest first."""
    return tuple(one for one in reversed(every) if record is None or one["id"] < record["id"])


def _tracking(record: dict[str, Any], config: Config | None) -> Tracking:
    if config:
        return config.tracking
    told = record.get("config", {}).get("tracking")
    return Tracking.model_validate(told) if told else compose.load(DEFAULT, []).tracking


def _asked_for(record: dict[str, Any], prints: dict[str, str]) -> bool:
    """Whether a run asked for the same: for all that both know of."""
    then = asked_for(record)
    return bool(then) and all(then[name] == prints[name] for name in then.keys() & prints.keys())


def artifact_of(words: Words, name: str | None) -> Artifact:
    """A finished artifact that a run asked for, by its name there.

    Raises:
        UsageError: it asked for none of that name, or that is not finished.
    """
    record, root = _record(words), storage.absolute(words.root)
    prints = asked_for(record)
    if name not in prints:
        given = f"artifact={name}: run={record['id']} has no such artifact" if name else "show needs artifact=NAME"
        raise UsageError(f"{given}; it has {', '.join(prints)}")
    found = Store(root).find(name, prints[name])
    if found is None:
        raise UsageError(f"artifact={name}: run={record['id']} has not finished it; `report run=ID` says what it has")
    return found


def _record(words: Words) -> recorded.Record:
    """The run that the words name, which has a conf and a config of its own.

    Raises:
        UsageError: there is none, or the words give it another.
    """
    run = words.own["run"]
    record = recorded.record(storage.absolute(words.root), run)
    if words.conf and words.conf != record["conf"]:
        raise UsageError(f"run={run} is one of conf={record['conf']}, not of conf={words.conf}; leave conf= out")
    if words.overrides:
        raise UsageError(f"run={run} has a config of its own; leave {' '.join(words.overrides)} out")
    return record
