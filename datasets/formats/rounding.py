"""Tensors stored in fewer bits, and what that takes from them."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Dtype = Literal["fp16", "int8"]


@dataclass(frozen=True)
class Int8:
    """Rows of tensors as whole numbers from -127 to 127; indexing gives a row back in fp32.

    It is off by half a scale at most. Each channel of each row has its own, its largest magnitude over 127: a few
    channels of a text tower are much larger than the others, which a common scale would leave with a handful of steps.
    """

    values: np.ndarray
    """int8 (rows, *shape)."""
    scales: np.ndarray
    """fp32 (rows, 1, ..., channels, ..., 1), as it broadcasts over `values`."""

    @classmethod
    def of(cls, tensors: np.ndarray, channel: int) -> "Int8":
        """Floats (rows, *shape) in 8 bits; `channel` is the axis of the channels, 1 or more."""
        others = tuple(axis for axis in range(1, tensors.ndim) if axis != channel % tensors.ndim)
        scales = (np.abs(tensors).max(axis=others, keepdims=True) / 127).astype(np.float32)
        steps = tensors / np.where(scales > 0, scales, 1)
        return cls(np.rint(steps).clip(-127, 127).astype(np.int8), scales)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int | slice) -> np.ndarray:
        found: np.ndarray = self.values[row] * self.scales[row]
        return found


def rounded(tensors: np.ndarray, dtype: Dtype, channel: int) -> np.ndarray | Int8:
    """Floats (rows, *shape) as they are stored; `channel` is the axis of the channels, for int8.

    Raises:
        OverflowError: a value is not finite, or too large for fp16.
    """
    largest = float(np.abs(tensors).max(initial=0))
    limit = float(np.finfo(np.float16 if dtype == "fp16" else np.float32).max)
    if not largest <= limit:  # nor is NaN
        raise OverflowError(f"values up to {largest:g} do not fit into {dtype}")
    return tensors.astype(np.float16) if dtype == "fp16" else Int8.of(tensors, channel)


@dataclass(frozen=True)
class Rounding:
    """What storing took from tensors: its largest error, the sum of squared errors, and that of the values."""

    max_abs: float
    squared_error: float
    squared: float

    @classmethod
    def of(cls, exact: np.ndarray, stored: "np.ndarray | Int8") -> "Rounding":
        """The difference between tensors and what is read of them later."""
        total = cls(0.0, 0.0, 0.0)
        for row in range(len(exact)):
            values = exact[row].astype(np.float64)
            error = stored[row] - values
            total += cls(float(np.abs(error).max()), float(np.square(error).sum()), float(np.square(values).sum()))
        return total

    def __add__(self, other: "Rounding") -> "Rounding":
        return Rounding(
            max(self.max_abs, other.max_abs),
            self.squared_error + other.squared_error,
            self.squared + other.squared,
        )

    @property
    def relative_rms(self) -> float:
        """Root of the mean squared error over that of the mean square."""
        return float(np.sqrt(self.squared_error / self.squared)) if self.squared else 0.0
