"""What a training measures: the scalars of its steps, and how fast they go."""

import math
import resource
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from stages.anatomy import flops
from stages.settings.training import Phase
from stages.training import activity
from stages.training.activity import Activity

SHARE = "/share"  # after the name of a scalar: how much of the batch that is a mean of
SPEED = "speed/"  # before the names of figures that tell of times, so differ from run to run


class Meter:
    """The steps' scalars since the last reading, kept on the device in between."""

    def __init__(self, world: int, device: torch.device) -> None:
        self.world, self.device = world, device
        self.names: list[str] = []
        self.rows: list[Tensor] = []

    def add(self, scalars: dict[str, Tensor]) -> None:
        self.names = list(scalars)
        self.rows.append(torch.stack([scalar.float() for scalar in scalars.values()]))

    def read(self, speed: dict[str, float]) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Each scalar's values, one a step, means over the ranks; and of each figure of `speed` the largest of any
        rank: all go at the same pace, only some of them save, and the fullest memory matters. The same on all ranks."""
        rows, figures = torch.stack(self.rows), torch.tensor(list(speed.values()), device=self.device)
        if self.world > 1:
            dist.all_reduce(rows)
            rows /= self.world
            dist.all_reduce(figures, dist.ReduceOp.MAX)
        self.rows.clear()
        columns = dict(zip(self.names, rows.T.tolist(), strict=True))
        return columns, dict(zip(speed, figures.tolist(), strict=True))


class Stopwatch:
    """How fast a rank trains, between one reading and the next."""

    def __init__(self, doing: Activity, device: torch.device, flops_of: Callable[[Phase], float]) -> None:
        self.doing, self.device, self.flops_of = doing, device, flops_of
        # FLOP/s of this rank's card, where they are known: the ranks' cards may differ
        self.peak = flops.PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.start()

    def start(self) -> None:
        """Count from here."""
        self.began, self.images, self.flops = time.perf_counter(), 0, 0.0
        self.doing.take_seconds()

    def add(self, phase: Phase, images: int) -> None:
        """So many images of a phase went through."""
        self.images += images
        self.flops += images * self.flops_of(phase)

    def read(self) -> dict[str, float]:
        """The figures since the last start, this device's; starts anew. On all ranks figures of the same names."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds, spent = time.perf_counter() - self.began, self.doing.take_seconds()
        figures = {
            "images_per_second": self.images / seconds,
            "waiting_for_data": spent.get(activity.READING, 0.0) / seconds,
            "saving": spent.get(activity.SAVING, 0.0) / seconds,
            "memory_gib": _peak_bytes(self.device) / 2**30,
        }
        if self.flops:  # else nobody knows them, on any rank
            figures["tflops"] = self.flops / seconds / 1e12
        self.start()
        return {f"{SPEED}{name}": value for name, value in figures.items()}

    def mfu(self, figures: dict[str, float]) -> dict[str, float]:
        """Model FLOPs utilisation, the share of this rank's card's peak that the figures reached; none if unknown."""
        tflops = figures.get(f"{SPEED}tflops")
        return {f"{SPEED}mfu": tflops * 1e12 / self.peak} if tflops is not None and self.peak else {}


def means(columns: dict[str, list[float]], bad: list[int]) -> dict[str, float]:
    """Of each scalar, the mean over the good steps; none where there are none."""
    good = [place for place in range(len(columns["loss"])) if place not in bad]
    return quotients(
        {name: math.fsum(column[place] for place in good) / len(good) for name, column in columns.items() if good}
    )


def quotients(means: dict[str, float]) -> dict[str, float]:
    """Of `<name>` and `<name>/share` the quotient, by that name; neither where the share is 0."""
    whole = {name: value for name, value in means.items() if not name.endswith(SHARE)}
    for name, share in means.items():
        if name.endswith(SHARE):
            value = whole.pop(name.removesuffix(SHARE))
            if share:
                whole[name.removesuffix(SHARE)] = value / share
    return whole


def _peak_bytes(device: torch.device) -> int:
    """Most bytes that this process has held of the device's memory, or of the host's where it trains on that."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # kB but there
