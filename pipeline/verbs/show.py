"""`show`: an artifact's manifest, the table of scores, the captions of samples."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from pipeline.errors import UsageError
from pipeline.models import distances, drawing_speed
from pipeline.models.feature_sets import FEATURES
from pipeline.models.score_tables import EVERYTHING, TABLES
from pipeline.plan.table import table
from pipeline.plan.wanted import wanted
from pipeline.settings.config import Config
from pipeline.settings.evaluation import NULL
from pipeline.settings.words import Words
from pipeline.store.artifacts import Artifact
from pipeline.terminal import out, print_json, print_table
from pipeline.verbs.configured import configured

# What stands in the tables below the metrics.
BELOW = "/(win_rate|win_low|win_high|ties|n|margin|p)$|^(fid|kid|is|(fd|kd|is):[0-9a-f]+)/|^seconds_a_picture/"
REFERENCE = Path(__file__).parents[2] / "conf" / "reference"
TABLE_1, TABLE_2 = (REFERENCE / f"table_{number}.yaml" for number in (1, 2))
COCO = "coco"  # the prompt set of which the paper reports FID and IS


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
        if not re.search(BELOW, metric):
            metrics.add_row(metric, f"{value:.4g}")
    print_table(metrics)
    for name, about in scores.manifest["notes"].get("prompts", {}).items():
        out.print(f"prompts {name}: {about['n']} of {about.get('file') or about.get('of', 'the data')}", markup=False)
    won = json.loads(scores.read(TABLES)) if TABLES in scores.files else []
    if won:
        print_table(_win_rates([line for line in won if line["part"] == EVERYTHING]))
    for name, made in ((distances.FILE, _distances), (drawing_speed.FILE, _speed)):
        if name in scores.files:
            print_table(made(json.loads(scores.read(name))))


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


def _distances(lines: list[dict[str, Any]]) -> Table:
    """A line a set of pictures: how far it lies from the real ones. FID of too few pictures is not told."""
    called = lines[0]["called"]
    names = [called["fid"].upper(), f"{called['kid'].upper()} x 1000", called["is"].upper()]
    found = Table("pictures", "for", "changed by", "n", "real", *names, box=None, pad_edge=False)
    for line in lines:
        kid = (
            ""
            if line["kid"] is None
            else "{:.2f} [{:.2f}, {:.2f}]".format(*(1000 * line[name] for name in ("kid", "kid_low", "kid_high")))
        )
        fid = "" if line["n_real"] is None else "too few" if line["fid"] is None else f"{line['fid']:.2f}"
        found.add_row(
            "same model, other seed" if line["whose"] == NULL else line["whose"],
            line["set"],
            "" if line["part"] == distances.EVERYTHING else line["part"],
            f"{line['n']:,}",
            "" if line["n_real"] is None else f"{line['n_real']:,}",
            fid,
            kid,
            f"{line['inception_score']:.2f} ± {line['inception_score_std']:.2f}",
        )
    for row in yaml.safe_load(TABLE_2.read_text("utf-8"))["rows"] if COCO in {line["set"] for line in lines} else ():
        theirs = (f"{row['fid']:.1f}", "", f"{row['inception_score']:.1f}")
        found.add_row(f"{row['model']}, the paper's", COCO, "", "30,000", "", *theirs, style="bright_black")
    return found


def _speed(lines: list[dict[str, Any]]) -> Table:
    """Seconds a picture by stage; a line for each number of pictures at a time."""
    columns = ("Stage C", "Stage B", "Stage A", "all")
    found = Table("seconds a picture", "at a time", *columns, "on", "in", box=None, pad_edge=False)
    for line in lines:
        seconds = [line[stage] for stage in drawing_speed.STAGES]
        shown = (f"{value:.3g}" for value in (*seconds, sum(seconds)))
        found.add_row(line["mode"], str(line["batch"]), *shown, line["device"], line["precision"])
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
