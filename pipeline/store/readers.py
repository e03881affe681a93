"""Who wants what lies below a root: the runs there, those at work and those before, as their records tell.

A run wants the artifacts that its config asked for, those in whose folders it read weights or pictures by their path
(`interpolate.first=...`), and all that these were made from. So does who reads without being a run, as `sample` and
`export` do. Runs of other roots are not known here.
"""

import re
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NotRequired, TypedDict

from datasets.files import json_files, storage
from datasets.files.errors import StoreRefuses
from datasets.files.storage import MEND, CorruptFile
from pipeline.errors import LeaseHeld
from pipeline.store import claims, ledger
from pipeline.store.artifacts import DIGEST, Artifact, Look, Store, lacking
from pipeline.store.process import ProcessId

FOLDER = "invocations"
RECORD = r"[^./][^/]*\.json"
OURS = r"\d{8}-\d{6}-[0-9a-f]{4}\.json"  # as a run calls its own
Name = tuple[str, str]  # of an artifact: its name and its fingerprint


class Step(TypedDict):
    """A step in a run's record."""

    artifact: str
    step: NotRequired[str]


class Record(TypedDict):
    """A run's record: what every reader asks for, and what not every record has, but of this kind."""

    outcome: str
    command: str
    started: str
    steps: dict[str, Step]
    fingerprints: dict[str, str]
    paths: list[str]
    process: dict[str, Any]
    ended: NotRequired[str]
    user: NotRequired[str]
    checkout: NotRequired[str]
    config: NotRequired[dict[str, Any]]
    commit: NotRequired[dict[str, Any] | None]
    versions: NotRequired[dict[str, str]]


@dataclass(frozen=True)
class Run:
    """A run by its record; whether it is at work, and when it was so last, as far as is known."""

    record: dict[str, Any]
    live: bool
    lived: datetime

    @property
    def id(self) -> str:
        """Its name among the runs of its root."""
        return str(self.record["id"])

    @property
    def user(self) -> str:
        """Who started it; records by earlier versions do not tell."""
        return str(self.record.get("user", "somebody"))


def runs(root: str, notify: Callable[[str], None], pace: claims.Pace = claims.PACE) -> list[Run]:
    """All runs of a root, oldest first; where it cannot be known at once whether one is at work, it is watched."""
    found = json_files.read_each(storage.join(root, FOLDER), RECORD, record_of)
    records = sorted(found.values(), key=lambda record: str(record["started"]))
    at_work = claims.runs_at_work(root, notify, pace)
    others = [_reader(run, owner) for run, owner in at_work.items() if owner.reads]
    return [*(_run(root, record, record["id"] in at_work) for record in records), *others]


@contextmanager
def reading(store: Store, artifacts: Collection[Artifact], notify: Callable[[str], None]) -> Iterator[None]:
    """Show during the block that these artifacts are read, by who is no run and leaves no record.

    Raises:
        LeaseHeld: one was deleted before that could be seen.
        CorruptFile: one lacks files.
    """
    with ExitStack() as exits:
        try:
            paths = [artifact.path for artifact in artifacts]
            exits.enter_context(claims.at_work(store.root, f"reader-{uuid.uuid4().hex[:12]}", reads=paths))
        except StoreRefuses as error:  # somebody else's root, which may be read all the same
            notify(f"nobody sees that it is read, so gc may delete it meanwhile: {error}")
        for artifact in artifacts:
            if store.find(*artifact.called) is None:
                raise LeaseHeld(f"{artifact.path} was deleted a moment ago; call this again")
            if told := lacking(artifact.path, artifact.files):
                raise CorruptFile(f"{told}; {MEND}")
        yield


def check_records(root: str) -> None:
    """Look whether all that runs want is known.

    Raises:
        CorruptFile: a record is damaged.
    """
    folder = storage.join(root, FOLDER)
    try:
        json_files.read_every(folder, OURS, record_of, also=".*")
        for name in storage.children(folder)[1]:
            if re.fullmatch(OURS, name):
                raise CorruptFile(f"{storage.join(folder, name)} is damaged: it is a folder")
    except CorruptFile as error:
        raise CorruptFile(f"{error}; so nobody knows what its run wants: move it away first") from None


def record_files(root: str) -> list[str]:
    """Paths of the records; each run adds one before it looks at what it is going to read, and so do other readers."""
    folders = storage.join(root, FOLDER), storage.join(root, claims.FOLDER, claims.RUNS)
    names = ((folder, name) for folder in folders for name in storage.listing(folder))
    return [storage.join(folder, name) for folder, name in names if re.fullmatch(RECORD, name)]


class Wants:
    """What runs want of a store, each of whose manifests is read once."""

    def __init__(self, store: Store):
        self._look = Look(store.root)

    def of(self, found: Iterable[Run]) -> set[Name]:
        """The artifacts that some runs want, with all that those were made from."""
        names = set[Name]()
        waiting = [name for run in found for name in self._asked(run.record)]
        while waiting:
            name = waiting.pop()
            if name not in names:
                names.add(name)
                artifact = self._look.find(*name)
                waiting += artifact.manifest["parents"].items() if artifact else ()
        return names

    def _asked(self, record: dict[str, Any]) -> list[Name]:
        """What a run asked for or named by path, and the images that its unfinished download may take over."""
        names = asked_for(record)
        found = list(names.items())
        for path in record["paths"]:  # of any root: this one may have been moved since
            found += re.findall(f"/artifacts/([^/]+)/({DIGEST})(?=/|$)", path)
        if "images" in names and self._look.find("images", names["images"]) is None:
            earlier = (images.manifest for images in self._look.finished("images"))
            metadata = names.get("metadata")
            found += [("images", it["fingerprint"]) for it in earlier if it["parents"].get("metadata") == metadata]
        return found


def asked_for(record: Mapping[str, Any]) -> dict[str, str]:
    """What a run asked for, artifact -> fingerprint; earlier versions told only of what they built."""
    built = {name: step["artifact"].rpartition("/")[2] for name, step in record["steps"].items()}
    return {**built, **record["fingerprints"]}


def record_of(told: dict[str, Any]) -> dict[str, Any]:
    """A record that tells what its run wants; KeyError, TypeError or ValueError for another."""
    record = {"steps": {}, "fingerprints": {}, "paths": [], "process": {}, **told, "id": str(told["id"])}
    json_files.of(Record, record)
    times = [datetime.fromisoformat(told[key]) for key in ("started", "ended") if key in told or key == "started"]
    if any(time.tzinfo is None for time in times):
        raise ValueError("its times are of no time zone")
    return record


def _reader(name: str, owner: claims.Owner) -> Run:
    """Who reads without being a run, as a run that wants just that."""
    now = datetime.now(UTC)
    record = {"id": name, "user": owner.user, "command": owner.doing, "started": now.isoformat(), "outcome": "running"}
    return Run(record_of({**record, "paths": list(owner.reads)}), True, now)


def _run(root: str, record: dict[str, Any], at_work: bool) -> Run:
    if record["outcome"] == "running":
        process = ProcessId.of(record["process"])
        at_work = at_work or (process.is_local and not process.is_dead())
    if at_work:  # a training may take longer than the days that somebody asks for
        return Run(record, True, datetime.now(UTC))
    ended = record.get("ended", record["started"])
    last = ledger.last_sign(root, record["id"]) if "ended" not in record else None
    return Run(record, False, datetime.fromtimestamp(last, UTC) if last else datetime.fromisoformat(ended))
