"""The ledger added up: by step, and of any leases, such as those of a run."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.store import ledger
from pipeline.store.ledger import CPU, Lease
from pipeline.store.phases import PHASES, REPEATED, STEPS


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
        gpus = {kind: seconds for kind, seconds in self.device_seconds_by_kind.items() if kind != CPU}
        return gpus or self.device_seconds_by_kind


@dataclass(frozen=True)
class Totals:
    """The whole ledger by (step, fingerprint), and how many lines a crash left incomplete."""

    steps: dict[tuple[str, str], StepHours]
    torn_lines: int


@dataclass(frozen=True)
class Spent:
    """What some leases have cost, device-seconds of those that count.

    `phases` sum to `total`. `failed` is what attempts cost that failed, `repeated` what was spent on doing steps again,
    `discarded` what earlier builds cost of artifacts that were built anew. `queued_s` are seconds in which devices were
    waited for; they cost nothing. `goodput` is the share of the steps that lasted. `cost`, in the currency of
    `cluster.price_per_hour`, is of the `priced` part alone, `joules` of the `measured` one; None where there is none.
    """

    total: float
    phases: dict[str, float]
    by_kind: dict[str, float]
    failed: float
    repeated: float
    discarded: float
    queued_s: float
    goodput: float | None
    cost: float | None
    priced: float = 0.0
    joules: float | None = None
    measured: float = 0.0

    @property
    def money(self) -> str | None:
        """The cost in words, with what had no price; None where nothing had one."""
        if self.cost is None:
            return None
        rest = (self.total - self.priced) / 3600
        without = f" (of {rest:.4g} device-hours no price was told)" if round(rest, 6) else ""
        return f"cost {self.cost:,.2f} by cluster.price_per_hour{without}"

    def as_hours(self) -> dict[str, Any]:
        """The same in hours, as JSON values."""
        told = {name: getattr(self, name) / 3600 for name in ("total", "failed", "repeated", "discarded")}
        told["queued"] = self.queued_s / 3600
        split = {
            name: {key: value / 3600 for key, value in getattr(self, name).items()} for name in ("phases", "by_kind")
        }
        energy = {"joules": self.joules, "measured": self.measured / 3600}
        cost = {"cost": self.cost, "priced": self.priced / 3600}
        return told | split | energy | cost | {"goodput": self.goodput}


def totals(root: str) -> Totals:
    """Read every writer's file below a root and add it up."""
    leases, torn = ledger.read(root)
    return Totals(by_step(leases), torn)


def by_step(leases: Iterable[Lease]) -> dict[tuple[str, str], StepHours]:
    """Add up leases by (step, fingerprint)."""
    return {key: _step_hours(group) for key, group in grouped(leases).items()}


def grouped(leases: Iterable[Lease]) -> dict[tuple[str, str], list[Lease]]:
    """Leases by (step, fingerprint)."""
    found: defaultdict[tuple[str, str], list[Lease]] = defaultdict(list)
    for lease in leases:
        found[lease.step, lease.fingerprint].append(lease)
    return dict(found)


def _step_hours(leases: Sequence[Lease]) -> StepHours:
    by_kind = _by_kind(leases)
    return StepHours(
        leases[0].step,
        leases[0].fingerprint,
        attempts=len({lease.attempt for lease in leases}),
        failed_attempts=len({lease.attempt for lease in leases if has_failed(lease)}),
        estimated=any(lease.outcome in ("open", "killed") for lease in leases),
        device_seconds_by_kind={kind: seconds for kind, seconds in by_kind.items() if seconds} or by_kind,
    )


def _try_of(lease: Lease) -> tuple[str, str, str | None, str]:
    """What was tried, and when: an artifact's attempt, which may hold several leases."""
    return lease.step, lease.fingerprint, lease.about.output, lease.attempt


def has_failed(lease: Lease) -> bool:
    """Whether it ended with an error or was killed."""
    return lease.outcome in ("failed", "killed")


def spent(leases: Iterable[Lease]) -> Spent:
    """What some leases have cost in all."""
    told = list(leases)
    counted = [lease for lease in told if lease.counts]
    phases = {phase: sum(lease.phases.get(phase, 0.0) for lease in counted) for phase in PHASES}
    total = sum(phases.values())
    lasting = sum(lease.phases.get(STEPS, 0.0) for lease in counted if lease.lasting)
    priced = [lease for lease in counted if lease.about.price is not None]
    failed = {_try_of(lease) for lease in told if has_failed(lease)}
    of_failed = [lease for lease in counted if _try_of(lease) in failed]
    return Spent(
        total=total,
        phases={phase: seconds for phase, seconds in phases.items() if seconds},
        by_kind={kind: seconds for kind, seconds in _by_kind(told).items() if seconds},
        failed=_device_seconds(of_failed),
        repeated=phases[REPEATED],
        discarded=_device_seconds(lease for lease in counted if not lease.lasting),
        queued_s=sum(lease.queued_s for lease in told),
        goodput=lasting / total if total and phases[STEPS] else None,
        cost=sum(_cost(lease) for lease in priced) if priced else None,
        priced=_device_seconds(priced),
        joules=sum(joules) if (joules := [lease.joules for lease in counted if lease.joules is not None]) else None,
        measured=_device_seconds(lease for lease in counted if lease.joules is not None),
    )


def _device_seconds(leases: Iterable[Lease]) -> float:
    return sum(sum(lease.phases.values()) for lease in leases)


def _cost(lease: Lease) -> float:
    assert lease.about.price is not None
    return lease.about.price * _device_seconds([lease]) / 3600


def _by_kind(leases: Iterable[Lease]) -> dict[str, float]:
    """Device-seconds by kind; 0 of one that was waited for, or held for less than the ledger's milliseconds."""
    found: defaultdict[str, float] = defaultdict(float)
    for lease in leases:
        found[lease.kind] += sum(lease.phases.values())
    return dict(found)


def overlapping(leases: Iterable[Lease]) -> float:
    """Device-seconds that leases held beyond what their machine or cluster has: two runs beside each other on it.

    By wall clocks, and only of leases that tell where they were, and how much room there is.
    """
    events: defaultdict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    rooms: dict[tuple[str, str], float] = {}
    for lease in leases:
        if lease.about.where is not None and lease.about.room is not None:
            key, (begun, ended) = (lease.about.where, lease.kind), lease.held
            rooms[key] = max(rooms.get(key, 0.0), lease.about.room)
            events[key] += [(begun, lease.devices), (ended, -lease.devices)]
    beyond = 0.0
    for key, moments in events.items():
        held, since = 0.0, 0.0
        for moment, change in sorted(moments):
            beyond += max(0.0, held - rooms[key]) * (moment - since)
            held, since = held + change, moment
    return beyond
