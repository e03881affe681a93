"""What is there: the verbs `status`, `show`, `export`, `report hours`. They read; `export` copies out of the root."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from datasets import storage
from pipeline import ledger
from pipeline.artifacts import Artifact, Fingerprint, Store
from pipeline.config import Config
from pipeline.dag import differences, fingerprints, order
from pipeline.errors import NotBuilt, UsageError
from pipeline.process import ProcessId
from pipeline.screen import console, print_table
from pipeline.steps import table

out = Console(highlight=False, soft_wrap=True, markup=False)


def wanted(config: Config, root: str, names: list[str], seed_word: str = "seed") -> dict[str, Artifact]:
    """The finished artifacts of exactly this config. `seed_word` is how the caller's command line sets its seed.

    Raises:
        NotBuilt: one is missing; the message lists what exists and names the nearest.
    """
    store = Store(root)
    steps = order(table(config), names)
    prints = fingerprints(steps, config.lookup)
    found: dict[str, Artifact] = {}
    for name in names:
        artifact = store.find(name, prints[name].digest)
        if artifact is None:
            made = {step.output for step in order(table(config), config.targets)}
            override = None if name in made else f"targets=[{name}]"
            raise NotBuilt(_missing(name, store, prints[name], seed_word), override)
        found[name] = artifact
    return found


def _missing(name: str, store: Store, wanted: Fingerprint, seed_word: str) -> str:
    others = list(store.finished(name))
    text = f"root={store.root} has no {name} of exactly this conf"
    if not others:
        return f"{text} (no {name} exists there at all)"
    listed = ", ".join(other.manifest["fingerprint"] for other in others)
    nearest = min((other.manifest for other in reversed(others)), key=lambda other: len(differences(other, wanted)))
    text += f". There are: {listed}; the nearest, {nearest['fingerprint']}, differs in "
    text += "; ".join(differences(nearest, wanted))
    seed = nearest["settings"].get("seed")
    return text if seed == wanted.settings.get("seed") else f"{text} (give {seed_word}={seed} for its run's seed)"


def status(root: str, as_json: bool) -> None:
    """Last runs with their steps' logs, and every artifact with its size."""
    folder = storage.join(root, "invocations")
    runs = [_told(json.loads(storage.read(storage.join(folder, name))), root) for name in storage.listing(folder)[-10:]]
    artifacts = [artifact.manifest | {"path": artifact.path} for artifact in Store(root).finished()]
    if as_json:
        keys = ("name", "step", "fingerprint", "rows", "bytes", "seconds", "device_seconds", "created", "path")
        listed = [{key: artifact[key] for key in keys} for artifact in artifacts]
        print(json.dumps({"root": root, "runs": runs, "artifacts": listed}, indent=1, ensure_ascii=False))
        return
    if not runs and not artifacts:
        out.print(f"nothing has been run in {root} yet")
        return
    for run in runs:
        out.print(f"run {run['id']}  conf={run['conf']}  {run['outcome']}")
        for name, step in run["steps"].items():
            out.print(f"    {name:12} {step['state']:12} log {step['log']}")
    lines = Table("artifact", "fingerprint", "rows", "MiB", "seconds", "created", "where", box=None, pad_edge=False)
    for item in artifacts:
        size = f"{item['bytes'] / 2**20:.1f}"
        lines.add_row(
            item["name"],
            item["fingerprint"],
            str(item["rows"]),
            size,
            f"{item['seconds']:.1f}",
            item["created"],
            item["path"],
        )
    print_table(lines)


def _told(run: dict[str, Any], root: str) -> dict[str, Any]:
    """A run's record with paths below this root, which may have been moved since; one that could not say how it ended,
    because it was killed, gets that said."""
    for step in run["steps"].values():
        for key in ("log", "artifact"):  # logs/<run>/<name>.log, artifacts/<name>/<fingerprint>
            step[key] = storage.join(root, *step[key].split("/")[-3:])
    if run["outcome"] == "running" and ProcessId(**run["process"]).is_dead():
        steps = {
            name: {**step, "state": "killed"} if step["state"] == "running" else step
            for name, step in run["steps"].items()
        }
        return {**run, "outcome": "killed", "steps": steps}
    return run


def show(config: Config, root: str, name: str | None, as_json: bool) -> None:
    """An artifact's manifest; for scores and samples their table too."""
    known = [step.output for step in table(config)]
    if name not in known:
        given = f"artifact={name}: there is no such artifact" if name else "show needs artifact=NAME"
        raise UsageError(f"{given}; this conf has {', '.join(known)}")
    artifact = wanted(config, root, [name])[name]
    manifest = artifact.manifest | {"path": artifact.path}
    if as_json:
        print(json.dumps(manifest, indent=1, ensure_ascii=False))
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
    out.print(f"{_files(len(manifest['files']))} in {artifact.path}")


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def export(config: Config, root: str, folder: str | None) -> None:
    """Copy the release of exactly this config to a folder."""
    if not folder:
        raise UsageError("export needs out=DIR")
    target = storage.absolute(folder)
    if storage.listing(target):
        raise UsageError(f"out={folder}: the folder is not empty; give a new one")
    release = wanted(config, root, ["release"])["release"]
    for name in release.files:
        storage.publish(release.read(name), storage.join(target, name))
    console.print(f"{_files(len(release.files))} in {target}")


def hours(root: str, as_json: bool) -> None:
    """The device-hour table of a root from its ledger, and each training beside the paper's."""
    rows = list(ledger.totals(root).steps.values())
    compared = [found for found in map(ledger.compare_with_paper, rows) if found]
    if as_json:
        listed = [
            {**vars(row), "device_seconds": row.device_seconds, "kind": row.kind, "unit": ledger.hours_unit(row.kind)}
            for row in rows
        ]
        paper = [vars(comparison) for comparison in compared]
        print(json.dumps({"root": root, "hours": listed, "paper": paper}, indent=1, ensure_ascii=False))
        return
    lines = Table("step", "fingerprint", "attempts", "failed", "device-hours", "kind", box=None, pad_edge=False)
    for row in rows:
        spent = f"{row.device_seconds / 3600:.4f}" + (" (estimated)" if row.estimated else "")
        lines.add_row(row.step, row.fingerprint, str(row.attempts), str(row.failed_attempts), spent, row.kind)
    print_table(lines)
    for comparison in compared:
        out.print(str(comparison))
