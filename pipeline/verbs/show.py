"""`show`: an artifact's manifest, the table of scores, the captions of samples."""

import json

from rich.table import Table

from pipeline.errors import UsageError
from pipeline.plan.table import table
from pipeline.plan.wanted import wanted
from pipeline.settings.config import Config
from pipeline.settings.words import Words
from pipeline.terminal import out, print_json, print_table
from pipeline.verbs.configured import configured


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
        lines = Table("metric", "value", box=None, pad_edge=False)
        for metric, value in manifest["metrics"].items():
            lines.add_row(metric, f"{value:.4g}")
        print_table(lines)
        return
    if name in ("samples", "baseline_samples"):
        rows = json.loads(artifact.read("captions.json"))
        for row in rows:
            out.print(f"{row['key']}  {row['seed']:6d}  {row['caption']}")
        out.print(f"pictures in {artifact.path}")
        return
    shown = {key: value for key, value in manifest.items() if key != "files"}
    out.print_json(json.dumps(shown, ensure_ascii=False))
    out.print(f"{files(len(artifact.files))} in {artifact.path}")


def files(count: int) -> str:
    """That many files, in words."""
    return "1 file" if count == 1 else f"{count} files"
