"""The table of hours of a root: its steps parents first, what each has cost alone and with all that it stands on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pipeline.hours.paper import PAPER, Comparison, compare_with_paper, differs
from pipeline.hours.spent import Spent, StepHours, by_step, grouped, overlapping, spent, totals
from pipeline.settings import compose
from pipeline.settings.sections import Interpolation
from pipeline.store import ledger
from pipeline.store.artifacts import Artifact, Store
from pipeline.store.ledger import Lease
from settings import manners
from stages.anatomy.flops import PEAKS

FOREIGN = "it starts from weights whose hours are not in this"
GIVEN = ("compressor", "text")  # sections whose weights come from elsewhere in the paper too


@dataclass(frozen=True)
class Row:
    """A step of one fingerprint, and what it has made: several artifacts where they differ in their prompts alone.
    `lineage` is what it and all that it stands on have cost, and `foreign` says that some of that came from elsewhere,
    with hours of its own; `mfu` is the share of the devices' peak FLOP/s over all of its time, None where nobody knows
    it."""

    hours: StepHours
    output: str | None
    spent: Spent
    lineage: Spent
    foreign: bool
    comparison: Comparison | None
    mfu: float | None


@dataclass(frozen=True)
class Table:
    """All rows, and what the root has cost in all; `overlapping_s`: device-seconds that two leases held at a time."""

    rows: list[Row]
    total: Spent
    torn_lines: int
    overlapping_s: float


def table(root: str) -> Table:
    """The table of a root, from its ledger and manifests."""
    leases, torn = ledger.read(root)
    groups, hours = grouped(leases), by_step(leases)
    made = {artifact.manifest["fingerprint"]: artifact for artifact in Store(root).finished()}
    parents = _parents(leases, made)
    by_print: dict[str, list[Lease]] = {}
    for (_, digest), group in groups.items():
        by_print.setdefault(digest, []).extend(group)
    opened = {key: min(lease.opened for lease in group) for key, group in groups.items()}
    begun = sorted(groups, key=lambda key: opened[key])
    places = {digest: place for place, digest in enumerate(parents_first((digest for _, digest in begun), parents))}
    rows = [
        _row(hours[key], groups[key], made, parents, by_print) for key in sorted(begun, key=lambda key: places[key[1]])
    ]
    return Table(rows, spent(leases), torn, overlapping(leases))


def _parents(leases: Sequence[Lease], made: Mapping[str, Artifact]) -> dict[str, list[str]]:
    """Fingerprints of what each fingerprint is made from, as manifests and leases tell."""
    found = {lease.fingerprint: list(lease.about.parents.values()) for lease in leases if lease.about.parents}
    return found | {digest: list(artifact.manifest["parents"].values()) for digest, artifact in made.items()}


def parents_first(begun: Iterable[str], parents: Mapping[str, Iterable[str]]) -> list[str]:
    """Those that were begun and all that they stand on, parents first; of those that do not depend on each other the
    one that was begun first."""
    found: dict[str, None] = {}

    def visit(one: str) -> None:
        if one not in found:
            for parent in parents.get(one, ()):
                visit(parent)
            found[one] = None

    for one in begun:
        visit(one)
    return list(found)


def lineage(digest: str, parents: Mapping[str, Sequence[str]]) -> set[str]:
    """A fingerprint and those of all that it stands on."""
    found, waiting = set[str](), [digest]
    while waiting:
        if (one := waiting.pop()) not in found:
            found.add(one)
            waiting += parents.get(one, ())
    return found


def _row(
    hours: StepHours,
    group: Sequence[Lease],
    made: Mapping[str, Artifact],
    parents: Mapping[str, Sequence[str]],
    by_print: Mapping[str, Sequence[Lease]],
) -> Row:
    stands_on = lineage(hours.fingerprint, parents)
    artifact = made.get(hours.fingerprint)
    outputs = sorted({lease.about.output for lease in group if lease.about.output})
    return Row(
        hours,
        ", ".join(outputs) or (artifact.name if artifact else None),
        spent(group),
        lineage=spent(lease for digest in sorted(stands_on) for lease in by_print.get(digest, ())),
        foreign=any(_is_foreign(made[digest].manifest) for digest in stands_on if digest in made),
        comparison=_compared(hours, artifact),
        mfu=_mfu(artifact, hours),
    )


def sentences(rows: Iterable[Row]) -> list[str]:
    """Trainings beside the paper's, and what weights cost elsewhere, as far as rows need words."""
    rows = list(rows)
    return [str(row.comparison) for row in rows if row.comparison] + [
        f"{row.hours.step}: {FOREIGN}"
        for row in rows
        if row.foreign and row.hours.step.startswith(("train_", "interpolate"))
    ]


def beside_paper(root: str, made: Iterable[Artifact]) -> list[str]:
    """Trainings of a root beside the paper's, in words, where they are the same."""
    spent = totals(root).steps
    keys = {(artifact.manifest["step"], artifact.manifest["fingerprint"]): artifact for artifact in made}
    found = [_compared(spent[key], artifact) for key, artifact in keys.items() if key in spent]
    return [str(comparison) for comparison in found if comparison and comparison.why_not is None]


def _compared(hours: StepHours, artifact: Artifact | None) -> Comparison | None:
    return compare_with_paper(hours, _why_not(hours.step, artifact))


def _why_not(step: str, artifact: Artifact | None) -> str | None:
    """What keeps a training from being the paper's, if anything does."""
    if step not in PAPER:
        return None
    if artifact is None:
        return "it is not finished"
    if _is_foreign(artifact.manifest):
        return FOREIGN
    return differs(step, artifact.manifest["settings"], _papers())


@cache
def _papers() -> dict[str, Any]:
    """The settings of the paper's trainings."""
    loaded = compose.load("stage_c", ["scale=paper", "data.metadata=none.parquet"])  # nobody reads the pictures
    return loaded.model_dump(mode="json", exclude=manners(loaded))


def _is_foreign(manifest: Mapping[str, Any]) -> bool:
    """Whether an artifact is existing weights, lies between such, or is a training that starts from them.

    The compressor's ImageNet ones and text towers do not count, as in the paper.
    """
    counted = {key: value for key, value in manifest["settings"].items() if key.partition(".")[0] not in GIVEN}
    sections = [value for value in counted.values() if isinstance(value, dict)]
    between = counted.get("interpolate")
    return (
        manifest["step"].startswith("import_")
        or any(section.get("weights") for section in sections)
        or bool(between and Interpolation(**between).paths)
    )


def _mfu(artifact: Artifact | None, hours: StepHours) -> float | None:
    flops = artifact.manifest.get("metrics", {}).get("model_flops") if artifact else None
    peak = peak_of(hours.kind)
    return flops / (peak * hours.device_seconds) if flops and peak and hours.device_seconds else None


def peak_of(kind: str) -> float | None:
    """Dense bf16 FLOP/s of a kind of device, as torch calls it, or Ray, whose name may leave open which of several."""
    _, _, name = kind.partition("cuda:")
    if name in PEAKS:
        return PEAKS[name]
    model = name.removeprefix("NVIDIA ").split("-")[0].split(" ")[0]
    found = {peak for card, peak in PEAKS.items() if model and card.removeprefix("NVIDIA ").startswith(model)}
    return found.pop() if len(found) == 1 and "+" not in kind else None
