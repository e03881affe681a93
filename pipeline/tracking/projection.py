"""What MLflow shows of the hours: a projection of the ledger, which can be made anew at any time.

A run of a command has the hours of its own leases. The run of a step has those of its build, over all commands that
went on with it. So the hours of the commands add up to the ledger's, and so do those of the steps.
"""

from collections.abc import Mapping, Sequence

from pipeline.hours.spent import grouped, spent
from pipeline.store import phases
from pipeline.store.ledger import Lease

SO_FAR = "hours/so_far"  # device-hours of the build with each entry, so that any curve can be read against cost
KEY = "wst.run"  # the tag that holds our key of a run: of a step's, the build in the ledger
PHASES = tuple(phase for phase in phases.PHASES if phase != phases.REPEATED)  # which is told beside them
NAMES = ("hours/total", "hours/failed", "hours/repeated", "hours/queued", *(f"hours/{phase}" for phase in PHASES))


def hours(tags: Mapping[str, str], parents: Mapping[str, str], leases: Sequence[Lease]) -> dict[str, float]:
    """Metrics of a run, by its tags and those of its parent; none where nothing was ever held for it."""
    found = _of_step(tags, parents, leases) if tags.get("wst.kind") == "step" else _of_command(tags, leases)
    if not found:
        return {}
    cost = spent(found)
    values = {
        "hours/total": cost.total / 3600,
        "hours/failed": cost.failed / 3600,
        "hours/repeated": cost.repeated / 3600,
    }
    if cost.queued_s:
        values["hours/queued"] = cost.queued_s / 3600
    if tags.get("wst.kind") == "step":
        told = {phase: seconds for phase, seconds in cost.phases.items() if phase in PHASES}
        told = told if len(told) > 1 else {}
        return values | {f"hours/{phase}": seconds / 3600 for phase, seconds in told.items()}
    trainings = {step: group for (step, _), group in grouped(found).items() if step.startswith("train_")}
    return values | {f"hours/{step}": spent(group).total / 3600 for step, group in trainings.items()}


def _of_command(tags: Mapping[str, str], leases: Sequence[Lease]) -> list[Lease]:
    return [lease for lease in leases if lease.run == tags.get("wst.invocation")]


def _of_step(tags: Mapping[str, str], parents: Mapping[str, str], leases: Sequence[Lease]) -> list[Lease]:
    """Those of its build; of a ledger that tells no builds, what its command held for it."""
    ours = [lease for lease in leases if lease.about.build and lease.about.build == tags.get(KEY)]
    run, fingerprint = parents.get("wst.invocation"), tags.get("wst.fingerprint")
    return ours or [
        lease for lease in leases if lease.about.build is None and (lease.run, lease.fingerprint) == (run, fingerprint)
    ]
