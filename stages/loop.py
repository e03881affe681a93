"""The one training loop: every stage trains through `train`.

The loop knows nothing of the objective beyond `(batch, draws) -> (loss, parts)`, and nothing of where
batches come from or where states go. Its clock is the step. Batches, noise, dropout, learning rate and phase
are functions of (seed, step), so a resumed training needs only weights, moments and the step, and continues
bit for bit on the same kind of machine, thread count, world size and micro-batch.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages import checkpoint
from stages.checkpoint import Checkpoint, State
from stages.config import EmaConfig, TrainingConfig
from stages.draws import Draws, derived_seed
from stages.layers import checkpoint_blocks
from stages.parallel import Replica, pieces

Batch = dict[str, Tensor]

GRAPHS = 64  # compiled for one model at most, one for each size of images; more would run uncompiled
_READ_AHEAD = 2  # batches waiting in memory while a step runs


class NonFiniteLoss(ValueError):
    """The loss or its gradient is not finite; the weights are those before the step that is named."""


@dataclass(frozen=True)
class Outcome:
    """Steps done so far, and whether they are all there are."""

    step: int
    finished: bool


class _Optimizer(torch.optim.AdamW):
    """Fused AdamW, and the flag that makes it skip updates."""

    def __init__(self, trained: Iterable[nn.Parameter], config: TrainingConfig, device: torch.device) -> None:
        super().__init__(trained, betas=config.betas, weight_decay=config.weight_decay, fused=True)
        self.found_inf = torch.zeros((), device=device)  # named and read by torch, as for GradScaler


class _Saver:
    """Saves states in a background thread, one at a time: training goes on from a copy of the tensors."""

    def __init__(self, save_state: Callable[[int, bytes], None]) -> None:
        self._save_state = save_state
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save_state")
        self._saving: Future[None] | None = None

    def save(self, state: Checkpoint) -> None:
        """Copy the state and start saving it; waits for the one before, and raises what went wrong with that."""
        self.wait()
        tensors = {key: tensor.detach().to("cpu", copy=True) for key, tensor in state.tensors.items()}
        copied = Checkpoint(state.step, state.recipe, tensors, state.rows)
        self._saving = self._pool.submit(lambda: self._save_state(copied.step, checkpoint.dump(copied)))

    def wait(self) -> None:
        """Wait until everything is saved."""
        if self._saving is not None:
            self._saving.result()

    def close(self) -> None:
        """End the thread, after what it is doing."""
        self._pool.shutdown()


class _Meter:
    """Means of the steps' scalars since the last reading, kept on the device in between."""

    def __init__(self, world: int, device: torch.device) -> None:
        self.world, self.device = world, device
        self.names: list[str] = []
        self.rows: list[Tensor] = []

    def add(self, scalars: dict[str, Tensor]) -> None:
        self.names = list(scalars)
        self.rows.append(torch.stack([scalar.float() for scalar in scalars.values()]))

    def read(self, step: int) -> dict[str, float]:
        """Return the means over steps and ranks; raise `NonFiniteLoss` for the first bad step."""
        rows = torch.stack(self.rows)
        if self.world > 1:
            dist.all_reduce(rows)
            rows /= self.world
        self.rows.clear()
        table = rows.cpu()
        bad = ~table[:, :2].isfinite().all(dim=1)  # loss and gradient norm come first
        if bad.any():
            first = int(bad.float().argmax())
            values = dict(zip(self.names, table[first].tolist(), strict=True))
            number = step - len(table) + first + 1
            raise NonFiniteLoss(f"step {number} of the training is not finite: {values}; lower learning_rate")
        return dict(zip(self.names, table.mean(dim=0).tolist(), strict=True))


def train(
    objective: nn.Module,
    read_batch: Callable[[int], dict[str, np.ndarray]],
    config: TrainingConfig,
    *,
    seed: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    load_state: Callable[[], Iterable[bytes] | None],
    save_state: Callable[[int, bytes], None],
    log: Callable[[int, dict[str, float]], None],
    should_stop: Callable[[], bool],
) -> Outcome:
    """Train `objective` in place, from the saved state if there is one, until done or asked to stop.

    `objective(batch, draws)` returns the mean loss over its rows and named scalars to log. Parameters that
    require a gradient are trained. Its own `train()` decides which parts stay in evaluation mode.

    `read_batch(step)` returns this rank's rows, `batch_size / world` of them, of the step's global batch; it
    runs in a background thread, ahead of the step. `load_state` is asked once on every rank and gives all parts
    of the newest state, the same on all. `save_state(step, data)` is called on the first `config.shard` ranks,
    with a part each, in a background thread; `log(step, values)` on rank 0 only; `should_stop` on every rank
    every `log_every` steps: if any rank says yes, all save and return. With `world > 1` the default process
    group must exist.

    After the last step of each phase the state is saved. In the end the moving average, where one is kept, replaces
    the weights.

    Raises `ValueError` where a batch size does not divide by `world`, `CheckpointMismatch` for a state of
    another training, `NonFiniteLoss` naming the step, and what `save_state` raises.
    """
    config.require_divisible(world)
    replica = Replica(objective, device, rank, world, config.shard, config.reduce)
    optimizer = _Optimizer(replica.trained.values(), config, device)
    average = _average(replica.state(), config.ema) if config.ema else None
    recipe = {"seed": seed, **config.arithmetic()}

    def state() -> State:
        return State(replica.state(), replica.trained, optimizer, average, replica.rows())

    step = _resume(load_state(), recipe, state())
    checkpoint_blocks(replica.module, config.checkpointing)
    if config.compile:
        torch._dynamo.config.recompile_limit = GRAPHS
        for part in replica.module.children():  # the models; the objective itself draws random numbers by seed
            part.compile(dynamic=False)
    meter = _Meter(world, device)
    with (
        closing(_read_ahead(read_batch, range(step, config.num_steps), device)) as batches,
        closing(_Saver(save_state)) as saver,
    ):
        for batch in batches:
            _set_mode(replica.model, freeze_norm=config.phase_at(step).freeze_norm)
            rate = config.learning_rate * learning_rate_factor(config, step)
            torch.manual_seed(derived_seed(seed, step, 0, rank))  # dropout; four parts: apart from all seeds of Draws
            total_rows = config.phase_at(step).batch_size
            draws = Draws(seed, step, rank * total_rows // world, total_rows // world, total_rows, device)
            meter.add(_update(replica, optimizer, batch, draws, rate, config))
            step += 1
            if average is not None:
                _follow(average, replica.state(), config, step)

            # The host waits for the device, and ranks for each other, only here.
            if step % config.log_every == 0 or step in config.phase_ends:
                values = meter.read(step)
                if rank == 0:
                    log(step, {**values, "learning_rate": rate, "images": float(config.images_after(step))})
                stop = step < config.num_steps and _any_rank(should_stop(), world, device)
                if replica.writes and (stop or step % config.checkpoint_every == 0 or step in config.phase_ends):
                    now = state()
                    saver.save(Checkpoint(step, recipe, now.snapshot(), now.parts()))
                if stop:
                    saver.wait()
                    return Outcome(step, finished=False)
        saver.wait()
    if average is not None:
        replica.fill(average)
    replica.give_back()
    return Outcome(step, finished=True)


def learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """Share of the learning rate used by step `step` (from 0): linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / (config.num_steps - config.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def _resume(parts: Iterable[bytes] | None, recipe: dict[str, object], state: State) -> int:
    """Restore the saved state, if any, and return the steps it has behind it."""
    if parts is None:
        return 0
    steps = []

    def checked() -> Iterator[Checkpoint]:
        for data in parts:
            saved = checkpoint.load(data)
            checkpoint.require_recipe(saved, recipe)
            steps.append(saved.step)
            yield saved

    state.restore(checked())
    return steps[0]


def _read_ahead(
    read_batch: Callable[[int], dict[str, np.ndarray]], steps: range, device: torch.device
) -> Generator[Batch, None, None]:
    """Yield the batch of every step, on the device, reading the next ones in one background thread."""

    def read(step: int) -> Batch:
        batch = {key: torch.from_numpy(value) for key, value in read_batch(step).items()}
        return {key: value.pin_memory() for key, value in batch.items()} if device.type == "cuda" else batch

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read_batch") as pool:
        submitted = (pool.submit(read, step) for step in steps)
        coming = deque(islice(submitted, _READ_AHEAD))
        while coming:
            batch = coming.popleft().result()
            coming.extend(islice(submitted, 1))
            yield {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _set_mode(model: nn.Module, *, freeze_norm: bool) -> None:
    model.train()
    if freeze_norm:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def _update(
    replica: Replica,
    optimizer: _Optimizer,
    batch: Batch,
    draws: Draws,
    rate: float,
    config: TrainingConfig,
) -> dict[str, Tensor]:
    """One step of the optimiser; returns detached scalars. A non-finite gradient leaves the weights alone."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    replica.forget_gradients()  # before the forward pass, or the old ones lie beside its activations
    cuts = pieces(len(next(iter(batch.values()))), config.micro_batch)
    scalars: dict[str, Tensor] = {}
    for number, cut in enumerate(cuts):
        replica.same_buffers()
        with replica.accumulating(last=number == len(cuts) - 1):
            with torch.autocast(replica.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, parts = replica.model({key: value[cut] for key, value in batch.items()}, draws.part(cut))
            (loss / len(cuts)).backward()
        for key, value in {"loss": loss, **parts}.items():
            scalars[key] = scalars.get(key, 0) + value.detach() / len(cuts)
    norm = replica.clip(config.gradient_clip)
    # Once this flag is 1 the fused kernel skips every update, so the host need not look at each loss. The
    # norm is taken after the ranks have averaged their gradients, so all of them decide alike.
    optimizer.found_inf.copy_((~norm.isfinite()) | optimizer.found_inf.bool())
    optimizer.step()
    return {"loss": scalars.pop("loss"), "gradient_norm": norm, **scalars}


def _average(state: dict[str, Tensor], ema: EmaConfig) -> dict[str, Tensor]:
    """The moving average at its start, a copy of weights and buffers on the device that it is kept on."""
    return {key: value.to("cpu" if ema.device == "cpu" else value.device, copy=True) for key, value in state.items()}


@torch.no_grad()
def _follow(average: dict[str, Tensor], state: dict[str, Tensor], config: TrainingConfig, step: int) -> None:
    """Move the average, BatchNorm statistics included, towards the weights: a copy until `ema.start`.

    It moves every `ema.every` steps from there on, and at the last step of all.
    """
    assert config.ema is not None
    after = step - config.ema.start
    if after < 0 or (after % config.ema.every and step != config.num_steps):
        return
    weight = 1.0 if after == 0 else 1 - config.ema.decay
    for key, value in state.items():
        if value.is_floating_point():
            average[key].lerp_(value.to(average[key].device), weight)
        else:
            average[key].copy_(value)


def _any_rank(stop: bool, world: int, device: torch.device) -> bool:
    if world == 1:
        return stop
    flag = torch.tensor(float(stop), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())
