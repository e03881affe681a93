"""One step of the optimiser, in pieces of the batch; its learning rate; the moving average that follows the weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from stages.draws import Draws
from stages.settings.training import EmaConfig, TrainingConfig
from stages.training import activity
from stages.training.activity import Activity
from stages.training.optimizer import Optimizer
from stages.training.parallel import Replica, pieces


def learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """Share of the learning rate used by step `step` (from 0): linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / (config.num_steps - config.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def update(
    replica: Replica,
    optimizer: Optimizer,
    batch: dict[str, Tensor],
    draws: Draws,
    rate: float,
    config: TrainingConfig,
    doing: Activity,
) -> dict[str, Tensor]:
    """One step of the optimiser; returns detached scalars. A non-finite gradient leaves the weights alone.

    So do all steps after it, until the host sees it: unless such steps are skipped, and leave no trace in weights,
    moments and buffers.
    """
    skips = config.bad_steps.then == "skip"
    buffers = Buffers(replica.buffers if skips else ())
    replica.forget_gradients()  # before the forward pass, or the old ones lie beside its activations
    cuts = pieces(len(next(iter(batch.values()))), config.micro_batch)
    scalars: dict[str, Tensor] = {}
    replica.same_buffers()
    for number, cut in enumerate(cuts):
        doing.begin(draws.step, activity.FORWARD)
        with replica.accumulating(last=number == len(cuts) - 1):
            with torch.autocast(replica.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, parts = replica.model({key: value[cut] for key, value in batch.items()}, draws.part(cut))
            doing.begin(draws.step, activity.BACKWARD)
            finite = torch.where(loss.detach().isfinite(), 1.0, math.nan)  # so that all ranks see a rank's bad loss
            (loss * finite / len(cuts)).backward()
        for key, value in {"loss": loss, **parts}.items():
            scalars[key] = scalars.get(key, 0) + value.detach() / len(cuts)
    doing.begin(draws.step, activity.UPDATING)
    norm = replica.clip(config.gradient_clip, optimizer.grad_scale)
    # While this flag is 1 the fused kernel skips the update, so the host need not look at each loss. The
    # norm is taken after the ranks have averaged their gradients, so all of them decide alike.
    bad = ~norm.isfinite()
    optimizer.found_inf.copy_(bad if skips else bad | optimizer.found_inf.bool())
    optimizer.advance(rate)
    buffers.put_back(bad)
    return {"loss": scalars.pop("loss"), "gradient_norm": norm, **scalars}


class Buffers:
    """The values of a model's buffers at some time, in few kernels whatever their number: one tensor a dtype."""

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for buffer in buffers:
            kinds.setdefault(buffer.dtype, []).append(buffer)
        self._kept = [(own, _joined(own)) for own in kinds.values()]

    @torch.no_grad()
    def put_back(self, wanted: Tensor) -> None:
        """Give the buffers those values again where `wanted`, () bool, is true; the host need not know."""
        for own, old in self._kept:
            values = torch.where(wanted, old, _joined(own)).split([buffer.numel() for buffer in own])
            torch._foreach_copy_(own, [value.view_as(buffer) for value, buffer in zip(values, own, strict=True)])


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def average_of(state: dict[str, Tensor], ema: EmaConfig) -> dict[str, Tensor]:
    """The moving average at its start, a copy of weights and buffers on the device that it is kept on."""
    return {key: value.to("cpu" if ema.device == "cpu" else value.device, copy=True) for key, value in state.items()}


def moves(config: TrainingConfig, step: int) -> bool:
    """Whether the average moves after `step` steps: every `ema.every` from `ema.start` on, and at the last step."""
    if config.ema is None or step < config.ema.start:
        return False
    return (step - config.ema.start) % config.ema.every == 0 or step == config.num_steps


@torch.no_grad()
def follow(average: dict[str, Tensor], state: dict[str, Tensor], config: TrainingConfig, step: int) -> None:
    """Move the average, BatchNorm statistics included, towards the weights; a copy of them until `ema.start`."""
    assert config.ema is not None
    weight = 1.0 if step <= config.ema.start else 1 - config.ema.decay
    moving = [key for key, value in state.items() if value.is_floating_point()]
    for key in state.keys() - set(moving):
        average[key].copy_(state[key])
    if moving:
        torch._foreach_lerp_(
            [average[key] for key in moving], [state[key].to(average[key].device) for key in moving], weight
        )
