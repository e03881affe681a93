"""`status`: the last runs with their steps' logs, and every artifact with its size."""

from rich.table import Table

from datasets.files import storage
from pipeline.plan import recorded
from pipeline.settings.words import Words
from pipeline.store.artifacts import Store
from pipeline.terminal import out, print_json, print_table

LAST = 10  # runs


def handle(words: Words) -> None:
    status(storage.absolute(words.root), words.json)


def status(root: str, as_json: bool) -> None:
    """Last runs with their steps' logs, and every artifact with its size."""
    runs = [{key: told for key, told in run.items() if key != "config"} for run in recorded.records(root, last=LAST)]
    artifacts = [artifact.manifest | {"path": artifact.path} for artifact in Store(root).finished()]
    if as_json:
        keys = ("name", "step", "fingerprint", "rows", "bytes", "seconds", "device_seconds", "created", "path")
        listed = [{key: artifact[key] for key in keys} for artifact in artifacts]
        print_json({"root": root, "runs": runs, "artifacts": listed})
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
            item["path"].removeprefix(f"{root}/"),
        )
    out.print(f"all in {root}")
    print_table(lines)
