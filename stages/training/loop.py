"""The one training loop: every stage trains through `train`.

The loop knows nothing of the objective beyond `(batch, draws) -> (loss, parts)`, and nothing of where
batches come from or where states go. Its clock is the step. Batches, noise, dropout, learning rate and phase
are functions of (seed, step), so a resumed training needs only weights, moments and the step, and continues
bit for bit on the same kind of machine, thread count, world size and micro-batch.
"""

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import nn

from stages.settings.training import TrainingConfig
from stages.training import activity
from stages.training.background import Batch, Encode, ReadBatch, Saver, encodes_ahead, read_ahead
from stages.training.callbacks import Callbacks
from stages.training.checkpoint import Best
from stages.training.report import Report
from stages.training.trainer import Trainer

_STOP_S = 5.0  # at most, or a step, from a wish to stop until it is seen: a node may be taken away within 30 s


@dataclass(frozen=True)
class Outcome:
    """Steps done so far, whether they are all there are, and after which of them the validation loss was least."""

    step: int
    finished: bool
    best: Best | None = None


def train(
    objective: nn.Module,
    read_batch: ReadBatch,
    config: TrainingConfig,
    callbacks: Callbacks,
    *,
    seed: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    encode: Encode | None = None,
) -> Outcome:
    """Train `objective` in place, from the newest saved state if there is one, until done or asked to stop.

    A step takes its batch through the model and updates the weights. Where a log entry is due, bad steps since the
    last one are got over, held-out samples are validated, panels shown (before the first step too), all is logged. With
    each entry, and in between every few seconds, the loop asks whether to stop. Where that is so, or a checkpoint is
    due, it saves the state. In the end the best validated state is restored, where that is to be kept, and the moving
    average, where one is kept, replaces the weights.

    `objective(batch, draws)` returns the mean loss over its rows and named scalars to log; of `<name>` and
    `<name>/share` the quotient is logged. Parameters that require a gradient are trained. Its own `train()` decides
    which parts stay in evaluation mode. `read_batch(step)` returns this rank's rows, `batch_size / world` of them, of
    the step's global batch; it runs in a background thread, ahead of the step. `encode(step, batch)` makes of them what
    the objective sees: in that thread, but on CPUs. With `world > 1` the default process group must exist.

    Raises `ValueError` where a batch size does not divide by `world`, `CheckpointMismatch` for a state of
    another training, `BadSteps` naming the first where `config.bad_steps` does not let it get over them, and what
    `callbacks.save_state` raises.
    """
    config.require_divisible(world)
    trainer = Trainer(objective, config, seed, device, rank, world)
    trainer.resume(callbacks.newest_state())
    report, wish = Report(trainer, callbacks), _WishToStop(trainer, callbacks)
    doing = callbacks.doing
    with (
        closing(_batches(trainer, read_batch, encode, doing)) as batches,
        closing(Saver(callbacks.save_state, device)) as saver,
    ):
        if trainer.step == 0 and config.panel_every:
            _show(trainer, callbacks)
        while not trainer.at_end:
            report.add(trainer.advance(next(batches), doing))
            # The host waits for the device, and ranks for each other, only where one of these is due.
            if logs := trainer.due(config.log_every):
                values = _take_stock(trainer, report, saver, callbacks)
                report.write(values | _validate_and_show(trainer, callbacks))
            stops = not trainer.at_end and wish.is_there(logs)
            if stops and report.unread:
                report.write(_take_stock(trainer, report, saver, callbacks))
            if stops or trainer.due(config.checkpoint_every):
                doing.begin(trainer.step, activity.SAVING)
                saver.save(trainer.checkpoint())
            if stops:
                saver.wait()
                return Outcome(trainer.step, finished=False, best=trainer.best)
        doing.begin(trainer.step, activity.SAVING)
        saver.wait()
    _end(trainer, callbacks)
    return Outcome(trainer.step, finished=True, best=trainer.best)


def _batches(
    trainer: Trainer, read_batch: ReadBatch, encode: Encode | None, doing: activity.Activity
) -> Generator[Batch, None, None]:
    """The batch of every step that is to come, as the objective sees it."""
    steps, device = range(trainer.step, trainer.config.num_steps), trainer.device
    ahead, in_turn = (encode, None) if encodes_ahead(device) else (None, encode)
    with closing(read_ahead(read_batch, steps, device, ahead)) as batches:
        for step in steps:
            doing.begin(step, activity.READING)
            batch = next(batches)
            if in_turn:
                doing.begin(step, activity.ENCODING)
                batch = in_turn(step, batch)
            yield batch


def _take_stock(trainer: Trainer, report: Report, saver: Saver, callbacks: Callbacks) -> dict[str, float]:
    """Do what bad steps since the last time call for; returns what was measured since then."""
    values, bad = report.read()
    if bad and trainer.config.bad_steps.then == "rewind":
        callbacks.doing.begin(trainer.step, activity.SAVING)
        saver.wait()
        trainer.most(0.0)  # all have saved
        if (newest := callbacks.newest_state()) is None:
            key = f"{callbacks.key}.checkpoint_every"
            raise report.ended_by(bad, f"there is no checkpoint to rewind to yet: a smaller {key} makes one earlier")
        trainer.rewind(newest)
    return values


def _validate_and_show(trainer: Trainer, callbacks: Callbacks) -> dict[str, float]:
    """Validate held-out samples, where that is due, and show panels, where those are; returns the losses."""
    config, step, losses = trainer.config, trainer.step, dict[str, float]()
    if callbacks.validation and config.validation and (step % config.validation.every == 0 or trainer.at_end):
        callbacks.doing.begin(step, activity.VALIDATING)
        losses = trainer.validate(callbacks.validation)
    if config.panel_every and (step % config.panel_every == 0 or trainer.at_end):
        _show(trainer, callbacks)
    return losses


def _show(trainer: Trainer, callbacks: Callbacks) -> None:
    """Show what the weights can do; it draws no number that the training draws from."""
    trainer.present(callbacks.show, lambda: callbacks.doing.begin(trainer.step, activity.SHOWING))


def _end(trainer: Trainer, callbacks: Callbacks) -> None:
    """Put the weights that are to come out into the objective."""
    trainer.most(0.0)  # all have saved: from here on any checkpoint is whole
    best = trainer.best
    if callbacks.validation and best and trainer.config.keeps_best and best.step < trainer.step:
        trainer.restore(callbacks.state_after(best.step))
    trainer.finish()


class _WishToStop:
    """Asks whether to stop, with each log entry and in between every few seconds; all ranks after the same steps."""

    def __init__(self, trainer: Trainer, callbacks: Callbacks) -> None:
        self._trainer, self._callbacks = trainer, callbacks
        self._asked_at, self._asked_after, self._next = time.monotonic(), trainer.step, trainer.step + 1

    def is_there(self, now: bool) -> bool:
        """Whether any rank was asked to stop; looks for it `now`, or where it is time."""
        trainer, step = self._trainer, self._trainer.step
        if not now and step < self._next:
            return False
        stop = bool(trainer.most(self._callbacks.should_stop()))
        seconds = trainer.most(time.monotonic() - self._asked_at) / (step - self._asked_after)
        self._asked_at, self._asked_after = time.monotonic(), step
        ends = step in trainer.config.phase_ends  # how long the next one's steps take, nobody knows yet
        self._next = step + (1 if ends else max(1, int(_STOP_S / max(seconds, 1e-6))))
        return stop
