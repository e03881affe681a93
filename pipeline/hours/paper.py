"""Our hours beside the paper's, and others': only where they can be compared, and else why not."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pipeline.hours.spent import Spent, StepHours
from pipeline.settings.keys import flatten
from pipeline.store.ledger import CPU

REFERENCES = Path(__file__).with_name("gpu_hours.yaml")
CPU_UNIT = "cpu-hours, not comparable to A100-hours"
PAPER = {  # step: the model of the reference, its stage, and what of the step's settings is its parameters and schedule
    "train_a": ("Würstchen", "A", ("stage_a.model", "stage_a.train.phases")),
    "train_b": ("Würstchen", "B", ("stage_b.model", "compressor.model", "stage_b.train.phases")),
    "train_c": ("Würstchen", "C", ("stage_c.model", "stage_c.train.phases")),
    "train_baseline": ("Baseline LDM", None, ("baseline.model", "baseline.train.phases")),
}
JOULES_PER_KWH = 3.6e6
KW, KG_PER_KWH = 0.25, 0.37  # the paper's: an A100 PCIe's, and its grid's; no idle power, no cooling


@dataclass(frozen=True)
class Comparison:
    """Our hours of a training beside the paper's; `ratio` is ours / theirs where both are A100-hours of the same thing,
    else `why_not` says what differs."""

    step: str
    hours: float
    unit: str
    paper_hours: float
    ratio: float | None
    why_not: str | None = None

    def __str__(self) -> str:
        paper = f"{self.paper_hours:,.0f} A100-hours"
        if self.why_not:
            ours = f"{self.hours:.4g} {self.unit.partition(',')[0]}"
            return f"{self.step}: {ours}; not beside the paper's {paper}: {self.why_not}"
        share = "" if self.ratio is None else f" ({self.ratio:.2g} of the paper's)"
        return f"{self.step}: {self.hours:.4g} {self.unit}{share}; paper: {paper}"


@cache
def references() -> list[dict[str, Any]]:
    """What others report, a row a model or stage, each with its source and scope."""
    rows: list[dict[str, Any]] = yaml.safe_load(REFERENCES.read_text("utf-8"))["rows"]
    return rows


def paper_hours(step: str) -> float | None:
    """What the paper reports of a training, A100-hours."""
    if step not in PAPER:
        return None
    model, stage, _ = PAPER[step]
    return next(row["gpu_hours"] for row in references() if (row["model"], row["stage"]) == (model, stage))


def compare_with_paper(spent: StepHours, why_not: str | None = None) -> Comparison | None:
    """A training beside the same model's in the paper (Stage C: 24,602); None where that reports nothing.

    `why_not` says what keeps it from being the paper's training, if anything does (`differs`).
    """
    paper = paper_hours(spent.step)
    if paper is None:
        return None
    hours, unit = spent.device_seconds / 3600, hours_unit(spent.kind)
    same = unit == "A100-hours" and why_not is None
    return Comparison(spent.step, hours, unit, paper, hours / paper if same else None, why_not)


def differs(step: str, settings: Mapping[str, Any], papers: Mapping[str, Any]) -> str | None:
    """What of a training's settings is not the paper's parameters and schedule, in words; None where nothing is.

    Both are settings as a manifest has them: sections by dotted key.
    """
    ours, theirs = flatten(dict(settings)), flatten(dict(papers))
    for part in PAPER[step][2]:
        keys = sorted(key for key in ours.keys() | theirs.keys() if f"{key}.".startswith(f"{part}."))
        for key in keys:
            if ours.get(key) != theirs.get(key):
                what = "schedule" if ".train." in f"{part}." else "parameters"
                return f"another {what} ({key})" if what == "schedule" else f"other {what} ({key})"
    return None


def hours_unit(kind: str) -> str:
    """What an hour on this kind of device is called, so that nobody compares what cannot be compared."""
    if kind == CPU:
        return CPU_UNIT
    return "A100-hours" if "A100" in kind and "+" not in kind else f"hours on {kind.removeprefix('cuda:')}"


def paper_kg(gpu_hours: float, kg_per_kwh: float = KG_PER_KWH) -> float:
    """kg of CO2 by the paper's method: Stage C's 24,602 hours x 0.25 kW x 0.37 kg/kWh are its 2,276."""
    return gpu_hours * KW * kg_per_kwh


def kg(spent: Spent) -> float | None:
    """The same of what was spent on GPUs; None without any: the method has no figure for CPUs."""
    gpus = sum(seconds for kind, seconds in spent.by_kind.items() if kind != CPU)
    return paper_kg(gpus / 3600) if gpus else None


def energy(spent: Spent) -> str | None:
    """What NVML's counters tell of the energy, and its CO2 on the paper's grid, in words, where they tell anything."""
    if spent.joules is None:
        return None
    kwh = spent.joules / JOULES_PER_KWH
    share = spent.measured / spent.total
    return f"{kwh:,.3g} kWh by NVML's counters, of {share:.0%} of these: {kwh * KG_PER_KWH:,.3g} kg of CO2"


def savings() -> dict[str, float]:
    """How many times fewer GPU-hours Würstchen took than Stable Diffusion, by what is counted: different claims."""
    of = {(row["model"], row["stage"]): row["gpu_hours"] for row in references()}
    c, b = of["Würstchen", "C"], of["Würstchen", "B"]
    return {
        "Stage C alone, Stable Diffusion 2.1": of["Stable Diffusion 2.1", None] / c,
        "Stage C and B, Stable Diffusion 2.1": of["Stable Diffusion 2.1", None] / (c + b),
        "the first version, Stable Diffusion 1.4": of["Stable Diffusion 1.4", None] / of["Würstchen v1", None],
    }
