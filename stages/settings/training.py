"""Settings of a training: its phases, optimiser, schedule, and how it is run, watched and saved."""

import math
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from settings import MANNER, Count, Settings, Share, manners
from stages.settings.base import Batch, ChosenPrecision, Precision, Steps


class Phase(Settings):
    """A stretch of a training with one batch size and one image size."""

    steps: Count
    """Steps of the optimiser."""
    batch_size: Batch
    """Images a step, over all workers."""
    size: int = Field(ge=8, le=8192, multiple_of=8)
    """Side of the images, px, or of the square of about their area; a multiple of 128 px but for Stage A."""
    # Squares leave no trace in a fingerprint.
    max_aspect: float = Field(1.0, ge=1.0, le=64.0, exclude_if=lambda ratio: ratio == 1)
    """Largest ratio of the longer to the shorter side; 1: squares, and above it each batch has pictures of one size.

    Sizes of about the same area come in steps of 128 px (aspect-ratio buckets)."""
    view: str | None = Field(None, exclude_if=lambda view: view is None)
    """Which of the pictures it sees, by the name of one of `data.views`; null: all of them."""
    freeze_norm: bool = False
    """Whether BatchNorm works with its running statistics instead of the batch's."""
    reduce: Precision | None = Field(None, exclude_if=lambda precision: precision is None)
    """Numbers in which ranks exchange gradients in this phase; null: those of the whole training."""


class EmaConfig(Settings):
    """Moving average of weights and buffers, which replaces them after the last step."""

    decay: float = Field(gt=0.0, lt=1.0)
    """Share of the old average kept at each update."""
    every: Count
    """Steps between updates."""
    start: Steps
    """Steps during which the average is a plain copy."""
    device: Annotated[Literal["model", "cpu"], MANNER] = "model"
    """Where the average is kept: beside the model, or in the host's memory (cpu), which spares 4 bytes a weight."""


class BadStepsConfig(Settings):
    """What becomes of steps whose loss or gradient is not finite, or whose loss jumps."""

    then: Literal["raise", "skip", "rewind"] = "raise"
    """raise: end the training; skip: leave the step out; rewind: go back to the newest checkpoint, and on behind it.

    `rewind` takes up the weights of that checkpoint and goes on behind the bad step, without what lies between (PaLM,
    arXiv 2204.02311, section 5.1)."""
    at_most: Annotated[int, Field(ge=1, le=10**6)] = 3
    """Bad steps that a training gets over; one more ends it."""
    jump: float | None = Field(None, gt=1.0, le=10.0**6)
    """How many times the usual loss counts as bad too, with then=rewind; null: never.

    The usual loss is a running mean. A jump is seen only after its update, which is why it takes rewind."""

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
    """Held-out samples that each validation looks at, always the same; at most as many as there are."""
    keep: Literal["last", "best"] = "last"
    """Which weights come out: those after the last step, or the best, of the least validation loss.

    Where there is an average, its loss counts. For `best`, `every` is a multiple of checkpoint_every."""


class AugmentConfig(Settings):
    """Changes of the pictures, drawn by the seed each time a training sees one; held-out pictures stay as they are."""

    flip: Share = 0.0
    """Share of the pictures whose left and right are exchanged. A caption that names sides or letters is wrong then."""
    hue: Share = 0.0
    """Share of the pictures whose hue is turned by a random angle: the same things in colours that the data has not.

    For the compressor and Stage B, whose colours come with the code. A caption that names a colour is wrong then."""


class MuonConfig(Settings):
    """Muon, which steps along the momentum of a matrix made orthogonal, so that all its directions count alike."""

    learning_rate: float = Field(gt=0.0, le=100.0)
    """Peak of its learning rate; a step's elements are of a fifth of that, and follow the training's schedule."""
    momentum: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay of the momentum."""


class TrainingConfig(Settings):
    """How a model is trained: all that `stages.training.loop` needs to know."""

    phases: tuple[Phase, ...] = Field(min_length=1, max_length=1000)
    """Stretches of the training, run one after the other."""
    learning_rate: float = Field(gt=0.0, le=100.0)
    """Peak of the learning rate's schedule."""
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (
        0.9,
        0.999,
    )
    """Decays of AdamW's two moments."""
    weight_decay: float = Field(0.01, ge=0.0, le=100.0)
    """Decoupled weight decay of AdamW."""
    muon: MuonConfig | None = Field(None, exclude_if=lambda muon: muon is None)
    """Muon for the matrices of the model's blocks, AdamW for all else; null: AdamW for all.

    Few steps then do what takes AdamW many, each with some more work. It takes whole matrices: `shard` is 1. Each rank
    computes its steps, the same ones only on devices of one kind."""
    warmup_steps: Steps
    """Steps of linear warm-up of the learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a cosine that ends at 1 % of the peak."""
    gradient_clip: float = Field(1.0, gt=0.0, le=10.0**9)
    """Largest norm of the whole gradient."""
    precision: ChosenPrecision = "bf16"
    """Autocast of the forward pass; weights, moments and losses are fp32 in both.

    auto: bf16 where every rank's device computes in it, fp32 elsewhere: a CPU without it takes ten times as long to
    imitate it. A training that goes on elsewhere keeps the one that it began in."""
    checkpointing: Annotated[bool | Literal["auto"], MANNER] = False
    """Whether blocks recompute their activations in the backward pass: a third more work for much less memory.

    auto: where the device's memory is too small by `plan`'s estimate. The result is the same. Stage A, B, C and the
    baseline have such blocks."""
    compile: Annotated[bool | Literal["graphs"], MANNER] = False
    """Whether torch.compile makes kernels for the models' blocks, once for each kind and image size.

    graphs: a GPU then plays these back as CUDA graphs, with no host between a block's kernels, for one worker and whole
    batches; what is no step, validations and panels, runs uncompiled. It has not run on a GPU yet: compare its losses
    with those of true first. Results agree up to rounding and the numbers drawn for dropout."""
    micro_batch: Annotated[Batch | None, MANNER] = None
    """Most rows that a rank takes through the model at a time, adding up their gradients; null: all of its rows.

    What looks at a whole batch, BatchNorm and adaptive weights, then looks at a piece."""
    ranks: Annotated[Annotated[int, Field(ge=1, le=100_000)] | None, MANNER] = None
    """Most ranks that it runs on, of `workers`; null: all of them. Trainings of one step run on as many.

    Where a rank's rows are too few to keep its device busy, fewer ranks take longer for fewer device-hours."""
    shard: Annotated[Annotated[int, Field(ge=1, le=100_000)], MANNER] = 1
    """Ranks over which weights, gradients, moments and average are spread (FSDP2); 1: a copy each (DDP)."""
    deterministic: Annotated[bool, MANNER] = False
    """Whether GPUs take only kernels that give the same bits each time, where there are such; CPUs always do."""
    reduce: Precision = "fp32"
    """Numbers in which ranks exchange gradients: fp32, or bf16 for half the bytes."""
    lanes: int = Field(1, ge=1, le=100_000)
    """Lanes in which samples come, as many as divide all batches; a rank reads the shards of its lanes alone.

    Ranks of which each has as many lanes read each shard about once a pass. 1: every rank reads all of them. Another
    number is another order, as another seed would draw it."""
    ema: EmaConfig | None = None
    """Moving average of the weights, which replaces them in the end; null: none."""
    bad_steps: Annotated[BadStepsConfig, MANNER] = BadStepsConfig()
    """What becomes of steps that go wrong."""
    augment: AugmentConfig | None = Field(None, exclude_if=lambda augment: augment is None)
    """How the pictures change from one time they are seen to the next; null: they do not.

    Latents of what is changed are made as it is read: `encode.latents_a.mode=online` for Stage B and the baseline,
    `encode.latents_c.mode=online` for Stage C and the previewer."""
    log_every: Annotated[Count, MANNER]
    """Steps between log entries.

    A stop request is seen with each, and in between every few seconds."""
    checkpoint_every: Annotated[Count, MANNER]
    """Steps between saved states, a multiple of log_every; the end of each phase is saved too."""
    validation: ValidationConfig | None = None
    """Loss on held-out samples, where `data.holdout` or `data.held_out_captions` hold any out; null: none."""
    panel_every: Annotated[Count | None, MANNER] = None
    """Steps between panels, pictures of how far the training is, a multiple of log_every; null: none."""

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
    def _spread_in_one_precision(self) -> Self:
        if self.shard > 1 and len(self.reduces) > 1:
            raise ValueError(f"phases.reduce must be one for all phases where shard is {self.shard}, as FSDP has one")
        return self

    @model_validator(mode="after")
    def _whole_matrices(self) -> Self:
        if self.muon and self.shard > 1:
            raise ValueError(
                f"muon takes whole matrices, and no rank has any where shard is {self.shard}; leave it null"
            )
        return self

    @model_validator(mode="after")
    def _graphs_hold_a_step(self) -> Self:
        if self.compile == "graphs" and self.micro_batch:
            raise ValueError(
                f"compile=graphs needs micro_batch=null, not {self.micro_batch}: the next piece of a batch would be "
                "reckoned where gradients of the last one lie"
            )
        if self.compile == "graphs" and self.shard > 1:
            raise ValueError(f"compile=graphs needs shard=1, not {self.shard}: FSDP gathers weights in the midst of it")
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

    def ranks_among(self, workers: int) -> int:
        """Ranks that it runs on where there can be so many."""
        return min(self.ranks or workers, workers)

    def parts_pairs(self, world: int) -> bool:
        """Whether an odd number of rows goes through the model at a time on each of `world` workers."""
        rows = [phase.batch_size // world for phase in self.phases]
        return any(min(one, self.micro_batch or one) % 2 for one in rows)

    def divides(self, world: int) -> bool:
        """Whether `require_divisible` accepts so many workers."""
        try:
            self.require_divisible(world)
        except ValueError:
            return False
        return True

    def require_divisible(self, world: int, key: str = "workers") -> None:
        """Raise ValueError unless every phase's batch divides among `world` workers, and into micro-batches there, and
        where graphs are to be recorded on more than one; `key` is the one that says how many they are."""
        if self.compile == "graphs" and world > 1:  # nobody has seen NCCL beside a recording
            raise ValueError(f"compile=graphs is for one worker, not {key}={world}; compile=true is for any number")
        if world % self.shard:
            raise ValueError(f"shard={self.shard} does not divide {key}={world}")
        for number, phase in enumerate(self.phases):
            if phase.batch_size % world:
                raise ValueError(f"phases.{number}.batch_size={phase.batch_size} does not divide among {key}={world}")
            rows = phase.batch_size // world
            if self.micro_batch and rows > self.micro_batch and rows % self.micro_batch:
                raise ValueError(
                    f"micro_batch={self.micro_batch} does not divide the {rows} rows that each of {world} workers has "
                    f"of phases.{number}.batch_size={phase.batch_size}"
                )

    def reduce_in(self, phase: Phase) -> Precision:
        """Numbers in which ranks exchange gradients in a phase."""
        return phase.reduce or self.reduce

    @property
    def reduces(self) -> frozenset[Precision]:
        """Those of all phases."""
        return frozenset(self.reduce_in(phase) for phase in self.phases)

    @property
    def shared_lanes(self) -> int:
        """Lanes in which samples come: of the configured ones as many as divide all batches."""
        return math.gcd(self.lanes, *(phase.batch_size for phase in self.phases))

    @property
    def keeps_best(self) -> bool:
        """Whether validation decides which weights come out."""
        return self.validation is not None and self.validation.keep == "best"

    @property
    def idle(self) -> frozenset[str]:
        """Settings that decide nothing here: a validation that only watches, and lanes that come to one, as ever."""
        return frozenset([*["validation"] * (not self.keeps_best), *["lanes"] * (self.shared_lanes == 1)])

    def begun_with(self, recipe: Mapping[str, object]) -> Self:
        """The settings of a training that goes on from a state of this recipe: `auto` is what it came to then."""
        if self.precision == "auto" and "precision" in recipe:
            return self.model_copy(update={"precision": recipe["precision"]})
        return self

    def recipe(self, seed: int) -> dict[str, object]:
        """What decides the trained weights, as JSON values: all but manners."""
        return {"seed": seed, **self.model_dump(mode="json", exclude=manners(self))}
