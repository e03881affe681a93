"""What is `auto` in a training's settings, settled by the devices of all its ranks."""

import logging
import math
from collections.abc import Callable, Mapping

import torch

from stages.anatomy.memory_estimate import GIB
from stages.precision import computes_bf16
from stages.settings.training import TrainingConfig
from stages.training.parallel import most

log = logging.getLogger(__name__)


def settled(
    name: str,
    config: TrainingConfig,
    begun: Mapping[str, object],
    needed: int,
    device: torch.device,
    world: int,
    warn: Callable[[str], None],
) -> tuple[TrainingConfig, dict[str, float]]:
    """The settings without auto, and what they came to, as metrics; all ranks ask, and hear the same.

    begun: the recipe of the state that the training goes on from, whose precision it keeps on other devices too.
    needed: bytes that the training takes of this rank where it recomputes nothing.
    """
    metrics: dict[str, float] = {}
    precision = config.begun_with(begun).precision
    if config.precision == "auto":
        if precision == "auto":
            precision = "fp32" if most(not computes_bf16(device), world, device) else "bf16"
        log.info("%s: precision=auto: %s", name, precision)
        metrics[f"{name}/bf16"] = float(precision == "bf16")
    if precision == "bf16" and not computes_bf16(device):
        why = "fp32, or auto, takes less time here" if config.precision == "bf16" else "it began so elsewhere"
        warn(f"{name}: precision=bf16 is slow where a device can only imitate it; {why}")
    recomputed = config.checkpointing
    if recomputed == "auto":
        least = _least_memory(device, world)
        recomputed = needed > least
        what = "activations are recomputed" if recomputed else "nothing is recomputed"
        log.info("%s: checkpointing=auto: %s; %.1f GiB of %.1f", name, what, needed / GIB, least / GIB)
        metrics[f"{name}/checkpointing"] = float(recomputed)
    return config.model_copy(update={"precision": precision, "checkpointing": recomputed}), metrics


def _least_memory(device: torch.device, world: int) -> float:
    """Bytes of memory of the smallest device of any rank; a CPU has as many as it takes."""
    own = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    return -most(-own, world, device)
