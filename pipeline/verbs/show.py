"""`show`: an artifact's manifest, the table of scores, the captions of samples."""

import json
from typing import Any

from rich.table import Table

from pipeline.errors import UsageError
from pipeline.models import distances, drawing_speed
from pipeline.models.feature_sets import FEATURES
from pipeline.models.score_tables import EVERYTHING, TABLES
from pipeline.plan.table import table
from pipeline.plan.wanted import wanted
from pipeline.results.measures import PAPER, Measures, distance_table, speed_table
from pipeline.results.scores import IN_TABLES, rate, win_tables
from pipeline.settings.config import Config
from pipeline.settings.words import Words
from pipeline.store.artifacts import Artifact
from pipeline.terminal import out, print_json, print_table
from pipeline.verbs.configured import configured
from pipeline.verbs.report import asked


def handle(words: Words) -> None:
    name = words.own.get("artifact")
    artifact = asked.artifact_of(words, name) if "run" in words.own else _of_conf(*configured(words), name)
    show(artifact, words.json)


def _of_conf(config: Config, root: str, name: str | None) -> Artifact:
    """The artifact of exactly this config."""
    known = [step.output for step in table(config)]
    if name not in known:
        given = f"artifact={name}: there is no such artifact" if name else "show needs artifact=NAME"
        raise UsageError(f"{given}; this conf has {', '.join(known)}")
    return wanted(config, root, [name])[name]


def show(artifact: Artifact, as_json: bool) -> None:
    """An artifact's manifest; for scores and samples their table too."""
    name = artifact.name
    manifest = artifact.manifest | {"path": artifact.path}
    if as_json:
        print_json(manifest | {"files": {name: vars(entry) for name, entry in sorted(artifact.files.items())}})
        return
    if name == "scores":
        show_scores(artifact)
        return
    if "samples" in name and not name.startswith(FEATURES):
        rows = json.loads(artifact.read("captions.json"))
        for row in rows:
            out.print(f"{row['key']}  {row['seed']:6d}  {row['caption']}")
        out.print(f"pictures in {artifact.path}")
        return
    shown = {key: value for key, value in manifest.items() if key != "files"}
    out.print_json(json.dumps(shown, ensure_ascii=False))
    out.print(f"{files(len(artifact.files))} in {artifact.path}")


def show_scores(scores: Artifact) -> None:
    """What was measured, on which prompts, and the win rates with what chance alone gives under them."""
    metrics = Table("metric", "value", box=None, pad_edge=False)
    for metric, value in scores.manifest["metrics"].items():
        if not IN_TABLES.fullmatch(metric):
            metrics.add_row(metric, f"{value:.4g}")
    print_table(metrics)
    for name, about in scores.manifest["notes"].get("prompts", {}).items():
        out.print(f"prompts {name}: {about['n']} of {about.get('file') or about.get('of', 'the data')}", markup=False)
    won = json.loads(scores.read(TABLES)) if TABLES in scores.files else []
    if won:
        print_table(_win_rates([line for line in won if line["part"] == EVERYTHING]))
    for name, made in ((distances.FILE, distance_table), (drawing_speed.FILE, speed_table)):
        if name in scores.files:
            print_table(_measures(made(json.loads(scores.read(name)))))


def _win_rates(lines: list[dict[str, Any]]) -> Table:
    """A line a scorer and rival, a column a prompt set; below them, grey, what the paper reports of its own model."""
    told = win_tables(lines)
    found = Table("ours wins", "by", *told["sets"], box=None, pad_edge=False)
    for row in told["rows"]:
        cells = (row["cells"].get(name) for name in told["sets"])
        if row["kind"] == "paper":
            shown = ["" if value is None else f"{value:.1f} %" for value in cells]
            found.add_row(row["label"], row["scorer"], *shown, style="bright_black")
        else:
            found.add_row(row["label"], row["scorer"], *("" if line is None else rate(line) for line in cells))
    return found


def _measures(found: Measures) -> Table:
    """The table as the terminal shows it: what the paper reports grey."""
    table = Table(*found.columns, box=None, pad_edge=False)
    for row in found.rows:
        table.add_row(*(cell.shown for cell in row.cells), style="bright_black" if row.kind == PAPER else None)
    return table


def files(count: int) -> str:
    """That many files, in words."""
    return "1 file" if count == 1 else f"{count} files"
