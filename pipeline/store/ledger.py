"""Device-hours: which step held how many devices for how long, kept so that a crash costs seconds of it.

    <root>/ledger/<writer>.jsonl     one line per event; one file per writing process, never shared

A lease is a number of devices reserved for a step, busy or not. `lease_open` starts it, a `heartbeat` follows
every ten seconds, `lease_close` ends it. A process that is killed leaves no closing line; its lease ends at
the last heartbeat and is marked as estimated. These files are the truth; MLflow and the last screen show it.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from datasets.files import json_files, notices, storage
from pipeline.errors import Interrupted

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
REMOTE_HEARTBEAT_S = 60.0  # on an object store each heartbeat is an upload
REFERENCES = Path(__file__).parents[2] / "conf" / "reference" / "gpu_hours.yaml"
WRITERS = r"[^.][^/]*\.jsonl"  # names of files
CPU_UNIT = "cpu-hours, not comparable to A100-hours"


class Writer:
    """One process's part of the ledger.

    Args:
        root: storage root, a local path or a URI.
        name: unique among all processes that ever write there.
        heartbeat_s: seconds between heartbeats; 10 on a local root, 60 on a remote one.
    """

    def __init__(self, root: str, name: str, heartbeat_s: float | None = None):
        self._path = storage.join(root, "ledger", f"{name}.jsonl")
        self._remote = storage.is_remote(root)
        self._heartbeat_s = heartbeat_s or (REMOTE_HEARTBEAT_S if self._remote else HEARTBEAT_S)
        self._name = name
        self._failures: Counter[tuple[str, str]] = Counter()
        self._latest: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def lease(self, step: str, fingerprint: str, devices: float, kind: str) -> Iterator[None]:
        """Account for devices of a kind ("cuda:<name>" or "cpu"; fractions count as such) during the block.

        The leases of a step belong to one attempt until one of them fails; the next begins another attempt.

        Raises:
            OSError: the opening line cannot be written. Of later lines it is only a warning, since the ledger
                must not end a training; the lease then ends at the last line that was written.
        """
        identity = {
            "lease": uuid.uuid4().hex[:12],
            "attempt": f"{self._name}/{self._failures[step, fingerprint]}",
        }
        begun = time.monotonic()

        def record(event: str, **fields: Any) -> None:
            held = round(time.monotonic() - begun, 3)
            self._write({"event": event, **identity, "held_s": held, "time": round(time.time(), 3), **fields})

        record("lease_open", step=step, fingerprint=fingerprint, devices=devices, kind=kind)
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self._heartbeat_s):
                _or_warn(record, "heartbeat")

        thread = threading.Thread(target=beat, name="ledger", daemon=True)
        thread.start()
        outcome = "failed"
        try:
            yield
            outcome = "done"
        except (Interrupted, KeyboardInterrupt):
            outcome = "interrupted"
            raise
        finally:
            stop.set()
            thread.join()
            self._failures[step, fingerprint] += outcome != "done"
            _or_warn(record, "lease_close", outcome=outcome)

    def _write(self, event: dict[str, Any]) -> None:
        line = json.dumps(event) + "\n"
        with self._lock:
            if self._remote:  # objects cannot be appended to: ours holds each lease's latest line of each event
                self._latest[event["lease"], event["event"]] = line
                storage.publish("".join(self._latest.values()).encode(), self._path)
            else:
                storage.append(line, self._path)


@dataclass(frozen=True)
class StepHours:
    """What one step, with one fingerprint, has cost so far, over all its attempts.

    `failed_attempts` ended with an error or were killed (an interruption with a clean save is no failure).
    `estimated` says that some attempt has no closing line: it was killed, or is the latest and still running;
    its time counts up to its last heartbeat.
    """

    step: str
    fingerprint: str
    attempts: int
    failed_attempts: int
    estimated: bool
    device_seconds_by_kind: dict[str, float]

    @property
    def device_seconds(self) -> float:
        """Devices reserved times wall seconds: of the GPUs where the step held any, else of the CPUs."""
        return sum(self._counted.values())

    @property
    def kind(self) -> str:
        """The kind of device that counts; kinds joined by a plus where attempts ran on different ones."""
        return " + ".join(sorted(self._counted))

    @property
    def _counted(self) -> dict[str, float]:
        """CPU-seconds beside GPU-seconds are small change: they stay in the table, but are not added to them."""
        gpus = {kind: seconds for kind, seconds in self.device_seconds_by_kind.items() if kind != "cpu"}
        return gpus or self.device_seconds_by_kind


@dataclass(frozen=True)
class Totals:
    """The whole ledger by (step, fingerprint), and how many lines a crash left incomplete."""

    steps: dict[tuple[str, str], StepHours]
    torn_lines: int


@dataclass(frozen=True)
class Comparison:
    """Our hours of a training beside the paper's; `ratio` is ours / theirs where both are A100-hours."""

    step: str
    hours: float
    unit: str
    paper_hours: float
    ratio: float | None

    def __str__(self) -> str:
        share = "" if self.ratio is None else f" ({self.ratio:.2g} of the paper's)"
        return f"{self.step}: {self.hours:.4g} {self.unit}{share}; paper: {self.paper_hours:,.0f} A100-hours"


def totals(root: str) -> Totals:
    """Read every writer's file below a root and add it up."""
    folder = storage.join(root, "ledger")
    names = storage.listing(folder)
    ours = [name for name in names if re.fullmatch(WRITERS, name)]
    for other in set(names) - set(ours):
        notices.tell(notices.PassedOver(storage.join(folder, other), "none of our files"))
    contents = storage.read_all([storage.join(folder, name) for name in ours])
    events = [event for content in contents for event in json_files.lines(content, _event)]
    return Totals(reduce_events(filter(None, events)), events.count(None))


def last_sign(root: str, name: str) -> float | None:
    """Unix time of a writer's last whole line: while it held devices, at most a heartbeat old; None without any."""
    path = storage.join(root, "ledger", f"{name}.jsonl")
    content = storage.read(path) if storage.exists(path) else b""
    times = [time for time in json_files.lines(content, lambda told: float(told["time"])) if time]
    return times[-1] if times else None


def _event(told: dict[str, Any]) -> dict[str, Any]:
    """An event as it was written; KeyError where it is none."""
    needed = {"lease", "event", "held_s", "time"}
    if told["event"] == "lease_open":
        needed |= {"step", "fingerprint", "attempt", "devices", "kind"}
    if missing := needed - told.keys():
        raise KeyError(*missing)
    return told


def reduce_events(events: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], StepHours]:
    """Add up events by (step, fingerprint); neither their order nor repetitions matter."""
    by_lease: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        by_lease[event["lease"]].append(event)
    by_step: defaultdict[tuple[str, str], list[_Lease]] = defaultdict(list)
    for _, group in sorted(by_lease.items()):
        if lease := _fold(group):
            by_step[lease.step, lease.fingerprint].append(lease)
    return {key: _add_up(leases) for key, leases in sorted(by_step.items())}


def compare_with_paper(spent: StepHours, references: Path = REFERENCES) -> Comparison | None:
    """A training beside the same model's in the paper (Stage C: 24,602); None where that reports nothing."""
    model = {
        "train_a": ("Würstchen", "A"),
        "train_b": ("Würstchen", "B"),
        "train_c": ("Würstchen", "C"),
        "train_baseline": ("Baseline LDM", None),
    }.get(spent.step)
    rows = yaml.safe_load(references.read_text("utf-8"))["rows"]
    paper = [row["gpu_hours"] for row in rows if (row["model"], row["stage"]) == model]
    if not paper or paper[0] is None:
        return None
    hours, unit = spent.device_seconds / 3600, hours_unit(spent.kind)
    return Comparison(spent.step, hours, unit, paper[0], hours / paper[0] if unit == "A100-hours" else None)


def hours_unit(kind: str) -> str:
    """What an hour on this kind of device is called, so that nobody compares what cannot be compared."""
    if kind == "cpu":
        return CPU_UNIT
    return "A100-hours" if "A100" in kind and "+" not in kind else f"hours on {kind.removeprefix('cuda:')}"


@dataclass(frozen=True)
class _Lease:
    step: str
    fingerprint: str
    attempt: str
    opened: float  # Unix time
    kind: str
    device_seconds: float
    outcome: str  # done | failed | interrupted | open


def _fold(events: Sequence[Mapping[str, Any]]) -> _Lease | None:
    """One lease from its events; None when its opening line was torn: nobody knows whose it was."""
    opening = next((event for event in events if event["event"] == "lease_open"), None)
    closing = next((event for event in events if event["event"] == "lease_close"), None)
    if opening is None:
        return None
    return _Lease(
        step=opening["step"],
        fingerprint=opening["fingerprint"],
        attempt=opening["attempt"],
        opened=opening["time"],
        kind=opening["kind"],
        device_seconds=opening["devices"] * max(event["held_s"] for event in events),
        outcome=closing["outcome"] if closing else "open",
    )


def _add_up(leases: Sequence[_Lease]) -> StepHours:
    # One run at a time builds an artifact, so whatever is open and has a successor was killed.
    latest = max(leases, key=lambda lease: lease.opened).attempt
    failed = {
        lease.attempt
        for lease in leases
        if lease.outcome == "failed" or (lease.outcome == "open" and lease.attempt != latest)
    }
    seconds: defaultdict[str, float] = defaultdict(float)
    for lease in leases:
        seconds[lease.kind] += lease.device_seconds
    return StepHours(
        leases[0].step,
        leases[0].fingerprint,
        attempts=len({lease.attempt for lease in leases}),
        failed_attempts=len(failed),
        estimated=any(lease.outcome == "open" for lease in leases),
        device_seconds_by_kind=dict(seconds),
    )


def _or_warn(record: Callable[..., None], event: str, **fields: Any) -> None:
    """Record an event, but let no failure of the ledger end the work that it accounts for."""
    try:
        record(event, **fields)
    except Exception as error:
        log.warning("the device-hour ledger missed a %s: %s", event, error)
