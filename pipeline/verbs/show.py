"""`show`: an artifact's manifest, the table of scores, the captions of samples."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from pipeline.errors import UsageError
from pipeline.models.score_tables import EVERYTHING, TABLES
from pipeline.plan.table import table
from pipeline.plan.wanted import wanted
from pipeline.settings.config import Config
from pipeline.settings.evaluation import NULL
from pipeline.settings.words import Words
from pipeline.store.artifacts import Artifact
from pipeline.terminal import out, print_json, print_table
from pipeline.verbs.configured import configured

TABLE_1 = Path(__file__).parents[2] / "conf" / "reference" / "table_1.yaml"


def handle(words: Words) -> None:
    loaded, root = configured(words)
    show(loaded, root, words.own.get("artifact"), words.json)


def show(config: Config, root: str, name: str | None, as_json: bool) -> None:
    """An artifact's manifest; for scores and samples their table too."""
    known = [step.output for step in table(config)]
    if name not in known:
        given = f"artifact={name}: there is no such artifact" if name else "show needs artifact=NAME"
        raise UsageError(f"{given}; this conf has {', '.join(known)}")
    artifact = wanted(config, root, [name])[name]
    manifest = artifact.manifest | {"path": artifact.path}
    if as_json:
        print_json(manifest | {"files": {name: vars(entry) for name, entry in sorted(artifact.files.items())}})
        return
    if name == "scores":
        show_scores(artifact)
        return
    if "samples" in name:
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
        if not re.search("/(win_rate|win_low|win_high|ties|n|margin|p)$", metric):  # stand in the table below
            metrics.add_row(metric, f"{value:.4g}")
    print_table(metrics)
    for name, about in scores.manifest["notes"].get("prompts", {}).items():
        out.print(f"prompts {name}: {about['n']} of {about.get('file') or about.get('of', 'the data')}", markup=False)
    won = json.loads(scores.read(TABLES)) if TABLES in scores.files else []
    if won:
        print_table(_win_rates([line for line in won if line["part"] == EVERYTHING]))


def _win_rates(lines: list[dict[str, Any]]) -> Table:
    """A line a scorer and rival, a column a prompt set; below them, grey, what the paper reports of its own model."""
    sets = list(dict.fromkeys(line["set"] for line in lines))
    found = Table("ours wins", "by", *sets, box=None, pad_edge=False)
    cells = {(line["rival"], line["scorer"], line["set"]): line for line in lines}
    for rival, scorer in sorted({key[:2] for key in cells}, key=lambda pair: (pair[1], pair[0] == NULL, pair[0])):
        shown = (cells.get((rival, scorer, prompts)) for prompts in sets)
        found.add_row("same model, other seed" if rival == NULL else f"over {rival}", scorer, *map(_cell, shown))
    for row in yaml.safe_load(TABLE_1.read_text("utf-8"))["rows"]:
        theirs = (row["win_percent"].get(prompts) for prompts in sets)
        about = (f"over {row['rival']}, the paper's", "pickscore")
        found.add_row(*about, *("" if value is None else f"{value:.1f} %" for value in theirs), style="bright_black")
    return found


def _cell(line: dict[str, Any] | None) -> str:
    if line is None:
        return ""
    low, high = 100 * line["low"], 100 * line["high"]
    p = f"{line['p']:.2g}" if line["p"] >= 1e-4 else "<0.0001"
    return f"{100 * line['rate']:.1f} % [{low:.1f}, {high:.1f}] n {line['n']:,} p {p}"


def files(count: int) -> str:
    """That many files, in words."""
    return "1 file" if count == 1 else f"{count} files"
