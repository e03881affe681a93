"""The verb `gc`: artifacts that no run wants any more, and what builders that died have left.

A run wants the artifacts that its config asked for, those in whose folders it read weights or pictures by their path
(`interpolate.first=...`), and all that these were made from. Of runs by the same command only the last counts: the same
words may ask for something else once a conf has changed. Runs of other roots are not known here.
"""

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.table import Table

from datasets.files import json_files, notices, storage
from pipeline.errors import LeaseHeld, UsageError
from pipeline.settings.words import Words, parse
from pipeline.store import lease, ledger
from pipeline.store.artifacts import BUILDING, DIGEST, MANIFEST, RECORD, Store
from pipeline.store.process import ProcessId
from pipeline.terminal import console, out, print_table

Name = tuple[str, str]  # of an artifact: its name and its fingerprint


def handle(words: Words) -> None:
    collect(storage.absolute(words.root), words.own.get("days"), words.yes, words.json)


@dataclass(frozen=True)
class Unwanted:
    """A folder that may go: an artifact, an unfinished build, or what the build of a finished one has left."""

    name: str
    fingerprint: str
    path: str
    reason: str
    bytes: int


def collect(root: str, days: str | None, delete: bool, as_json: bool) -> None:
    """List what may go, and delete it if asked to.

    Raises:
        UsageError: `days` is no number of days.
        CorruptFile: a manifest has an unknown format, so nobody knows what its artifact was made from.
    """
    if days is not None and not days.isdigit():
        raise UsageError(f"days={days}: give a number of days; runs that are older want nothing")
    since = datetime.now(UTC) - timedelta(days=int(days)) if days is not None else None
    found = unwanted(root, wanted(root, runs(root, since)))
    deleted = [item for item in found if _delete(item)] if delete else []
    if as_json:
        listed = {"unwanted": [vars(item) for item in found], "deleted": [item.path for item in deleted]}
        print(json.dumps({"root": root, **listed}, indent=1))
        return
    lines = Table("artifact", "fingerprint", "MiB", "why", box=None, pad_edge=False)
    for item in found:
        lines.add_row(item.name, item.fingerprint, f"{item.bytes / 2**20:.1f}", item.reason)
    if found:
        print_table(lines)
    shown = deleted if delete else found
    told = f"{len(shown)} folders with {sum(item.bytes for item in shown):,} bytes"
    out.print(f"deleted {told}" if delete else f"{told} could go; nothing is deleted without --yes")


def runs(root: str, since: datetime | None) -> list[dict[str, Any]]:
    """The records of the last run by each command, of those that lived after `since`; flags and root do not count."""
    folder = storage.join(root, "invocations")
    records = json_files.read_each(folder, RECORD, _whole).values()
    last = {_command(record): record for record in sorted(records, key=lambda record: record["started"])}
    return [record for record in last.values() if since is None or _last_lived(root, record) >= since]


def _whole(record: dict[str, Any]) -> dict[str, Any]:
    """A run's record that tells what is asked of it here; KeyError for another."""
    _ = record["id"], record["started"], record["command"], record["outcome"], record["steps"].items()
    return record


def _last_lived(root: str, record: dict[str, Any]) -> datetime:
    """When a run still lived, as far as is known: a training may take longer than the days that are asked for."""
    if record["outcome"] == "running":
        process = ProcessId(**record["process"])
        if process.is_local and not process.is_dead():
            return datetime.now(UTC)
    last = ledger.last_sign(root, record["id"])
    return datetime.fromtimestamp(last, UTC) if last else datetime.fromisoformat(record["started"])


def _command(record: dict[str, Any]) -> tuple[str, ...]:
    """What a run was asked for: its verb, its conf and its overrides."""
    try:
        words = parse(shlex.split(record["command"])[3:])
    except UsageError:  # by a version with other verbs
        return (record["command"],)
    return (words.verb, *words.rest, words.conf or "", *sorted(words.overrides))


def wanted(root: str, records: Iterable[dict[str, Any]]) -> set[Name]:
    """The artifacts that some runs want, with all that those were made from."""
    store, found = Store(root), set[Name]()
    waiting = [name for record in records for name in _wanted_by(record, store)]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            artifact = store.find(*name)
            waiting += artifact.manifest["parents"].items() if artifact else ()
    return found


def _wanted_by(record: dict[str, Any], store: Store) -> list[Name]:
    """What a run asked for or named by path, and the images that its unfinished download may take over."""
    built = {name: step["artifact"].rpartition("/")[2] for name, step in record["steps"].items()}
    names = {**built, **record.get("fingerprints", {})}
    found = list(names.items())
    folder = storage.join(store.root, "artifacts", "")
    for path in (path for path in record.get("paths", ()) if path.startswith(folder)):
        name, _, rest = path.removeprefix(folder).partition("/")
        found.append((name, rest.partition("/")[0]))
    if "images" in names and store.find("images", names["images"]) is None:
        earlier = (images.manifest for images in store.finished("images"))
        found += [
            ("images", it["fingerprint"]) for it in earlier if it["parents"].get("metadata") == names.get("metadata")
        ]
    return found


def unwanted(root: str, wanted: set[Name]) -> list[Unwanted]:
    """Folders below a root's artifacts that nobody wants and nobody builds, largest first."""
    folder = storage.join(root, "artifacts")
    files: dict[Name, set[str]] = {}
    for file in storage.listing(folder):
        name, _, below = file.partition("/")
        digest, _, rest = below.partition("/")
        if re.fullmatch(DIGEST, digest) and rest:
            files.setdefault((name, digest), set()).add(rest)
        else:
            notices.tell(notices.PassedOver(storage.join(folder, file), "none of our files"))
    found = []
    for (name, digest), inside in files.items():
        path = storage.join(folder, name, digest)
        if (name, digest) not in wanted:
            reason = "in no run's last plan" if MANIFEST in inside else "an unfinished build that no run goes on with"
            found.append(Unwanted(name, digest, path, reason, storage.total_bytes(path)))
        elif MANIFEST in inside and any(file.startswith(f"{BUILDING}/") for file in inside):
            path = storage.join(path, BUILDING)
            found.append(Unwanted(name, digest, path, "left by the build of a finished one", storage.total_bytes(path)))
    return sorted(found, key=lambda item: -item.bytes)


def _delete(item: Unwanted) -> bool:
    """Delete a folder, its manifest first, unless somebody is building there."""
    artifact = item.path.removesuffix(f"/{BUILDING}")
    try:
        with lease.hold(artifact, console.print):
            if artifact == item.path:
                storage.remove(storage.join(item.path, MANIFEST))
            storage.remove(item.path)
    except LeaseHeld as error:
        console.print(f"left alone: {error}", markup=False)
        return False
    return True
