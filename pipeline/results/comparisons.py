"""Pictures side by side: ours, the rivals' and the originals, first as they come, then where the margins are largest.

A picture is told by where it lies: an artifact's name and a file in it, or a place outside of the root.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.models.score_tables import FILE, LIKENESSES, RIVAL
from pipeline.results.subject import Subject
from pipeline.settings.evaluation import BASELINE, HELD_OUT, TRAINING
from pipeline.store.artifacts import Artifact

FIRST = 8  # pictures of a set that are shown as they come
MARGINS = 10  # best and worst ones
SCORERS = ("pickscore", "clip:", "clip_h", "clip_l", "aesthetic", "lpips", "psnr", "ssim")  # by what margins are told
COLUMNS = {"original": "original", "stage_a": "Stage A alone", "stage_b": "Stages B + A", "score": "ours"}
FOLDERS = {"original": "original", "stage_a": "stage_a", "stage_b": "stage_b", "score": "generated"}
PREFIX = "samples"
CAPTIONS = "captions.json"  # of an artifact of samples


def section(subject: Subject) -> list[dict[str, Any]]:
    """A prompt set each: its first pictures, and those with the best and the worst margins; held-out captions first."""
    found = [artifact for name, artifact in subject.artifacts.items() if _is_ours(name) and CAPTIONS in artifact.files]
    marks = _scores(subject.artifacts.get("scores"))
    return [_set(subject, samples, marks) for samples in sorted(found, key=_place)]


def rank(scorer: str) -> int:
    """How much a scorer's margins tell of what people like, the most first."""
    return next((place for place, name in enumerate(SCORERS) if scorer.startswith(name)), len(SCORERS))


def _is_ours(name: str) -> bool:
    return name == PREFIX or name.startswith(f"{PREFIX}_")


def _place(samples: Artifact) -> tuple[bool, bool, str]:
    return _named(samples.name) != HELD_OUT, _named(samples.name) == TRAINING, samples.name


def _named(samples: str) -> str:
    return samples.removeprefix(f"{PREFIX}_") if samples != PREFIX else TRAINING


def _scores(scores: Artifact | None) -> pa.Table | None:
    return pq.read_table(pa.BufferReader(scores.read(FILE))) if scores and FILE in scores.files else None


def _set(subject: Subject, samples: Artifact, marks: pa.Table | None) -> dict[str, Any]:
    name = _named(samples.name)
    rows: list[dict[str, Any]] = json.loads(samples.read(CAPTIONS))
    ours = marks.filter(pc.field("set") == name) if marks is not None else None
    rivals = [column for column in ours.column_names if column.startswith(RIVAL)] if ours is not None else []
    places = _Places(subject, samples, name, rivals)
    told: dict[str, Any] = {
        "set": name,
        "n": len(rows),
        "columns": places.titles,
        "first": [places.row(row) for row in rows[:FIRST]],
        "margins": [],
    }
    if ours is not None and ours.num_rows:
        scorer = min(pc.unique(ours["scorer"]).to_pylist(), key=rank)
        marked = ours.filter(pc.field("scorer") == scorer)
        told["margins"] = [_margins(places, rows, marked, scorer, rival) for rival in rivals or [None]]
        told["margins"] = [one for one in told["margins"] if one]
    return told


def _margins(
    places: "_Places", rows: Sequence[dict[str, Any]], marked: pa.Table, scorer: str, rival: str | None
) -> dict[str, Any] | None:
    """The best and worst prompts, by our score less a rival's; by our score alone where there is none."""
    sign = LIKENESSES.get(scorer, 1)
    wanted = marked.filter(pc.field("score").is_valid())
    wanted = wanted.filter(pc.field(rival).is_valid()) if rival else wanted
    known = {row["key"]: row for row in rows}
    values = [
        (sign * (one["score"] - (one[rival] if rival else 0.0)), one)
        for one in wanted.to_pylist()
        if one["key"] in known
    ]
    if not values:
        return None
    ordered = sorted(values, key=lambda value: (-value[0], value[1]["key"]))
    half = min(MARGINS, -(-len(ordered) // 2))

    def told(part: Sequence[tuple[float, dict[str, Any]]]) -> list[dict[str, Any]]:
        return [
            {
                **places.row(known[one["key"]], only=("original", "score", rival)),
                "margin": margin,
                "score": one["score"],
                "rival": one[rival] if rival else None,
            }
            for margin, one in part
        ]

    worst = ordered[max(half, len(ordered) - half) :]
    return {
        "scorer": scorer,
        "rival": rival.removeprefix(RIVAL) if rival else None,
        "n": len(ordered),
        "best": told(ordered[:half]),
        "worst": told(worst[::-1]),
    }


class _Places:
    """Where the pictures of a prompt set are: for each column a folder of an artifact, or a place outside."""

    def __init__(self, subject: Subject, samples: Artifact, name: str, rivals: Sequence[str]) -> None:
        self._samples, first = samples, json.loads(samples.read(CAPTIONS))[:1]
        files = samples.files
        own = [column for column, folder in FOLDERS.items() if first and f"{folder}/{first[0]['key']}.png" in files]
        self._of: dict[str, tuple[str, str]] = {column: (samples.name, FOLDERS[column]) for column in own}
        self._outside: dict[str, tuple[str, str]] = {}
        self.titles = {column: COLUMNS[column] for column in own}
        for column in rivals:
            self._rival(subject, column, name)

    def _rival(self, subject: Subject, column: str, name: str) -> None:
        rival, theirs = column.removeprefix(RIVAL), f"{BASELINE}_{self._samples.name}"
        known = subject.config.eval if subject.config else None
        place = known.rival_path(rival, name) if known and rival in known.rivals else None
        if place:
            self._outside[column] = (f"eval.{place[0]}", place[1])
        elif theirs in subject.artifacts and (known is None or known.rivals.get(rival) == BASELINE):
            self._of[column] = (theirs, "generated")
        else:
            return
        self.titles[column] = rival

    def row(self, row: Mapping[str, Any], only: Sequence[str | None] = ()) -> dict[str, Any]:
        """A prompt with its pictures."""
        pictures: dict[str, dict[str, str]] = {}
        for column in self.titles:
            if only and column not in only:
                continue
            if column in self._of:
                artifact, folder = self._of[column]
                pictures[column] = {"artifact": artifact, "file": f"{folder}/{row['key']}.png"}
            else:
                key, path = self._outside[column]
                pictures[column] = {"outside": path, "config_key": key, "key": row["key"], "prompt": row["caption"]}
        return {"key": row["key"], "prompt": row["caption"], "pictures": pictures}
