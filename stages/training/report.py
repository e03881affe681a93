"""The report of a training: what its steps measured, how fast they went, which of them went wrong, what is logged."""

from collections.abc import Mapping

from torch import Tensor

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

    def read(self) -> tuple[dict[str, float], dict[int, str]]:
        """Figures since the last reading, the same on all ranks; of each step that went wrong, by its number from 0,
        those that say so, in words.

        Raises `BadSteps` where these are too many.
        """
        trainer, callbacks = self._trainer, self._callbacks
        callbacks.doing.begin(trainer.step, activity.COMPARING)
        columns, speed = self._meter.read(self._stopwatch.read())
        losses, norms = columns["loss"], columns["gradient_norm"]
        places, first = trainer.watch.find(losses, norms), trainer.step - len(losses)
        bad = {first + place: f"loss {losses[place]:g}, gradient norm {norms[place]:g}" for place in places}
        config = trainer.config.bad_steps
        if bad and trainer.rank == 0:
            callbacks.bad_steps(list(bad), config.then)
        if bad and trainer.watch.ends_training:
            lower, key = f"lower {callbacks.key}.learning_rate", f"{callbacks.key}.bad_steps"
            others = f"{lower}, or set {key}.then to skip or rewind"
            over = f"more did than {key}.at_most={config.at_most} allows: {lower}"
            raise self.ended_by(bad, others if config.then == "raise" else over)
        if config.then == "skip":
            trainer.watch.left_out += sum(trainer.config.phase_at(number).batch_size for number in bad)
        counted = {"bad_steps": float(trainer.watch.count)}
        return means(columns, places) | speed | self._stopwatch.mfu(speed) | counted, bad

    def ended_by(self, bad: Mapping[int, str], remedy: str) -> BadSteps:
        """What ends the training at the first of its last bad steps; all ranks ask.

        The remedy is for a model that has learned until then: another one is looked at first.
        """
        step, figures = next(iter(bad.items()))
        if self._trainer.watch.usual_loss is None:
            remedy = "no step has gone well yet: look at its data and at the weights that it starts from"
        elif not self._trainer.is_finite():
            remedy = f"its weights are not finite any more: lower {self._callbacks.key}.learning_rate"
        return BadSteps(f"{self._callbacks.key}: step {step + 1} went wrong ({figures}); {remedy}")

    def write(self, values: dict[str, float]) -> None:
        """Log figures, on rank 0, with the learning rate and the images so far, apart from those left out."""
        trainer, doing = self._trainer, self._callbacks.doing
        if trainer.rank == 0:
            doing.begin(trainer.step, activity.LOGGING)
            left_out = trainer.watch.left_out
            images = {"images": trainer.config.images_after(trainer.step) - left_out, "images_left_out": left_out}
            counted = {name: float(count) for name, count in images.items()}
            self._callbacks.log(trainer.step, {**values, "learning_rate": trainer.learning_rate, **counted})
        doing.begin(trainer.step, activity.COMPARING)
