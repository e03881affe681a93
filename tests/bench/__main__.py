"""`make bench`: how fast the parts of a training are on this machine. Ratios of interleaved runs, beside their bars.

Every ratio is how many times as fast ours is; a bar is met or missed by the median. A busy machine misses some.

The loop is compared with the same model, batches and optimiser in a plain PyTorch loop; the reader with webdataset and
pyarrow; encoding with its model alone; the download with plain img2dataset; the models with diffusers'.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from itertools import chain

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from stages import loop
from stages.config import Phase, StageCConfig, StageCLoss, TrainingConfig
from stages.draws import Draws
from stages.stage_c import StageC, StageCObjective
from tests.bench import data, models
from tests.bench.figures import Line, ratio, took

PAIRS = 10
STEPS = 10
BATCH = 16
TOKENS, WIDTH, SIDE = 77, 1024, 24
MODEL = StageCConfig(width=128, depth=2, heads=4, text_width=WIDTH, dropout=0.0)


def main() -> None:
    """Run every measurement, show each as it comes, and print one table with the bars."""
    table = Table("what", "figure", "bar", "", box=None, pad_edge=False)
    table.add_row("machine", f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    verdicts = []
    for line in chain(loop_lines(), data.lines(), models.lines()):
        what, figure, bar, met = Line(*line)
        print(f"{what}: {figure}", file=sys.stderr, flush=True)
        table.add_row(what, figure, bar, "" if met is None else "met" if met else "MISSED")
        verdicts += [] if met is None else [met]
    console = Console(width=None if sys.stdout.isatty() else 160)  # wide enough for a log
    console.print(table)
    console.print(f"{sum(verdicts)} of {len(verdicts)} bars are met")


def loop_lines() -> Iterator[Line]:
    """Our training loop against a plain one."""
    ours, plain = [], []
    for _ in range(PAIRS):
        plain.append(took(_plain_loop, time.perf_counter))
        ours.append(took(_our_loop, time.perf_counter))
    note = f"; {statistics.median(ours) / STEPS * 1000:.0f} ms a step"
    yield ratio("training loop / plain PyTorch loop", ours, plain, note=note)


def _batch(_: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "latents_c": generator.standard_normal((BATCH, 16, SIDE, SIDE), np.float32).astype(np.float16),
        "text": generator.standard_normal((BATCH, TOKENS, WIDTH), np.float32).astype(np.float16),
    }


def _objective() -> StageCObjective:
    torch.manual_seed(0)
    return StageCObjective(StageC(MODEL), StageCLoss(), torch.zeros(TOKENS, WIDTH))


def _our_loop() -> None:
    config = TrainingConfig(
        phases=(Phase(steps=STEPS, batch_size=BATCH, size=1024),),
        learning_rate=1e-4,
        warmup_steps=0,
        precision="fp32",
        log_every=STEPS,
        checkpoint_every=STEPS,
    )
    loop.train(
        _objective(),
        _batch,
        config,
        seed=0,
        device=torch.device("cpu"),
        load_state=lambda: None,
        save_state=lambda _, __: None,
        log=lambda _, __: None,
        should_stop=lambda: False,
    )


def _plain_loop() -> None:
    objective = _objective()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4, fused=True)
    for step in range(STEPS):
        batch = {name: torch.from_numpy(values) for name, values in _batch(step).items()}
        loss, _ = objective(batch, Draws(0, step, 0, BATCH, BATCH))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()


if __name__ == "__main__":
    main()
