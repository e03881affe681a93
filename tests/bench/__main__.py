"""`make bench`: how fast the parts of a training are on this machine. Ratios of interleaved runs, beside their bars.

Every ratio is how many times as fast ours is; a bar is met or missed by the median. A busy machine misses some.

The loop is compared with the same model, batches and optimiser in a plain PyTorch loop; the reader with webdataset and
pyarrow; encoding with its model alone; the download with plain img2dataset; a folder of pictures with a plain loop of
Pillow; reads and writes of an object store with boto3's; the models with diffusers'. What full-size steps could reach
on GPUs at best is reckoned, not measured.
"""

import sys
from itertools import chain

import torch
from rich.console import Console
from rich.table import Table

from tests.bench import data, drawing, fake_step, loop, models, own_folder, storage
from tests.bench.figures import Line


def main() -> None:
    """Run every measurement, show each as it comes, and print one table with the bars."""
    table = Table("what", "figure", "bar", "", box=None, pad_edge=False)
    table.add_row("machine", f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    verdicts = []
    for line in chain(*(part.lines() for part in (loop, data, own_folder, storage, models, drawing, fake_step))):
        what, figure, bar, met = Line(*line)
        print(f"{what}: {figure}", file=sys.stderr, flush=True)
        table.add_row(what, figure, bar, "" if met is None else "met" if met else "MISSED")
        verdicts += [] if met is None else [met]
    console = Console(width=None if sys.stdout.isatty() else 160)  # wide enough for a log
    console.print(table)
    console.print(f"{sum(verdicts)} of {len(verdicts)} bars are met")


if __name__ == "__main__":
    main()
