"""Device-hours: which step held how many devices for how long, kept so that a crash costs seconds of it.

    <root>/ledger/<writer>.jsonl     a lease's latest line of each event; one file per writing process, never shared

A lease is a number of devices reserved for a step, busy or not. `lease_open` starts it, a `heartbeat` follows
every ten seconds, `lease_close` ends it. A process that is killed leaves no closing line; its lease ends at
the last heartbeat and is marked as estimated. While its devices are still waited for, a lease holds nothing.
These files are the truth; MLflow and the last screen show it.
"""

import contextlib
import json
import logging
import re
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from datasets.files import json_files, notices, storage
from datasets.files.json_files import NUMBER
from pipeline.errors import STOPPED, Grows
from pipeline.store.phases import Phases, split

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
REMOTE_HEARTBEAT_S = 60.0  # on an object store each heartbeat is an upload
WRITERS = r"[^.][^/]*\.jsonl"  # names of files
LATEST = 2.5e11  # Unix time, s: the last years that a date can have
MOST = 1e15  # seconds or joules, of one lease
CPU = "cpu"  # the kind of device of what runs on CPUs, also where there are GPUs


@dataclass(frozen=True)
class About:
    """What a lease's first line says beside its step and devices, as far as it is known.

    `build` names the build of the artifact, over all runs that go on with it; `output` and `parents` are its name and
    the fingerprints of what it is made from. `where` names the machine or cluster that has `room` devices of the kind,
    `price` is that of a device-hour.
    """

    build: str | None = None
    output: str | None = None
    parents: Mapping[str, str] = field(default_factory=dict)
    where: str | None = None
    room: float | None = None
    price: float | None = None


class Held:
    """A lease while it lasts: what it holds, and where the time goes."""

    def __init__(self, devices: float, kind: str, queued: bool) -> None:
        self.devices, self.kind = devices, kind
        self.phases = Phases()
        self.joules: dict[int, float] = {}  # of the training that goes on, by node
        self._begun = time.monotonic()
        self._since = None if queued else self._begun
        self._ended: float | None = None

    def begin(self, before_s: float = 0.0) -> None:
        """The devices are there, and have been for some seconds; nothing where that was said before."""
        if self._since is None:
            self._since = max(self._begun, time.monotonic() - before_s)

    def end(self) -> None:
        """The devices are given back."""
        self._ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """For how long the devices have been held."""
        return 0.0 if self._since is None else (self._ended or time.monotonic()) - self._since

    def line(self) -> dict[str, Any]:
        """What each of the lease's lines tells of the time."""
        now = self._ended or time.monotonic()
        since = now if self._since is None else self._since
        queued = {"queued_s": round(since - self._begun, 3)} if since > self._begun else {}
        told = self.phases.told()
        energy = {"joules": round(sum(self.joules.values()))} if self.joules else {}
        return {"held_s": round(now - since, 3), **queued, **({"phases": told} if told else {}), **energy}


class Writer:
    """One process's part of the ledger.

    Args:
        root: storage root, a local path or a URI.
        name: unique among all processes that ever write there.
        heartbeat_s: seconds between heartbeats; 10 on a local root, 60 on a remote one.
    """

    def __init__(self, root: str, name: str, heartbeat_s: float | None = None):
        self._path = storage.join(root, "ledger", f"{name}.jsonl")
        self._heartbeat_s = heartbeat_s or (REMOTE_HEARTBEAT_S if storage.is_remote(root) else HEARTBEAT_S)
        self._name = name
        self._failures: Counter[tuple[str, str]] = Counter()
        self._latest: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def lease(
        self,
        step: str,
        fingerprint: str,
        devices: float,
        kind: str,
        about: About | None = None,
        *,
        queued: bool = False,
    ) -> Iterator[Held]:
        """Account for devices of a kind ("cuda:<name>" or "cpu"; fractions count as such) during the block.

        Those that are `queued` for are not there yet: they count from `Held.begin`. The leases of a step belong to one
        attempt until one of them fails; the next begins another attempt.

        Raises:
            OSError: the opening line cannot be written. Of later lines it is only a warning, since the ledger
                must not end a training; the lease then ends at the last line that was written.
        """
        identity = {
            "lease": uuid.uuid4().hex[:12],
            "attempt": f"{self._name}/{self._failures[step, fingerprint]}",
        }
        held = Held(devices, kind, queued)

        def record(event: str, **fields: Any) -> None:
            self._write({"event": event, **identity, **held.line(), "time": round(time.time(), 3), **fields})

        told = {name: value for name, value in vars(about or About()).items() if value not in (None, {})}
        record("lease_open", step=step, fingerprint=fingerprint, devices=devices, kind=kind, **told)
        outcome = "failed"
        try:
            with self._beating(record):
                yield held
            outcome = "done"
        except (*STOPPED, Grows):
            outcome = "interrupted"
            raise
        finally:
            held.end()
            self._failures[step, fingerprint] += outcome != "done"
            _or_warn(record, "lease_close", outcome=outcome)

    @contextlib.contextmanager
    def _beating(self, record: Callable[..., None]) -> Iterator[None]:
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self._heartbeat_s):
                _or_warn(record, "heartbeat")

        thread = threading.Thread(target=beat, name="ledger", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _write(self, event: dict[str, Any]) -> None:
        with self._lock:  # the latest line of each event is enough of a lease, however many weeks it lasts
            self._latest[event["lease"], event["event"]] = json.dumps(event) + "\n"
            storage.publish("".join(self._latest.values()).encode(), self._path)


@dataclass(frozen=True)
class Lease:
    """A lease as its lines tell it.

    `seconds` are wall seconds by phase. `outcome` is done, failed, interrupted, killed (no closing line, though its
    step went on without it) or open (none yet: at work, or killed). Of a step that held GPUs its leases of CPUs do not
    `count`: they are small change, which stays in the table but is not added. What a lease of an earlier build made was
    thrown away: it is not `lasting`.
    """

    step: str
    fingerprint: str
    attempt: str
    opened: float  # Unix time
    kind: str
    devices: float
    seconds: Mapping[str, float]
    queued_s: float
    outcome: str
    about: About
    joules: float | None = None  # of its devices, where NVML told
    counts: bool = True
    lasting: bool = True

    @property
    def run(self) -> str:
        """The writer of its lines, which is the run."""
        return self.attempt.rpartition("/")[0]

    def may_be_of(self, output: str | None) -> bool:
        """Whether it was held for an artifact of its step: each of several, as of prompt sets, is built by itself.

        Earlier versions did not say of which.
        """
        return output is None or self.about.output in (None, output)

    @property
    def phases(self) -> dict[str, float]:
        """Device-seconds by phase."""
        return {phase: self.devices * seconds for phase, seconds in self.seconds.items()}

    @property
    def held(self) -> tuple[float, float]:
        """Unix times between which the devices were held, by the clock of when it was opened."""
        begun = self.opened + self.queued_s
        return begun, begun + sum(self.seconds.values())


def read(root: str) -> tuple[list[Lease], int]:
    """Every lease below a root, and how many lines a crash left incomplete."""
    folder = storage.join(root, "ledger")
    names = storage.listing(folder)
    ours = [name for name in names if re.fullmatch(WRITERS, name)]
    for other in set(names) - set(ours):
        notices.tell(notices.PassedOver(storage.join(folder, other), "none of our files"))
    contents = storage.read_all([storage.join(folder, name) for name in ours])
    events = [event for content in contents for event in json_files.lines(content, _event)]
    return leases(filter(None, events)), events.count(None)


def leases(events: Iterable[Mapping[str, Any]]) -> list[Lease]:
    """The leases that events tell of, by step and fingerprint; neither their order nor repetitions matter.

    One whose opening line was torn is left out: nobody knows whose it was.
    """
    by_lease: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        by_lease[event["lease"]].append(event)
    by_step: defaultdict[tuple[str, str], list[Lease]] = defaultdict(list)
    for _, group in sorted(by_lease.items()):
        if lease := _fold(group):
            by_step[lease.step, lease.fingerprint].append(lease)
    return [lease for _, group in sorted(by_step.items()) for lease in _judged(group)]


def _fold(events: Sequence[Mapping[str, Any]]) -> Lease | None:
    opening = next((event for event in events if event["event"] == "lease_open"), None)
    closing = next((event for event in events if event["event"] == "lease_close"), None)
    if opening is None:
        return None
    # Until its devices are there a lease counts all as waiting; then it knows since when they were.
    latest = max(events, key=lambda event: (event["held_s"], event.get("queued_s", 0.0)))
    told: defaultdict[str, float] = defaultdict(float)
    for event in events:
        for phase, seconds in event.get("phases", {}).items():
            told[phase] = max(told[phase], seconds)
    return Lease(
        step=opening["step"],
        fingerprint=opening["fingerprint"],
        attempt=opening["attempt"],
        opened=opening["time"],
        kind=opening["kind"],
        devices=opening["devices"],
        seconds=split(latest["held_s"], told),
        queued_s=latest.get("queued_s", 0.0),
        outcome=closing["outcome"] if closing else "open",
        joules=max((event["joules"] for event in events if "joules" in event), default=None),
        about=About(**{known.name: opening[known.name] for known in fields(About) if known.name in opening}),
    )


def _judged(group: Sequence[Lease]) -> Iterator[Lease]:
    """The leases of one step, with what only all of them tell."""
    gpus = any(lease.kind != CPU for lease in group)
    in_order = sorted(group, key=lambda lease: lease.opened)
    outputs = {lease.about.output for lease in group}
    newest = {output: [lease for lease in in_order if lease.may_be_of(output)][-1] for output in outputs}
    for lease in group:
        latest = newest[lease.about.output]
        # One run at a time builds an artifact, so whatever is open and has a successor was killed.
        killed = lease.outcome == "open" and lease.attempt != latest.attempt
        yield replace(
            lease,
            outcome="killed" if killed else lease.outcome,
            counts=lease.kind != CPU or not gpus,
            lasting=lease.about.build in (None, latest.about.build),  # earlier versions did not say
        )


def last_sign(root: str, name: str) -> float | None:
    """Unix time of a writer's latest line: while it held devices, at most a heartbeat old; None without any."""
    path = storage.join(root, "ledger", f"{name}.jsonl")
    content = storage.read(path) if storage.exists(path) else b""
    times = [time for time in json_files.lines(content, lambda told: float(told["time"])) if time]
    return max((time for time in times if time < LATEST), default=None)


def _event(told: dict[str, Any]) -> dict[str, Any]:
    """An event as it was written; KeyError, TypeError or ValueError where it is none."""
    json_files.require(told, str, "lease", "event")
    json_files.require(full := {**vars(About()), "phases": {}, **told}, dict, "phases", "parents")
    phases, parents, amounts = full["phases"], full["parents"], {"held_s", *told.keys() & {"queued_s", "joules"}}
    if told["event"] == "lease_open":
        json_files.require(told, str, "step", "fingerprint", "attempt", "kind")
        json_files.require(full, str | None, "build", "output", "where")
        json_files.require(full, NUMBER | None, "room", "price")
        json_files.require(parents, str, *parents)
        amounts.add("devices")
    elif told["event"] == "lease_close":
        json_files.require(told, str, "outcome")
    json_files.require(told, NUMBER, "time", *amounts)
    json_files.require(phases, NUMBER, *phases)
    if not all(0 <= amount < MOST for amount in (*phases.values(), *(told[name] for name in amounts))):
        raise ValueError("it has held less than nothing, or more than there is")
    if not 0 <= told["time"] < LATEST:
        raise ValueError("its time is no Unix time in seconds")
    return told


def _or_warn(record: Callable[..., None], event: str, **fields: Any) -> None:
    """Record an event, but let no failure of the ledger end the work that it accounts for."""
    try:
        record(event, **fields)
    except Exception as error:
        log.warning("the device-hour ledger missed a %s: %s", event, error)
