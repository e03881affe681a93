"""What a run costs, while it goes on: an account for the build of each step, and the budget of all."""

import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from pipeline.errors import BudgetSpent
from pipeline.hours.spent import spent
from pipeline.plan.dag import Planned
from pipeline.store import ledger
from pipeline.store.ledger import CPU, About, Held, Lease, Writer


class Account:
    """The leases of one step's build: those of runs before, and the ones of this run, which it opens.

    Args:
        writer: this run's part of the ledger.
        step, fingerprint, about: of the build.
        before: its leases in runs before.
        room: how many devices the cluster has at the moment.
    """

    def __init__(
        self,
        writer: Writer,
        step: str,
        fingerprint: str,
        about: About,
        before: Sequence[Lease] = (),
        room: Callable[[], float | None] = lambda: None,
    ):
        self.about = about
        self._room = room
        self._writer, self._step, self._fingerprint = writer, step, fingerprint
        self._before = spent(before).by_kind
        self._held: list[Held] = []

    @contextmanager
    def lease(self, devices: float, kind: str, *, queued: bool = False) -> Iterator[Held]:
        """See `Writer.lease`."""
        names = self._step, self._fingerprint, devices, kind, replace(self.about, room=self._room())
        with self._writer.lease(*names, queued=queued) as held:
            self._held.append(held)
            yield held

    def of_build(self) -> float:
        """Device-seconds of the build so far, of all runs."""
        own = self._own()
        return _counted({kind: self._before.get(kind, 0.0) + own.get(kind, 0.0) for kind in {*self._before, *own}})

    def of_run(self) -> float:
        """Device-seconds of this run's part of the build."""
        return _counted(self._own())

    def _own(self) -> dict[str, float]:
        found = dict.fromkeys((held.kind for held in self._held), 0.0)
        for held in self._held:
            found[held.kind] += held.devices * held.seconds
        return found


class Books:
    """The accounts of a run.

    Args:
        root, run: where its part of the ledger lies, and its id.
        about: what its leases have in common.
        planned: (step, fingerprint) of all that the budget is for, also what runs before have built.
        budget: device-hours, of all runs; None: as many as it takes.
        room: how many devices the cluster has at the moment.
    """

    def __init__(
        self,
        root: str,
        run: str,
        about: About,
        planned: Collection[tuple[str, str]],
        budget: float | None = None,
        room: Callable[[], float | None] = lambda: None,
    ):
        self._room = room
        self._root, self._run, self._about, self._budget = root, run, about, budget
        self._writer = Writer(root, run)
        self._accounts: list[Account] = []
        before = [lease for lease in ledger.read(root)[0] if (lease.step, lease.fingerprint) in planned]
        self._before = spent(before).total

    def open(self, item: Planned) -> Account:
        """The account of a step's build: the one that was begun, where the run goes on from that, or a new one."""
        step, fingerprint = item.step, item.fingerprint
        wanted = step.name, fingerprint.digest
        ours = [it for it in self.leases() if (it.step, it.fingerprint) == wanted and it.may_be_of(step.output)]
        going_on = item.state == "resume"
        begun = (lease.about.build for lease in ours if lease.lasting and lease.about.build)
        build = (next(begun, None) if going_on else None) or uuid.uuid4().hex
        about = replace(self._about, build=build, output=step.output, parents=fingerprint.parents)
        before = [lease for lease in ours if lease.about.build == build or (going_on and lease.about.build is None)]
        self._accounts.append(Account(self._writer, step.name, fingerprint.digest, about, before, self._room))
        return self._accounts[-1]

    def leases(self) -> list[Lease]:
        """All that the root's ledger has."""
        return ledger.read(self._root)[0]

    def of_run(self) -> list[Lease]:
        """What it has of this run."""
        return [lease for lease in self.leases() if lease.run == self._run]

    def over_budget(self) -> BudgetSpent | None:
        """Why the run should end, if its budget is used up."""
        hours = (self._before + sum(account.of_run() for account in self._accounts)) / 3600
        return BudgetSpent(hours, self._budget) if self._budget is not None and hours >= self._budget else None


def _counted(by_kind: Mapping[str, float]) -> float:
    """Of GPUs where there were any, else of CPUs, as `StepHours` counts."""
    gpus = [seconds for kind, seconds in by_kind.items() if kind != CPU]
    return sum(gpus or by_kind.values())
