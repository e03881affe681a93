"""Scores as a run's last screen tells them."""

import json
from types import SimpleNamespace
from typing import Any

from pipeline.models.score_tables import TABLES
from pipeline.results.scores import in_lines

MEASURED = {
    "retrieval_top1": 1.0,
    "retrieval_top1_heldout": 5 / 6,
    "n_training": 64.0,
    "n_heldout": 6.0,
    "psnr_stage_a": 31.593,
    "clip/parti/mean": 0.25,
    "clip/parti/n": 30.0,
    "clip/parti/rival/win_rate": 0.6,
}
WON = {"part": "all", "set": "parti", "rival": "rival", "scorer": "clip", "rate": 0.6}


def scores(**files: list[dict[str, Any]]) -> Any:
    """An artifact of these figures, with these tables."""
    named = {f"{name}.json": json.dumps(lines) for name, lines in files.items()}
    return SimpleNamespace(manifest={"metrics": MEASURED, "rows": 70}, files=named, read=named.__getitem__)


def test_each_prompt_set_has_a_line_with_its_count_and_figures():
    assert in_lines(scores()) == [
        "training, n 64: retrieval_top1 1, psnr_stage_a 31.59",
        "held_out, n 6: retrieval_top1_heldout 0.8333",
        "parti, n 30: clip/parti/mean 0.25",
    ]


def test_what_tables_have_is_named_and_not_spread_out():
    *_, last = in_lines(scores(tables=[WON]))
    assert (TABLES, last) == ("tables.json", "win rates: `report` has the tables")
