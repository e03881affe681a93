"""`make bench`: how fast the parts of a training are on this machine. Ratios of interleaved runs, medians; no verdicts.

The loop is compared with the same model, batches and optimiser in a plain PyTorch loop; the reader with webdataset and
pyarrow; encoding with its model alone; the download with plain img2dataset; the models with diffusers'.
"""

import statistics
import time
from collections.abc import Callable
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

PAIRS = 10
STEPS = 10
BATCH = 16
TOKENS, WIDTH, SIDE = 77, 1024, 24
MODEL = StageCConfig(width=128, depth=2, heads=4, text_width=WIDTH, dropout=0.0)


def main() -> None:
    """Run every measurement and print one table."""
    lines = Table("what", "figure", box=None, pad_edge=False)
    lines.add_row("machine", f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    ours, plain = [], []
    for _ in range(PAIRS):
        plain.append(_seconds(_plain_loop))
        ours.append(_seconds(_our_loop))
    ratio = statistics.median(a / b for a, b in zip(ours, plain, strict=True))
    lines.add_row("training loop / plain PyTorch loop", f"{ratio:.3f} (median of {PAIRS} pairs of {STEPS} steps)")
    lines.add_row("of which a step", f"{statistics.median(ours) / STEPS * 1000:.0f} ms")
    for what, figure in chain(data.lines(), models.lines()):
        lines.add_row(what, figure)
    Console().print(lines)


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


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
