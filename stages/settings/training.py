"""Settings of a training: its phases, optimiser, schedule, and how it is run, watched and saved."""

from bisect import bisect_right
from itertools import accumulate
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.settings.base import Count, Precision, Settings, Weight

EXECUTION = frozenset(
    {
        "log_every",
        "checkpoint_every",
        "checkpointing",
        "compile",
        "device",
        "micro_batch",
        "shard",
        "panel_every",
        "bad_steps",
    }
)
"""Fields of a training that decide how it is run and what is seen of it, not what comes out.

`bad_steps` is one of them although it decides after an accident: a training that ended there can go on with another.
"""


class Phase(Settings):
    """A stretch of a training with one batch size and one image size."""

    steps: Count
    """Steps of the optimiser."""
    batch_size: Count
    """Images a step, over all workers."""
    size: int = Field(ge=8, multiple_of=8)
    """Side of the images in pixels, or of the square of about their area."""
    # Squares leave no trace in a fingerprint.
    max_aspect: float = Field(1.0, ge=1.0, exclude_if=lambda ratio: ratio == 1)
    """Largest ratio of the longer to the shorter side. 1: squares; above it, each batch comes from one aspect-ratio
    bucket, in steps of 128 px."""
    view: str | None = Field(None, exclude_if=lambda view: view is None)
    """Which of the pictures it sees, by the name of a view of the data; None: all of them."""
    freeze_norm: bool = False
    """Whether BatchNorm works with its running statistics instead of the batch's."""


class EmaConfig(Settings):
    """Moving average of weights and buffers, which replaces them after the last step."""

    decay: float = Field(gt=0.0, lt=1.0)
    """Share of the old average kept at each update."""
    every: Count
    """Steps between updates."""
    start: int = Field(ge=0)
    """Steps during which the average is a plain copy."""
    device: Literal["model", "cpu"] = "model"
    """Where it is kept: beside the model, or in the host's memory, which spares the device 4 bytes a weight."""


class BadStepsConfig(Settings):
    """What becomes of steps whose loss or gradient is not finite, or whose loss jumps."""

    then: Literal["raise", "skip", "rewind"] = "raise"
    """raise: end the training before the bad update; skip: leave it out, and go on; rewind: go back to the weights of
    the newest checkpoint, and go on behind the bad step, without what lies between (PaLM, arXiv 2204.02311, section
    5.1)."""
    at_most: Count = 3
    """Bad steps that a training gets over; one more ends it."""
    jump: float | None = Field(None, gt=1.0)
    """How many times the usual loss, a running mean, counts as bad too; needs rewind, for a jump is seen only after
    its update. None: never."""

    @model_validator(mode="after")
    def _jump_rewinds(self) -> Self:
        if self.jump and self.then != "rewind":
            raise ValueError("jump needs then=rewind: a jump is seen only after its update")
        return self


class ValidationConfig(Settings):
    """How a training is measured on samples that it never sees."""

    every: Count
    """Steps between validations, a multiple of log_every; the last step is validated too."""
    samples: Count = 1024
    """Held-out samples that each of them looks at, at most; always the same."""
    keep: Literal["last", "best"] = "last"
    """Which weights come out: those after the last step, or those with the least validation loss, of the average where
    there is one. For `best`, `every` is a multiple of checkpoint_every."""


class TrainingConfig(Settings):
    """How a model is trained: all that `stages.training.loop` needs to know."""

    phases: tuple[Phase, ...] = Field(min_length=1)
    """Run one after the other."""
    learning_rate: float = Field(gt=0.0)
    """Peak of the schedule."""
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (
        0.9,
        0.999,
    )
    """Decay of AdamW's two moments."""
    weight_decay: Weight = 0.01
    """Decoupled weight decay of AdamW."""
    warmup_steps: int = Field(ge=0)
    """Steps of linear warm-up of the learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a cosine that ends at 1 % of the peak."""
    gradient_clip: float = Field(1.0, gt=0.0)
    """Largest norm of the whole gradient."""
    precision: Precision = "bf16"
    """Autocast of the forward pass; weights, moments and losses are fp32 in both."""
    checkpointing: bool = False
    """Whether the blocks of Stage A, B, C and the baseline recompute their activations in the backward pass instead
    of keeping them: a third more computation for a fraction of the memory, and the same result."""
    compile: bool = False
    """Whether torch.compile makes kernels for the models' blocks, once per kind and image size; the results agree up
    to rounding and the numbers drawn for dropout."""
    micro_batch: Count | None = None
    """Most rows that a rank takes through the model at a time, adding up their gradients; None = all of its rows. What
    looks at a whole batch, BatchNorm and adaptive weights, then looks at a piece."""
    shard: Count = 1
    """Ranks over which a copy of weights, gradients, moments and average is spread (FSDP2); 1 = a copy each (DDP)."""
    reduce: Precision = "fp32"
    """In what ranks exchange gradients."""
    ema: EmaConfig | None = None
    """Moving average of the weights, if any."""
    bad_steps: BadStepsConfig = BadStepsConfig()
    """What becomes of steps that go wrong."""
    log_every: Count
    """Steps between log entries; a stop request is seen with each, and in between every few seconds."""
    checkpoint_every: Count
    """Steps between saved states, which are saved at the end of each phase too; a multiple of log_every."""
    validation: ValidationConfig | None = None
    """Loss on held-out samples, where there are any."""
    panel_every: Count | None = None
    """Steps between panels, pictures that show how far the training is; a multiple of log_every; None = no panels."""

    @model_validator(mode="after")
    def _moments_agree(self) -> Self:
        moments = {"panel_every": self.panel_every, "validation.every": self.validation and self.validation.every}
        for name, every in moments.items():
            if every and every % self.log_every:
                raise ValueError(f"{name} ({every}) must be a multiple of log_every ({self.log_every})")
        validation = self.validation
        if validation and self.keeps_best and validation.every % self.checkpoint_every:
            raise ValueError(
                f"validation.every ({validation.every}) must be a multiple of checkpoint_every "
                f"({self.checkpoint_every}) where validation.keep is best: the best weights are those of a saved state"
            )
        if self.panel_every and self.shard > 1:
            raise ValueError(
                f"panel_every must be null where shard is {self.shard}: no rank has whole weights to draw with"
            )
        return self

    @model_validator(mode="after")
    def _steps_agree(self) -> Self:
        if self.checkpoint_every % self.log_every:
            raise ValueError(f"checkpoint_every ({self.checkpoint_every}) must be a multiple of log_every")
        if self.warmup_steps >= self.num_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be below the {self.num_steps} steps of all phases"
            )
        if self.ema and self.ema.start + self.ema.every > self.num_steps:
            raise ValueError(
                f"ema.start + ema.every ({self.ema.start + self.ema.every}) must not exceed the {self.num_steps} steps "
                "of all phases: the average, which replaces the weights, would never have moved"
            )
        return self

    @property
    def num_steps(self) -> int:
        """Steps of all phases together."""
        return sum(phase.steps for phase in self.phases)

    @property
    def phase_ends(self) -> tuple[int, ...]:
        """Steps done at the end of each phase."""
        return tuple(accumulate(phase.steps for phase in self.phases))

    def phase_at(self, step: int) -> Phase:
        """The phase of the step with this number, counted from 0."""
        return self.phases[bisect_right(self.phase_ends, step)]

    def images_after(self, steps: int) -> int:
        """Images seen by all workers in the first `steps` steps."""
        starts = accumulate((phase.steps for phase in self.phases), initial=0)
        return sum(
            phase.batch_size * min(max(steps - start, 0), phase.steps)
            for phase, start in zip(self.phases, starts, strict=False)
        )

    def divides(self, world: int) -> bool:
        """Whether `require_divisible` accepts so many workers."""
        try:
            self.require_divisible(world)
        except ValueError:
            return False
        return True

    def require_divisible(self, world: int) -> None:
        """Raise ValueError unless every phase's batch divides among `world` workers, and into micro-batches there."""
        if world % self.shard:
            raise ValueError(f"shard={self.shard} does not divide workers={world}")
        for number, phase in enumerate(self.phases):
            if phase.batch_size % world:
                raise ValueError(f"phases.{number}.batch_size={phase.batch_size} does not divide among workers={world}")
            rows = phase.batch_size // world
            if self.micro_batch and rows > self.micro_batch and rows % self.micro_batch:
                raise ValueError(
                    f"micro_batch={self.micro_batch} does not divide the {rows} rows that each of {world} workers has "
                    f"of phases.{number}.batch_size={phase.batch_size}"
                )

    @property
    def keeps_best(self) -> bool:
        """Whether validation decides which weights come out."""
        return self.validation is not None and self.validation.keep == "best"

    def recipe(self, seed: int) -> dict[str, object]:
        """What decides the trained weights, as JSON values: all but `EXECUTION`, and validation that only watches."""
        left_out = EXECUTION if self.keeps_best else EXECUTION | {"validation"}
        settings = self.model_dump(mode="json", exclude={**dict.fromkeys(left_out, True), "ema": {"device"}})
        return {"seed": seed, **settings}
