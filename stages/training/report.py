"""The report of a training: what its steps measured, how fast they went, which of them went wrong, what is logged."""

from torch import Tensor

from stages.settings.training import TrainingConfig
from stages.training import activity
from stages.training.bad_steps import BadSteps
from stages.training.callbacks import Callbacks
from stages.training.meter import Meter, Stopwatch, means
from stages.training.trainer import Trainer


class Report:
    """Collects the figures of a trainer's steps, and tells the callbacks."""

    def __init__(self, trainer: Trainer, callbacks: Callbacks) -> None:
        self._trainer, self._callbacks = trainer, callbacks
        self._meter = Meter(trainer.world, trainer.device)
        self._stopwatch = Stopwatch(callbacks.doing, trainer.device, callbacks.flops_of)

    @property
    def unread(self) -> bool:
        """Whether a step was added since the last reading."""
        return bool(self._meter.rows)

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Add what the step that was just done measured; waits for nothing."""
        phase = self._trainer.config.phase_at(self._trainer.step - 1)
        self._meter.add(scalars)
        self._stopwatch.add(phase, phase.batch_size // self._trainer.world)

    def read(self) -> tuple[dict[str, float], list[int]]:
        """Figures since the last reading, the same on all ranks, and the numbers of the steps that went wrong.

        Raises `BadSteps` where these are too many.
        """
        trainer, callbacks = self._trainer, self._callbacks
        callbacks.doing.begin(trainer.step, activity.COMPARING)
        columns, speed = self._meter.read(self._stopwatch.read())
        bad = trainer.watch.find(columns["loss"], columns["gradient_norm"])
        numbers = [trainer.step - len(columns["loss"]) + place for place in bad]
        if bad and trainer.rank == 0:
            callbacks.bad_steps(numbers, trainer.config.bad_steps.then)
        if bad and trainer.watch.ends_training:
            raise _too_many(numbers[0], {name: column[bad[0]] for name, column in columns.items()}, trainer.config)
        counted = {"bad_steps": float(trainer.watch.count)}
        return means(columns, bad) | speed | self._stopwatch.mfu(speed) | counted, numbers

    def write(self, values: dict[str, float]) -> None:
        """Log figures, on rank 0, with the learning rate and the images so far."""
        trainer, doing = self._trainer, self._callbacks.doing
        if trainer.rank == 0:
            doing.begin(trainer.step, activity.LOGGING)
            images = float(trainer.config.images_after(trainer.step))
            self._callbacks.log(trainer.step, {**values, "learning_rate": trainer.learning_rate, "images": images})
        doing.begin(trainer.step, activity.COMPARING)


def _too_many(step: int, values: dict[str, float], config: TrainingConfig) -> BadSteps:
    if config.bad_steps.then == "raise":
        what = "lower learning_rate, or set bad_steps.then to skip or rewind"
    else:
        what = f"these are more than bad_steps.at_most={config.bad_steps.at_most}: lower learning_rate"
    return BadSteps(f"step {step + 1} of the training went wrong: {values}; {what}")
