"""Random numbers of a training step, a function of seed, step and the sample's place in the global batch.

No generator state is ever saved. A run that is resumed, moved to another number of workers, or split into
other micro-batches sees the same noise.
"""

import hashlib

import torch
from torch import Tensor


class Draws:
    """The random numbers of rows `first_row` to `first_row + rows` of step `step`'s batch of `total_rows`.

    Each call draws for the whole global batch, from a generator of its own seeded from (seed, step, number of
    the call), and returns the rows asked for; so all workers and micro-batches must make the same calls in
    the same order. The numbers depend on the device's kind. Dropout inside models draws from torch's global
    generator, not from here.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        first_row: int,
        rows: int,
        total_rows: int,
        device: torch.device | str = "cpu",
    ) -> None:
        assert 0 <= first_row <= first_row + rows <= total_rows
        self.seed = seed
        self.step = step
        self.own = slice(first_row, first_row + rows)
        self.total_rows = total_rows
        self.device = torch.device(device)
        self.calls = 0

    def part(self, rows: slice) -> "Draws":
        """The random numbers of some of these rows."""
        start, stop, _ = rows.indices(self.own.stop - self.own.start)
        return Draws(self.seed, self.step, self.own.start + start, stop - start, self.total_rows, self.device)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, (rows, *shape) fp32."""
        return torch.randn(self.total_rows, *shape, generator=self._generator(), device=self.device)[self.own]

    def uniform(self) -> Tensor:
        """Numbers in [0, 1), one a row, (rows,) fp32."""
        return torch.rand(self.total_rows, generator=self._generator(), device=self.device)[self.own]

    def shared_uniform(self) -> Tensor:
        """One number in [0, 1) for all rows of the step, (rows,) fp32."""
        number = torch.rand(1, generator=self._generator(), device=self.device)
        return number.expand(self.own.stop - self.own.start)

    def _generator(self) -> torch.Generator:
        self.calls += 1
        return torch.Generator(self.device).manual_seed(derived_seed(self.seed, self.step, self.calls))


def derived_seed(*parts: int) -> int:
    """A 63-bit seed that depends on all parts: neighbouring parts give unrelated seeds."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
