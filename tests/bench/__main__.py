"""`make bench`: how fast the parts of a training are on this machine. Ratios of interleaved runs, medians; no verdicts.

The loop is compared with the same model, batches and optimiser in a plain PyTorch loop; the reader with webdataset and
pyarrow; encoding with its model alone; the download with plain img2dataset; the models with diffusers'.
"""

from itertools import chain

import torch
from rich.console import Console
from rich.table import Table

from tests.bench import data, loop, models


def main() -> None:
    """Run every measurement and print one table."""
    lines = Table("what", "figure", box=None, pad_edge=False)
    lines.add_row("machine", f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    for what, figure in chain(loop.lines(), data.lines(), models.lines()):
        lines.add_row(what, figure)
    Console().print(lines)


if __name__ == "__main__":
    main()
