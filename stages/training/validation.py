"""The loss of a training on held-out samples: always the same ones, with the same noise at the same times.

It is computed between two steps of the training, on its own devices. Ray Train can hand a checkpoint to a task on
other devices instead (`ValidationConfig`). That is an alpha, takes one checkpoint at a time, and needs devices that
idle in between and room for the models on them; the scales of `conf/` spend less than 2 % of their time here.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from stages.anatomy.memory_estimate import VALIDATED
from stages.draws import Draws, derived_seed
from stages.settings.training import TrainingConfig
from stages.training.meter import quotients
from stages.training.parallel import Replica


class SampleDraws(Draws):
    """Random numbers of held-out samples `first` and following, of `total`: the same whenever they are drawn.

    Noise comes from a sample's key. Uniform numbers are the middles of `total` equal parts of [0, 1), each used once,
    so that times, crops and dropped captions are spread evenly; which sample has which, its place decides. Both are
    drawn on the CPU, hence the same on all devices.
    """

    def __init__(self, keys: Sequence[bytes], first: int, total: int, device: torch.device) -> None:
        super().__init__(seed=0, step=0, first_row=first, rows=len(keys), total_rows=total, device=device)
        self._numbers = [int.from_bytes(key, "big") for key in keys]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, (rows, *shape) fp32."""
        self.calls += 1
        generators = [torch.Generator().manual_seed(derived_seed(number, self.calls)) for number in self._numbers]
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)

    def uniform(self) -> Tensor:
        """Numbers in [0, 1), one a row, (rows,) fp32."""
        self.calls += 1
        generator = torch.Generator().manual_seed(derived_seed(self.total_rows, self.calls))
        parts = torch.randperm(self.total_rows, generator=generator)
        return ((parts + 0.5) / self.total_rows)[self.own].to(self.device)

    def shared_uniform(self) -> Tensor:
        """As `uniform`: what a step draws once for all its rows is spread over the samples too."""
        return self.uniform()


@dataclass(frozen=True)
class _Piece:
    """Samples that go through the model together; one that counts 0 only keeps step with the other ranks."""

    batch: dict[str, Tensor]
    first: int
    counts: int


class Validation:
    """Held-out samples of a training, as one of its ranks looks at them.

    Args:
        read: `rows` held-out samples from number `first` on; fields as in the training, and `key`, uint8 (rows, 16).
            What this rank looks at is read once and kept in memory.
        rows: how many are held out.
    """

    def __init__(self, read: Callable[[int, int], dict[str, np.ndarray]], rows: int) -> None:
        self._read, self._rows = read, rows
        self._pieces: list[_Piece] | None = None

    def losses(
        self, replica: Replica, average: dict[str, Tensor] | None, config: TrainingConfig, rank: int
    ) -> dict[str, float]:
        """Means over the samples by name: `validation_loss`, every part of it, and both again (`_ema`) for the average.

        And `validation_seconds`, what this took. All ranks call this, each takes a share of the samples, and all get
        the same means.
        """
        assert config.validation is not None
        began = time.monotonic()
        total = min(config.validation.samples, self._rows)
        if self._pieces is None:
            # so many on any number of ranks: so that their losses are the same
            self._pieces = self._share(total, min(VALIDATED, config.micro_batch or VALIDATED), rank, replica.world)
        found = _means(replica, None, self._pieces, total, config, "")
        if average is not None:
            found |= _means(replica, average, self._pieces, total, config, "_ema")
        return {**found, "validation_seconds": time.monotonic() - began}

    def _share(self, total: int, size: int, rank: int, world: int) -> list[_Piece]:
        """The pieces of this rank: as many as every other one's, since spread weights are gathered by all together."""
        starts = range(0, total, size)
        each = -(-len(starts) // world)
        own = starts[rank * each : (rank + 1) * each]
        pieces = []
        for start in own or starts[:1]:
            rows = min(size, total - start)
            batch = {name: torch.from_numpy(values) for name, values in self._read(start, rows).items()}
            pieces.append(_Piece(batch, start, rows if own else 0))
        return pieces + [_Piece(pieces[0].batch, pieces[0].first, 0)] * (each - len(pieces))


def _means(
    replica: Replica,
    average: dict[str, Tensor] | None,
    pieces: Sequence[_Piece],
    total: int,
    config: TrainingConfig,
    suffix: str,
) -> dict[str, float]:
    sums: dict[str, Tensor] = {}
    with replica.evaluating(average) as objective:
        for piece in pieces:
            batch = {name: values.to(replica.device) for name, values in piece.batch.items()}
            keys = [bytes(key) for key in piece.batch["key"].numpy()]
            draws = SampleDraws(keys, piece.first, total, replica.device)
            with torch.autocast(replica.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, parts = objective(batch, draws)
            for name, value in {"loss": loss, **parts}.items():
                sums[name] = sums.get(name, 0) + value.double() * piece.counts
    table = torch.stack(list(sums.values())) / total
    if replica.world > 1:
        dist.all_reduce(table)
    found = quotients(dict(zip(sums, table.tolist(), strict=True)))
    return {f"validation_{name}{suffix}": value for name, value in found.items()}
