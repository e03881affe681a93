"""`python -m tests.bench.fake_step`: what a training step of full size could reach at best, by card; needs no card.

The training's own step runs on a card that is not there (`tests.bench.fake_cuda`), its kernels are counted
(`tests.bench.counting`) and priced by data sheet, each on its own. Of a training that compiles its blocks, the kernels
are those that torch's compiler leaves of them (`tests.bench.fake_compiler`), and move less. No kernel is as good as
its price, so this is a bound, not a forecast.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from stages.anatomy import flops, memory_estimate
from stages.anatomy.memory_estimate import GIB
from stages.draws import Draws
from stages.models.compressor import Compressor
from stages.models.discriminator import Discriminator
from stages.models.stage_a import StageA, StageAObjective
from stages.models.stage_b import StageB, StageBObjective
from stages.models.stage_c import StageC, StageCObjective
from stages.settings.losses import StageALoss, StageBLoss, StageCLoss
from stages.settings.models import CompressorConfig, StageAConfig, StageBConfig, StageCConfig
from stages.settings.training import TrainingConfig
from stages.training.activity import Activity
from stages.training.trainer import Trainer
from tests.bench.counting import Counter, Work
from tests.bench.fake_compiler import fake_compiler
from tests.bench.fake_cuda import CUDA, fake_cuda, record
from tests.bench.figures import Line, at_least

TOKENS = 77
BANDWIDTH_REACHED = 0.8  # of a data sheet's bandwidth, by large copies
CARDS = {  # torch's name, and bytes a second by the makers' data sheets
    "H200": ("NVIDIA H200", 4.8e12),
    "A100": ("NVIDIA A100-SXM4-80GB", 2.039e12),
}
COMPRESSOR = CompressorConfig(batch_norm="fixed")


@dataclass(frozen=True)
class Case:
    """A training step: a model's config, px of its pictures, those that a card takes at a time, how it is trained."""

    name: str
    model: StageAConfig | StageBConfig | StageCConfig
    size: int
    rows: int
    changes: dict[str, Any]
    bars: dict[str, float] = field(default_factory=dict)  # MFU at best, by card
    compressor: CompressorConfig = COMPRESSOR

    def changed(self, changes: dict[str, Any]) -> "Case":
        """The same, trained in another way."""
        return replace(self, changes=self.changes | changes)

    @property
    def training(self) -> TrainingConfig:
        """Only what decides what a step computes; the average moves with it."""
        values: dict[str, Any] = {
            "phases": [{"steps": 10, "batch_size": self.rows, "size": self.size}],
            "learning_rate": 1e-4,
            "warmup_steps": 0,
            "log_every": 1,
            "checkpoint_every": 1,
            "bad_steps": {"then": "skip"},
        }
        return TrainingConfig.model_validate(values | self.changes)

    def objective(self) -> nn.Module:
        """With the losses of `scale=paper`, but for VGG16's, whose weights are not ours."""
        if isinstance(self.model, StageAConfig):
            return StageAObjective(StageA(self.model), LOSS_A, Discriminator())
        null_text = torch.zeros(TOKENS, self.model.text_width)
        if isinstance(self.model, StageBConfig):
            return StageBObjective(StageB(self.model), Compressor(self.compressor), StageBLoss(), null_text)
        return StageCObjective(StageC(self.model), StageCLoss(), null_text)

    def batch(self) -> dict[str, Tensor]:
        """As the loop hands it on: storage's dtypes."""
        side, code = self.size // 4, self.compressor.code_side(self.size)
        half: dict[str, Any] = {"dtype": torch.float16}
        image = torch.empty(self.rows, 3, self.size, self.size, dtype=torch.uint8)
        if isinstance(self.model, StageAConfig):
            return {"image": image}
        text = torch.empty(self.rows, TOKENS, self.model.text_width, **half)
        if isinstance(self.model, StageBConfig):
            return {"image": image, "text": text, "latents_a": torch.empty(self.rows, 4, side, side, **half)}
        return {"text": text, "latents_c": torch.empty(self.rows, 16, code, code, **half)}

    @property
    def model_flops(self) -> float:
        """Of a step, by the architecture alone."""
        if isinstance(self.model, StageAConfig):
            side = LOSS_A.crop or self.size
            forward = flops.encode_a(self.model, side, side) + flops.decode_a(self.model, side, side)
        elif isinstance(self.model, StageBConfig):
            forward = flops.stage_b(self.model, self.size // 4, self.size // 4, TOKENS)
            forward += flops.encode_c(COMPRESSOR, self.compressor.seen_side(self.size))
        else:
            forward = flops.stage_c(self.model, *[self.compressor.code_side(self.size)] * 2, TOKENS)
        return 3.0 * forward * self.rows

    @property
    def planned(self) -> int:
        """Bytes by `plan`'s estimate, without what stands for torch itself."""
        if isinstance(self.model, StageAConfig):
            found = memory_estimate.train_a(self.model, LOSS_A, self.training, workers=1)
        elif isinstance(self.model, StageBConfig):
            found = memory_estimate.train_b(self.model, self.compressor, True, TOKENS, self.training, workers=1)
        else:
            found = memory_estimate.train_c(self.model, self.compressor, TOKENS, self.training, workers=1)
        return found.total - found.runtime


LOSS_A = StageALoss(
    l1=0.0, mse=1.0, colour=0.0, quantised=0.9, coin="sample", crop=128, adversarial=0.01, adversarial_start=0
)
HALF: dict[str, Any] = {"precision": "bf16"}
EMA: dict[str, Any] = {"ema": {"decay": 0.9, "every": 1, "start": 0}}
RECOMPUTED = {"checkpointing": True}
COMPILED = {"compile": True}
CASES = [
    Case("Stage C 24x24, 24 rows", StageCConfig(), 1024, 24, HALF | EMA),
    Case("Stage C 24x24, 24 rows, checkpointing", StageCConfig(), 1024, 24, HALF | EMA | RECOMPUTED),
    Case(
        "Stage C 24x24, 24 rows, compiled",
        StageCConfig(),
        1024,
        24,
        HALF | EMA | COMPILED,
        bars={"H200": 0.56, "A100": 0.60},
    ),
    Case("Stage C 12x12, 24 rows", StageCConfig(), 512, 24, HALF | EMA),
    Case("Stage C 12x12, 24 rows, compiled", StageCConfig(), 512, 24, HALF | EMA | COMPILED),
    Case("Stage B 128x128, 8 rows", StageBConfig(), 512, 8, HALF),
    Case("Stage B 128x128, 8 rows, compiled", StageBConfig(), 512, 8, HALF | COMPILED),
    Case("Stage B 256x256, 2 rows", StageBConfig(), 1024, 2, HALF),
    Case("Stage A 128 px, 4 rows", StageAConfig(), 256, 4, {"precision": "fp32"}),
]


def main() -> None:
    """Print the table."""
    for line in lines():
        print(f"{line.what:<48} {line.figure}{f'  ({line.bar})' if line.bar else ''}", flush=True)


def lines() -> Iterator[Line]:
    """Each case's operations, traffic, memory and utilisation."""
    for case in CASES:
        began = time.process_time()
        work = step(case)
        used = {card: utilisation(case, work, card) for card in CARDS}
        shown = ", ".join(f"{card} {share:.0%} in {1e3 * best(work, card):.0f} ms" for card, share in used.items())
        figure = (
            f"MFU at best {shown}; {work.operations:,} operations, {work.bytes / 1e9:.0f} GB, "
            f"{work.flops / 1e12:.1f} TFLOP, peak {work.peak / GIB:.1f} GiB (plan {case.planned / GIB:.1f}); "
            f"{time.process_time() - began:.0f} CPU-seconds"
        )
        if case.training.compile:
            figure += f"; blocks as torch {torch.__version__} partitions and fuses them for an H200"
        what = f"at best: {case.name}"
        yield Line(what, figure)
        for card, bar in case.bars.items():
            yield at_least(f"{what}, {card}", f"MFU {used[card]:.1%}", used[card], bar)


def step(case: Case) -> Work:
    """What one step of a training that is under way does on the card."""
    with fake_cuda() as card, fake_compiler(card):
        trainer = Trainer(case.objective(), case.training, 0, CUDA, 0, 1)
        trained = list(trainer.replica.trained.values())
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        trainer.optimizer.advance(0.0)  # makes the moments
        trainer.replica.forget_gradients()
        nodes, batch = record(trained), case.batch()
        moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
        kept = [*trainer.replica.state().values(), *(trainer.average or {}).values(), *moments, *batch.values()]
        card.listener = counter = Counter(kept)
        trainer.advance(batch, Activity())
        card.listener = None
        del nodes
    return counter.work


@contextmanager
def drawn_on_cpu() -> Iterator[None]:
    """Meanwhile a step's noise is drawn on the CPU and moved: the same numbers on all devices."""
    normal, uniform, shared = Draws.normal, Draws.uniform, Draws.shared_uniform

    def there(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn(draws: Draws, *shape: int) -> Tensor:
            device, draws.device = draws.device, torch.device("cpu")
            numbers = draw(draws, *shape)
            draws.device = device
            return numbers.to(device)

        return drawn

    with (
        patch.object(Draws, "normal", there(normal)),
        patch.object(Draws, "uniform", there(uniform)),
        patch.object(Draws, "shared_uniform", there(shared)),
    ):
        yield


def best(work: Work, card: str) -> float:
    """Seconds of the work on a card, at best."""
    name, bandwidth = CARDS[card]
    return work.seconds(flops.PEAKS[name], BANDWIDTH_REACHED * bandwidth)


def utilisation(case: Case, work: Work, card: str) -> float:
    """Model FLOPs over what the card's peak would do in that time."""
    return case.model_flops / best(work, card) / flops.PEAKS[CARDS[card][0]]


if __name__ == "__main__":
    main()
