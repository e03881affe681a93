"""`data funnel`: how many of a source's rows are left after each step, and why not the others."""

from rich.table import Table

from datasets.sources import laion
from pipeline.plan.wanted import finished, wanted
from pipeline.results import data as results
from pipeline.settings.config import Config
from pipeline.terminal import out, print_json, print_table


def funnel(config: Config, root: str, as_json: bool) -> None:
    """From the rows of the source to the encoded pictures: how many are left after each step, and why not the others.

    Raises:
        UsageError: nothing is planned yet.
        CorruptFile: the counts of a step do not add up.
    """
    metadata = wanted(config, root, ["metadata"])["metadata"]
    steps = results.funnel(metadata, finished(config, root))
    taken = metadata.manifest["notes"].get("columns", {})
    if not taken.keys() <= set(laion.COLUMNS.values()):  # earlier versions told only of what is spelled otherwise
        taken = {}
    if as_json:
        print_json({"root": root, "funnel": steps, "columns": taken})
        return
    lines = Table("pictures", "rows", "share", "lost to", box=None, pad_edge=False)
    for step in steps:
        causes = ", ".join(f"{cause} {count:,}" for cause, count in step["lost"].items())
        lines.add_row(step["level"], f"{step['rows']:,}", f"{step['rows'] / max(1, steps[0]['rows']):.1%}", causes)
    print_table(lines)
    if taken:
        out.print(laion.told(taken))
