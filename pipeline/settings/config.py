"""The config: frozen, typed values, checked as they are built; code below never sees a Hydra object.

An unknown key, a wrong type or an impossible combination is refused here, before anything is created. Imports nothing
heavy: `plan` stays quick.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from datasets.buckets import Frame
from datasets.config import DataConfig
from datasets.files import storage
from datasets.files.inputs import Bundled, Input, Rows, Whole
from datasets.sources import table
from pipeline.errors import UsageError
from pipeline.settings import checks
from pipeline.settings.evaluation import HELD_OUT, TRAINING, Eval, is_ours
from pipeline.settings.keys import is_below
from pipeline.settings.resources import Budget, Cluster, Tracking
from pipeline.settings.sections import (
    STAGES,
    WARMUP,
    Baseline,
    Compressor,
    Encode,
    Interpolation,
    Previewer,
    Sampling,
    Stage,
    StageA,
    StageB,
    StageC,
)
from pipeline.store import identity
from settings import FILES, PLACE, TABLE, WEIGHTS, Settings, Text, manners, paths
from stages.settings.models import TextConfig
from stages.settings.training import TrainingConfig

TOKENIZER = Bundled("open_clip", "bpe_simple_vocab_16e6.txt.gz")  # of every text tower
Origin = Literal["train", "import", "interpolate"]


TRAININGS = {  # step: the trainings that it runs, by dotted key
    "train_a": ("stage_a.train",),
    "train_b": (WARMUP, "stage_b.train"),
    "train_c": ("stage_c.train",),
    "train_previewer": ("previewer.train",),
    "train_baseline": ("baseline.train",),
}


class Config(Settings):
    """One experiment, fully resolved."""

    targets: tuple[Text, ...] = Field(min_length=1, max_length=1000)
    """Artifacts to build, with whatever they need.

    Their names are the column `makes` of the DAG's table, pipeline/plan/table.py."""
    seed: int = Field(ge=0, lt=2**32)
    """Draws the plan, initial weights, the batches' order, noise and samples."""
    workers: Annotated[int, Field(ge=1, le=100_000)]
    """Ranks of each training, but for those that want fewer (`ranks`); a rank is a process with its own device.

    The global batch stays what the phases say."""
    data: DataConfig
    """Where pictures and captions come from, which are taken, and how they are stored."""
    text: dict[Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$", max_length=64)], TextConfig] = Field(min_length=1)
    """Text towers by name, of which the stages choose."""
    encode: Encode = Encode()
    """How outputs of the encoders come to the trainings."""
    stage_a: StageA
    """Stage A, the VQGAN between pixels and latents."""
    compressor: Compressor
    """The semantic compressor, which makes the codes that Stage C learns."""
    stage_b: StageB
    """Stage B, the diffusion model of latents, given a code and a caption."""
    stage_c: StageC
    """Stage C, the diffusion model of codes, given a caption."""
    interpolate: Interpolation | None = None
    """Stage C as the weights between two others, or between two of its own phases; null: none."""
    previewer: Previewer
    """The previewer: codes straight to small pictures (conf=previewer)."""
    baseline: Baseline
    """The baseline: latent diffusion without codes, to compare with (conf=baseline_ldm)."""
    sample: Sampling
    """How pictures are drawn from captions."""
    eval: Eval
    """On which prompts, by which scorers and against which rivals the model is measured."""
    cluster: Cluster
    """Where the work runs, as `cluster=` chooses it; it changes no result."""
    budget: Budget = Budget()
    """What a run may cost; it changes no result."""
    tracking: Tracking
    """MLflow, as `tracking=` chooses it."""
    rates: dict[Text, Annotated[float, Field(gt=0.0, le=10.0**9)]]
    """Work of a step in a device-second, by the step's name, for `plan`'s estimates.

    Work is images seen for trainings, and rows for most others. A step may have no rate."""

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        for stage in STAGES:
            if self.origin(stage) == "import":
                checks.has_an_origin(stage, getattr(self, stage))
        if self.between:
            checks.lies_between(self.between, self.stage_c)
        checks.tower_fits("stage_b", self.stage_b, self.text)
        checks.tower_fits("stage_c", self.stage_c, self.text)
        checks.tower_fits("baseline", self.baseline, self.text)
        checks.channels_agree(self.stage_a, self.compressor, self.stage_b, self.stage_c, self.previewer, self.baseline)
        checks.latents_are_a_quarter(self.stage_a.model)
        checks.can_be_released(self.targets, self.stage_c.model)
        checks.samples_are_squares(self.sample)
        checks.prompt_sets_are_there(self.eval.prompts, self.prompt_sets(), self.data.holds_out)
        checks.rivals_are_known(self.eval, self.prompt_sets())
        return self

    @model_validator(mode="after")
    def _pictures_fit(self) -> Self:
        image, trainings = self.data.image, self.trainings()
        needs = {"previewer.train": self._needs_previewer(), "baseline.train": self._needs_baseline()}
        see = {key: training for key, training in trainings.items() if needs.get(key, True)}
        checks.sizes_in_steps(trainings)
        checks.sizes_fit(see, image)
        checks.aspects_fit(see, image)
        checks.stored_in_steps(image)
        checks.views_exist(trainings, self.data.views)
        checks.losses_can_judge(self.stage_a, self._shortest("train_a"))
        checks.codes_have_a_side(self.compressor.model, self._shortest("train_b", "train_c", "train_previewer"))
        return self

    @model_validator(mode="after")
    def _latents_are_encoded(self) -> Self:
        """Latents are stored for the trainings of Stage B and C, and others take those; checked where it matters."""
        for latents, teacher, student, wanted in (
            ("latents_c", "stage_c", "previewer", self._needs_previewer()),
            ("latents_a", "stage_b", "baseline", self._needs_baseline()),
        ):
            online = getattr(self.encode, latents).online
            stored = self.frames_of(f"train_{teacher[-1]}")
            if latents in self.targets:
                checks.latents_are_stored(latents, online, teacher, stored)
            if wanted and not online:
                checks.latents_suffice(latents, teacher, stored, student, self.frames_of(f"train_{student}"))
        return self

    @model_validator(mode="after")
    def _trainings_can_run(self) -> Self:
        trainings = self.trainings()
        losses = {f"{key}.train": getattr(self, key).loss for key in ("stage_b", "stage_c", "baseline")}
        adaptive = {key for key, loss in losses.items() if loss.weight == "adaptive"}
        checks.best_can_be_told(trainings, self.data.holds_out, adaptive)
        checks.panels_can_be_drawn(trainings)
        checks.pictures_can_be_augmented(trainings, self.encode)
        checks.blocks_can_be_recomputed(trainings)
        checks.muon_has_matrices(trainings)
        checks.fewer_workers_are_fewer(self.cluster.min_workers, self.workers)
        checks.workers_have_nodes(self.workers, self.cluster)
        for keys in TRAININGS.values():
            checks.ranks_agree({key: trainings[key] for key in keys if key in trainings}, self.workers)
        checks.batches_divide(trainings, self.workers)
        if self.mixes("stage_c.train"):
            checks.pairs_stay_together("stage_c.train", trainings["stage_c.train"], self.workers)
        return self

    def _shortest(self, *steps: str) -> int:
        """The shortest side of what trainings see, px; of what is stored, where there are none."""
        sides = (frame.shortest for step in steps for frame in self.frames_of(step))
        return min(sides, default=self.data.image.size)

    def _needs_previewer(self) -> bool:
        return "previewer" in self.targets or "preview" in self.sample.ablations

    def _needs_baseline(self) -> bool:
        return self.eval.baseline or not {"baseline", "baseline_samples"}.isdisjoint(self.targets)

    @property
    def between(self) -> Interpolation | None:
        """What Stage C lies between, if it does."""
        alone = self.stage_c.train is None and self.interpolate is not None and not self.interpolate.paths
        return None if alone else self.interpolate

    def origin(self, stage: Stage) -> Origin:
        """How stage_a, stage_b or stage_c comes about: the verb of the step that makes it."""
        if stage == "stage_c" and self.between:
            return "interpolate"
        return "train" if getattr(self, stage).train else "import"

    def trained(self, stage: Stage) -> str:
        """Name of the artifact that a training of the stage makes: another one where its phases are interpolated."""
        return "stage_c_phases" if stage == "stage_c" and self.between and self.between.phases else stage

    def is_trained(self, stage: Stage) -> bool:
        """Whether a stage's weights come from a training of this config, and not from existing ones."""
        return self.origin(stage) == "train" or self.trained(stage) != stage

    def trainings(self) -> dict[str, TrainingConfig]:
        """Every training that this config wants, by its dotted key."""
        stages = [stage for stage in STAGES if self.is_trained(stage)]
        found = {f"{name}.train": getattr(self, name).train for name in (*stages, "previewer", "baseline")}
        if self.compressor.warmup and "stage_b.train" in found and not self.stage_b.weights:
            found[WARMUP] = self.compressor.warmup.train
        return found

    def trainings_of(self, step: str) -> dict[str, TrainingConfig]:
        """The trainings that a step runs, by the name of what is trained; none for most steps."""
        trainings = self.trainings()
        return {key.partition(".")[0]: trainings[key] for key in TRAININGS.get(step, ()) if key in trainings}

    @property
    def towers(self) -> dict[str, str]:
        """The text tower that a training reads, by its step."""
        return {"train_b": self.stage_b.text, "train_c": self.stage_c.text, "train_baseline": self.baseline.text}

    def cut_up(self, step: str) -> list[str]:
        """The step's trainings, by dotted key, to which `micro_batch` is no manner: BatchNorm sees a piece at once."""
        normalised = {"stage_a.train", WARMUP, "previewer.train", *(["stage_b.train"] * self.compressor.joint)}
        cut = {key for key, training in self.trainings().items() if training.micro_batch}
        return [key for key in TRAININGS[step] if key in normalised & cut]

    def in_bf16(self) -> list[str]:
        """The keys that ask for bf16, of trainings and sampling."""
        settings = {f"{key}.precision": training.precision for key, training in self.trainings().items()}
        settings |= {"sample.precision": self.sample.precision}
        settings |= {
            f"encode.{field}.precision": getattr(self.encode, field).precision for field in ("text", "latents_a")
        }
        settings |= {f"data.captioners.{name}.precision": made.precision for name, made in self.data.captioners.items()}
        return [key for key, precision in settings.items() if precision == "bf16"]

    def ranks_of(self, step: str) -> int:
        """Ranks of a training step while no node is lost: `workers`, or the fewer that all its trainings want."""
        return min((one.ranks_among(self.workers) for one in self.trainings_of(step).values()), default=self.workers)

    def ranks_key(self, step: str) -> str:
        """The key that says how many these are."""
        trainings = self.trainings()
        ours = [key for key in TRAININGS.get(step, ()) if key in trainings]
        return checks.ranks_key(ours[-1], trainings[ours[-1]], self.workers) if ours else "workers"

    def worlds_of(self, step: str) -> list[int]:
        """Numbers of ranks with which a training step can go on, descending from `ranks_of`: all batches divide.

        Where these are fewer than `cluster.min_workers` anyway, it goes on with no other number."""
        ranks = self.ranks_of(step)
        least = min(self.cluster.min_workers or ranks, ranks)
        return [world for world in range(ranks, least - 1, -1) if self.divides(step, world)]

    def divides(self, step: str, ranks: int) -> bool:
        """Whether all batches of a training step divide among so many ranks, and no pair is parted that is mixed."""
        ours = [(key, training) for key, training in self.trainings().items() if key in TRAININGS.get(step, ())]
        return all(
            training.divides(ranks) and not (self.mixes(key) and training.parts_pairs(ranks)) for key, training in ours
        )

    def mixes(self, key: str) -> bool:
        """Whether a training, by its dotted key, is wanted and mixes its samples in pairs."""
        return key == "stage_c.train" and self.stage_c.loss.mixup > 0 and key in self.trainings()

    def stretches_of(self, step: str) -> list[tuple[Frame, str | None]]:
        """Frames and views in which the phases of a training step see the pictures, each pair once."""
        phases = [phase for training in self.trainings_of(step).values() for phase in training.phases]
        return list(dict.fromkeys((Frame(phase.size, phase.max_aspect), phase.view) for phase in phases))

    def frames_of(self, step: str) -> list[Frame]:
        """How the phases of a training step see the pictures, ascending by size."""
        return sorted({frame for frame, _ in self.stretches_of(step)})

    def views_of(self, step: str) -> tuple[str, ...]:
        """Artifacts of the views that a training step uses."""
        return tuple(sorted({f"view_{view}" for _, view in self.stretches_of(step) if view}))

    def paths(self, *marks: str) -> dict[str, str]:
        """What this config names with these marks (see `settings`), by dotted key: files, tables, places."""
        found = paths(self, *marks)
        return {key: path for key, path in found.items() if not (key.startswith("eval.") and is_ours(path))}

    def brought(self) -> dict[str, str]:
        """Existing weights that the drawing models hold, or began as, by dotted key."""
        towers = {f"text.{name}" for name in (self.stage_b.text, self.stage_c.text)}
        sections = (*STAGES, "compressor", "interpolate", *sorted(towers))
        found = self.paths(WEIGHTS)
        return {key: path for part in sections for key, path in found.items() if key.rpartition(".")[0] == part}

    def prompt_sets(self) -> dict[str, str]:
        """The prompt sets by name: paths of files, `held_out` or `training`; of the last all know that it is memory."""
        default = HELD_OUT if self.data.holds_out else TRAINING
        return dict(self.eval.prompts) or {default: default}

    def drawn_sets(self) -> dict[str, str]:
        """The prompt sets that are drawn: also the training's captions where nobody compares on them."""
        return {TRAINING: TRAINING} | self.prompt_sets()

    def prompt_files(self) -> dict[str, str]:
        """Those of the configured prompt sets that are files."""
        return {name: place for name, place in self.eval.prompts.items() if not is_ours(place)}

    def with_absolute_paths(self) -> "Config":
        """The same config for workers, which may start in another folder; fingerprints are those of the original."""
        tree = self.model_dump()
        for key, path in self.paths(FILES, TABLE, PLACE).items():
            _put(tree, key, storage.absolute(path))
        return Config.model_validate(tree)

    def inputs(self) -> dict[str, Input]:
        """What this config names that lies outside of it, by dotted key, but for the source's own settings."""
        wholes: dict[str, Input] = {key: Whole(path) for key, path in self.paths(FILES).items()}
        return wholes | {key: Rows(path, ".parquet") for key, path in self.paths(TABLE).items()}

    @property
    def lookup(self) -> Callable[..., Any]:
        """The plain value (JSON types) below a dotted key, as fingerprints use it: a function of the key, and of an
        `identify` if need be, that has gone through the config once, so that many keys cost little.

        `sizes.<step>` is `frames_of`, squares by their side; `data.per_picture` is whether rows are pictures with all
        their captions, whatever the weights. What the config names outside of itself counts by what
        `identify` makes of it, its content: moved, it gives the same artifacts; with another file behind the path,
        another line, or another caption, new ones.

        The function raises:
            DataError: the source cannot be read.
            UsageError: another input cannot be read; names its key.
        """
        deciding, inputs = self.model_dump(mode="json", exclude=manners(self)), self.inputs()

        def value(key: str, identify: Callable[[Input], Any] = identity.of) -> Any:
            if key.startswith("sizes."):
                frames = self.frames_of(key.removeprefix("sizes."))
                return [frame.size if frame.square else frame.name for frame in frames]
            if key == "data.per_picture":
                return bool(self.data.captions)
            if key == "data.image" and self.data.image.frame.square:  # squares leave no trace of aspects
                return self.data.image.model_dump(mode="json", exclude={"max_aspect"})
            for name, found in inputs.items():
                if is_below(name, key):
                    _put(deciding, name, found)
            for part in self.data.parts:
                section = f"{part.key}.{part.config.source}"
                if is_below(section, key):
                    _put(deciding, section, table.identity(part))
            try:
                tree = _at(deciding, key)
            except KeyError:  # a manner that a step names after all
                tree = _at(self.model_dump(mode="json"), key)
            if key.startswith("text."):
                tree = tree | {"tokenizer": TOKENIZER}
            return _identified(tree, identify, key)

        return value


def _at(tree: Any, key: str) -> Any:
    """The value at a dotted key."""
    for part in key.split("."):
        tree = tree[int(part) if isinstance(tree, list | tuple) else part]
    return tree


def _identified(tree: Any, identify: Callable[[Input], Any], key: str) -> Any:
    """A tree with what stands for inputs in their place; None drops the key of one."""
    if isinstance(tree, dict):
        found = {name: _identified(value, identify, f"{key}.{name}") for name, value in tree.items()}
        return {name: value for name, value in found.items() if value is not None or tree[name] is None}
    if isinstance(tree, list):
        return [_identified(value, identify, f"{key}.{place}") for place, value in enumerate(tree)]
    if not isinstance(tree, Input):
        return tree
    try:
        return identify(tree)
    except OSError as error:
        path = getattr(tree, "path", error.filename)
        raise UsageError(f"{key}: {path} cannot be read ({error.strerror or error}); make it readable") from error


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key."""
    above, _, name = key.rpartition(".")
    _at(tree, above)[name] = value
