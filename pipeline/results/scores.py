"""The scores of an experiment as tables: each figure with its n, win rates above what chance alone gives."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pipeline.models import distances, drawing_speed
from pipeline.models.score_tables import EVERYTHING, FILE, TABLES
from pipeline.settings.evaluation import HELD_OUT, NULL, TRAINING
from pipeline.store.artifacts import Artifact

TABLE_1 = Path(__file__).with_name("table_1.yaml")
# Metrics that tables have: of win rates, of distances between sets of pictures, and of the speed of drawing.
IN_TABLES = re.compile(
    r".*/(win_rate|win_low|win_high|ties|n|margin|p)|(fid|kid|is|(fd|kd|is):[0-9a-f]+)/.*|seconds_a_picture/.*"
)
OTHER_SEED = "same model, other seed"
SUFFIX = "_heldout"
MEANINGS = {  # of metrics, without what says of which captions they are
    "retrieval_top1": "share of our pictures whose nearest original is their own",
    "retrieval_top1_stage_b": "the same of what Stage B makes of the originals' codes: about the most to be had",
    "retrieval_top1_baseline": "the same of the baseline's pictures",
    "psnr": "peak signal-to-noise ratio to the original, dB",
    "ssim": "structural similarity to the original",
    "lpips": "perceptual distance to the original; less is better",
}
OF = {"stage_a": "Stage A alone", "stage_b": "Stages B + A", "generated": "our pictures", "baseline": "the baseline's"}


def section(scores: Artifact | None, before: Artifact | None = None) -> dict[str, Any] | None:
    """All figures of an evaluation, beside those of an earlier one where both measured the same; None without one."""
    if scores is None:
        return None
    measured = scores.manifest["metrics"]
    earlier = before.manifest["metrics"] if before else {}
    notes = scores.manifest.get("notes", {})
    lines, apart, timed = (_lines(scores, name) for name in (TABLES, distances.FILE, drawing_speed.FILE))
    counted = FILE in scores.files  # earlier versions had one set, whose rows were the manifest's
    sets = {name: {"of": about.get("file") or about.get("of", "the data"), **about} for name, about in _sets(notes)}
    return {
        "sets": sets,
        "metrics": [
            {"name": name, "value": value, "before": earlier.get(name), **_about(name, measured, counted, scores)}
            for name, value in measured.items()
            if not IN_TABLES.fullmatch(name) and not name.startswith("n_")
        ],
        "tables": win_tables([line for line in lines if line["part"] == EVERYTHING]),
        "parts": [line for line in lines if line["part"] != EVERYTHING and line["rival"] != NULL],
        "distances": apart,
        "speed": timed,
    }


def in_lines(scores: Artifact) -> list[str]:
    """A line a prompt set, of how many of its captions, with its figures; and one that names what tables have."""
    found = section(scores)
    assert found is not None
    sets: dict[tuple[str, int | None], list[str]] = {}
    for metric in found["metrics"]:
        sets.setdefault((metric["set"], metric["n"]), []).append(f"{metric['name']} {metric['value']:.4g}")
    lines = [f"{name}{'' if n is None else f', n {n:,}'}: {', '.join(said)}" for (name, n), said in sets.items()]
    tables = {"win rates": found["tables"]["rows"], "distances of sets": found["distances"], "speed": found["speed"]}
    if told := [what for what, lines_of_it in tables.items() if lines_of_it]:
        lines.append(f"{', '.join(told)}: `report` has the tables")
    return lines


def _lines(scores: Artifact, name: str) -> list[dict[str, Any]]:
    """Those of a table, if it was made."""
    return json.loads(scores.read(name)) if name in scores.files else []


def _sets(notes: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    return notes.get("prompts", {}).items() if isinstance(notes.get("prompts"), dict) else ()


def _about(name: str, measured: Mapping[str, float], counted: bool, scores: Artifact) -> dict[str, Any]:
    """Of how many a metric is, of which captions, and what it is in words."""
    if "/" in name:  # <scorer>/<set>/<what>
        scorer, prompts, what = name.split("/", 2)
        n = measured.get(f"{scorer}/{prompts}/n")
        words = {"mean": f"mean {scorer}", "truncated": f"prompts of which {scorer} saw only the beginning"}
        return {"n": None if n is None else int(n), "set": prompts, "what": words.get(what, what)}
    base, held = name.removesuffix(SUFFIX), name.endswith(SUFFIX)
    n = measured.get("n_heldout" if held else "n_training", None if counted else scores.manifest["rows"])
    kind, _, of = base.partition("_")
    what = MEANINGS.get(base) or (f"{MEANINGS[kind]}: {OF[of]}" if kind in MEANINGS and of in OF else base)
    captions = HELD_OUT if held else TRAINING
    return {"n": None if n is None else int(n), "set": captions, "what": what}


def win_tables(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The win rates as one table: its prompt sets, and a row a scorer and rival, the other seed's last of a scorer's;
    then what the paper reports of its own model. Cells are lines of `score_tables`, or per cent of the paper's."""
    sets = list(dict.fromkeys(line["set"] for line in lines))
    cells = {(line["rival"], line["scorer"], line["set"]): line for line in lines}
    rows = [
        {
            "label": OTHER_SEED if rival == NULL else f"over {rival}",
            "kind": NULL if rival == NULL else "rival",
            "scorer": scorer,
            "cells": {name: cells[rival, scorer, name] for name in sets if (rival, scorer, name) in cells},
        }
        for rival, scorer in sorted({key[:2] for key in cells}, key=lambda pair: (pair[1], pair[0] == NULL, pair[0]))
    ]
    paper = [
        {"label": f"over {row['rival']}, the paper's", "kind": "paper", "scorer": "pickscore", "cells": theirs}
        for row in _table_1()
        if (theirs := {name: row["win_percent"][name] for name in sets if name in row["win_percent"]})
    ]
    return {"sets": sets, "rows": [*rows, *paper] if rows else []}


@cache
def _table_1() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = yaml.safe_load(TABLE_1.read_text("utf-8"))["rows"]
    return rows


def rate(line: Mapping[str, Any]) -> str:
    """A win rate in words: per cent, 95 % interval, n, and p of the sign test."""
    low, high = 100 * line["low"], 100 * line["high"]
    p = f"{line['p']:.2g}" if line["p"] >= 1e-4 else "<0.0001"
    return f"{100 * line['rate']:.1f} % [{low:.1f}, {high:.1f}] n {line['n']:,} p {p}"
