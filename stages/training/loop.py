"""The one training loop: every stage trains through `train`.

The loop knows nothing of the objective beyond `(batch, draws) -> (loss, parts)`, and nothing of where
batches come from or where states go. Its clock is the step. Batches, noise, dropout, learning rate and phase
are functions of (seed, step), so a resumed training needs only weights, moments and the step, and continues
bit for bit on the same kind of machine, thread count, world size and micro-batch.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.draws import Draws, derived_seed
from stages.models.layers import checkpoint_blocks, compile_blocks
from stages.settings.training import EmaConfig, Phase, TrainingConfig
from stages.training import activity, checkpoint
from stages.training.activity import Activity
from stages.training.bad_steps import BadSteps, BadStepsWatch
from stages.training.checkpoint import Best, Checkpoint, State
from stages.training.meter import Meter, Stopwatch, means
from stages.training.parallel import Replica, pieces
from stages.training.validation import Validation

Batch = dict[str, Tensor]

GRAPHS = 256  # compiled at most, one for each kind of block and size of images; more would run uncompiled
_STOP_S = 5.0  # at most, or a step, from a wish to stop until it is seen: a node may be taken away within 30 s
_READ_AHEAD = 2  # batches waiting in memory while a step runs


@dataclass(frozen=True)
class Outcome:
    """Steps done so far, whether they are all there are, and after which of them the validation loss was least."""

    step: int
    finished: bool
    best: Best | None = None


class _Optimizer(torch.optim.AdamW):
    """Fused AdamW, and the flag that makes it skip an update."""

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
        copied = replace(state, tensors=tensors)
        self._saving = self._pool.submit(lambda: self._save_state(copied.step, checkpoint.dump(copied)))

    def wait(self) -> None:
        """Wait until everything is saved."""
        if self._saving is not None:
            self._saving.result()

    def close(self) -> None:
        """End the thread, after what it is doing."""
        self._pool.shutdown()


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
    bad_steps: Callable[[list[int], str], None] = lambda steps, done: None,
    flops_of: Callable[[Phase], float] | None = None,
    doing: Activity | None = None,
    validation: Validation | None = None,
    show: Callable[[int, str], None] | None = None,
) -> Outcome:
    """Train `objective` in place, from the saved state if there is one, until done or asked to stop.

    `objective(batch, draws)` returns the mean loss over its rows and named scalars to log; of `<name>` and
    `<name>/share` the quotient is logged. Parameters that require a gradient are trained. Its own `train()` decides
    which parts stay in evaluation mode.

    `read_batch(step)` returns this rank's rows, `batch_size / world` of them, of the step's global batch; it
    runs in a background thread, ahead of the step. `load_state` is asked at the start, and again where bad steps
    are rewound, on every rank; it gives all parts of the newest state, the same on all. `save_state(step, data)` is
    called on the first `config.shard` ranks, with a part each, in a background thread. `log(step, values)`, and
    `bad_steps(steps, done)` with their numbers from 0 and what is done about them, are called on rank 0 only;
    `should_stop` on every rank after the same steps, with each log entry and at least every few seconds: if any rank
    says yes, all save and return. With `world > 1` the default process group must exist.

    `flops_of(phase)` gives the floating-point operations to train on one image; `doing` is told what goes on. Logged
    figures that begin with `speed/` tell of times: since the last entry, the largest of any rank.

    `validation` holds the samples for `config.validation`, whose losses are logged; None: there are none.
    `show(step, name)` is called on rank 0 every `config.panel_every` steps, in evaluation mode: with the weights in
    place, named `weights`, and with the moving average, where one is kept, named `ema`. Neither changes what is
    trained.

    After the last step of each phase the state is saved. In the end the best validated state is restored, where that is
    to be kept, and the moving average, where one is kept, replaces the weights.

    Raises `ValueError` where a batch size does not divide by `world`, `CheckpointMismatch` for a state of
    another training, `BadSteps` naming the first where `config.bad_steps` does not let it get over them, and what
    `save_state` raises.
    """
    config.require_divisible(world)
    training = _Training(objective, config, seed, device, rank, world)
    training.resume(load_state())
    doing = doing or Activity()
    meter, stopwatch = Meter(world, device), Stopwatch(doing, device, flops_of)
    asked_at, asked_after, ask_next = time.monotonic(), training.step, training.step + 1
    with (
        closing(_read_ahead(read_batch, range(training.step, config.num_steps), device)) as batches,
        closing(_Saver(save_state)) as saver,
    ):

        def measured() -> dict[str, float]:
            """What was measured since the last time, after doing what bad steps among it call for."""
            doing.begin(training.step, activity.COMPARING)
            columns, speed = meter.read(stopwatch.read())
            bad = training.watch.find(columns["loss"], columns["gradient_norm"])
            if bad:
                numbers = [training.step - len(columns["loss"]) + place for place in bad]
                if rank == 0:
                    bad_steps(numbers, config.bad_steps.then)
                if training.watch.ends_training:
                    raise _too_many(numbers[0], {name: column[bad[0]] for name, column in columns.items()}, config)
                if config.bad_steps.then == "rewind":
                    saver.wait()
                    _most(0.0, world, device)  # all have saved
                    training.rewind(load_state(), numbers[0])
            return means(columns, bad) | speed | stopwatch.mfu(speed) | {"bad_steps": float(training.watch.count)}

        def tell(values: dict[str, float]) -> None:
            if rank == 0:
                doing.begin(training.step, activity.LOGGING)
                images = float(config.images_after(training.step))
                log(training.step, {**values, "learning_rate": training.learning_rate, "images": images})
            doing.begin(training.step, activity.COMPARING)

        while training.step < config.num_steps:
            doing.begin(training.step, activity.READING)
            batch = next(batches)
            phase = config.phase_at(training.step)
            meter.add(training.advance(batch, doing))
            stopwatch.add(phase, phase.batch_size // world)

            # The host waits for the device, and ranks for each other, only where one of these is due.
            step, last = training.step, training.step == config.num_steps
            logs = step % config.log_every == 0 or step in config.phase_ends
            if logs:
                values = measured()
                if validation and config.validation and (step % config.validation.every == 0 or last):
                    doing.begin(step, activity.VALIDATING)
                    values |= training.validate(validation)
                if show and config.panel_every and (step % config.panel_every == 0 or last):
                    doing.begin(step, activity.SHOWING)
                    training.present(show)
                tell(values)
            stop = False
            if (logs or step >= ask_next) and not last:
                stop = bool(_most(should_stop(), world, device))
                seconds = _most(time.monotonic() - asked_at, world, device) / (step - asked_after)
                asked_at, asked_after = time.monotonic(), step
                ask_next = step + max(1, int(_STOP_S / max(seconds, 1e-6)))
            if stop and meter.rows:
                tell(measured())
            due = step % config.checkpoint_every == 0 or step in config.phase_ends
            if training.replica.writes and (stop or due):
                doing.begin(step, activity.SAVING)
                saver.save(training.checkpoint())
            if stop:
                saver.wait()
                return Outcome(step, finished=False, best=training.best)
        doing.begin(training.step, activity.SAVING)
        saver.wait()
    if validation and training.best and config.keeps_best and training.best.step < training.step:
        _most(0.0, world, device)  # all have saved
        training.restore(validation.load(training.best.step))
    training.finish()
    return Outcome(config.num_steps, finished=True, best=training.best)


class _Training:
    """Where a training stands on one rank: weights, moments, moving average, steps done; and how it goes on."""

    def __init__(
        self, objective: nn.Module, config: TrainingConfig, seed: int, device: torch.device, rank: int, world: int
    ) -> None:
        self.config, self.seed, self.device, self.rank, self.world = config, seed, device, rank, world
        self.replica = Replica(objective, device, rank, world, config.shard, config.reduce)
        self.optimizer = _Optimizer(self.replica.trained.values(), config, device)
        self.average = _average(self.replica.state(), config.ema) if config.ema else None
        self.recipe = config.recipe(seed)
        self.watch = BadStepsWatch(config.bad_steps)
        self.best: Best | None = None
        self.step = 0
        self.learning_rate = 0.0
        checkpoint_blocks(self.replica.module, config.checkpointing)
        if config.compile:
            torch._dynamo.config.recompile_limit = GRAPHS
            compile_blocks(self.replica.module)

    def state(self) -> State:
        """The live tensors."""
        replica = self.replica
        return State(replica.state(), replica.trained, self.optimizer, self.average, replica.rows())

    def checkpoint(self) -> Checkpoint:
        """All that the training goes on from; its tensors are references."""
        now = self.state()
        return Checkpoint(self.step, self.recipe, now.snapshot(), now.parts(), self.watch.notes(), self.best)

    def restore(self, parts: Iterable[bytes]) -> Checkpoint:
        """Put a saved state's tensors in place; returns one of its parts."""
        found = []

        def checked() -> Iterator[Checkpoint]:
            for data in parts:
                saved = checkpoint.load(data)
                checkpoint.require_recipe(saved.recipe, self.recipe)
                found.append(replace(saved, tensors={}))
                yield saved

        self.state().restore(checked())
        return found[0]

    def resume(self, parts: Iterable[bytes] | None) -> None:
        """Go on from a saved state, if there is one."""
        if parts is not None:
            saved = self.restore(parts)
            self.step, self.best = saved.step, saved.best
            self.watch.restore(saved.notes)

    def rewind(self, parts: Iterable[bytes] | None, bad: int) -> None:
        """Take the weights of a saved state, but go on from this step: what lies between is left out."""
        if parts is None:
            raise BadSteps(f"step {bad + 1} went wrong before the first checkpoint to rewind to")
        self.watch.restore(self.restore(parts).notes)
        self.optimizer.found_inf.zero_()

    def advance(self, batch: Batch, doing: Activity) -> dict[str, Tensor]:
        """Do the next step; returns its scalars."""
        config, step = self.config, self.step
        phase = config.phase_at(step)
        _set_mode(self.replica.model, freeze_norm=phase.freeze_norm)
        self.learning_rate = config.learning_rate * learning_rate_factor(config, step)
        torch.manual_seed(derived_seed(self.seed, step, 0, self.rank))  # dropout; four parts: apart from all of Draws
        own = phase.batch_size // self.world
        draws = Draws(self.seed, step, self.rank * own, own, phase.batch_size, self.device)
        scalars = _update(self.replica, self.optimizer, batch, draws, self.learning_rate, config, doing)
        self.step += 1
        if self.average is not None:
            _follow(self.average, self.replica.state(), config, self.step)
        return scalars

    def validate(self, validation: Validation) -> dict[str, float]:
        """The losses on held-out samples; what comes out would be judged by that of the average, where one is kept."""
        losses = validation.losses(self.replica, self.average, self.config, self.rank)
        loss = losses["validation_loss_ema" if self.average else "validation_loss"]
        if math.isfinite(loss) and (self.best is None or loss < self.best.loss):
            self.best = Best(self.step, loss)
        return losses

    def present(self, show: Callable[[int, str], None]) -> None:
        """Show the weights, and the moving average; on all ranks, which share buffers meanwhile."""
        for name, shown in {"weights": None, "ema": self.average}.items():
            if name == "weights" or shown:
                with self.replica.evaluating(shown):
                    if self.rank == 0:
                        show(self.step, name)

    def finish(self) -> None:
        """Put the outcome into the objective: the moving average, where one is kept."""
        if self.average is not None:
            self.replica.fill(self.average)
        self.replica.give_back()


def _too_many(step: int, values: dict[str, float], config: TrainingConfig) -> BadSteps:
    if config.bad_steps.then == "raise":
        what = "lower learning_rate, or set bad_steps.then to skip or rewind"
    else:
        what = f"these are more than bad_steps.at_most={config.bad_steps.at_most}: lower learning_rate"
    return BadSteps(f"step {step + 1} of the training went wrong: {values}; {what}")


def learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """Share of the learning rate used by step `step` (from 0): linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / (config.num_steps - config.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


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
    doing: Activity,
) -> dict[str, Tensor]:
    """One step of the optimiser; returns detached scalars. A non-finite gradient leaves the weights alone.

    So do all steps after it, until the host sees it: unless such steps are skipped, and leave no trace in weights,
    moments and buffers.
    """
    skips = config.bad_steps.then == "skip"
    buffers = list(replica.module.buffers()) if skips else []
    before = [buffer.clone() for buffer in buffers]
    for group in optimizer.param_groups:
        group["lr"] = rate
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
    norm = replica.clip(config.gradient_clip)
    # While this flag is 1 the fused kernel skips the update, so the host need not look at each loss. The
    # norm is taken after the ranks have averaged their gradients, so all of them decide alike.
    bad = ~norm.isfinite()
    optimizer.found_inf.copy_(bad if skips else bad | optimizer.found_inf.bool())
    optimizer.step()
    for buffer, old in zip(buffers, before, strict=True):
        buffer.copy_(torch.where(bad, old, buffer))
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


def _most(value: float, world: int, device: torch.device) -> float:
    """The largest value of any rank."""
    if world == 1:
        return value
    most = torch.tensor(float(value), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()
