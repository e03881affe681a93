"""The config: frozen, typed values, checked as they are built; code below never sees a Hydra object.

An unknown key, a wrong type or an impossible combination is refused here, before anything is created. Imports nothing
heavy: `plan` stays quick.
"""

from collections.abc import Callable, Set
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from datasets.buckets import STEP, Frame
from datasets.config import DataConfig
from datasets.files import storage
from datasets.files.inputs import Bundled, Input, Rows, Whole
from datasets.sources import table
from pipeline.errors import UsageError
from pipeline.settings.keys import is_below
from pipeline.settings.sections import (
    BASELINE,
    MANNERS,
    STAGES,
    WARMUP,
    WITHOUT_BLOCKS,
    Baseline,
    Cluster,
    Compressor,
    Encode,
    Eval,
    Interpolation,
    Previewer,
    Sampling,
    Stage,
    StageA,
    StageB,
    StageC,
    Tracking,
)
from pipeline.store import identity
from stages.settings.base import Settings
from stages.settings.models import TextConfig
from stages.settings.training import TrainingConfig

TOKENIZER = Bundled("open_clip", "bpe_simple_vocab_16e6.txt.gz")  # of every text tower
Origin = Literal["train", "import", "interpolate"]


class Config(Settings):
    """One experiment, fully resolved."""

    targets: tuple[str, ...] = Field(min_length=1)
    seed: int = Field(ge=0, lt=2**32)
    workers: PositiveInt
    data: DataConfig
    text: dict[str, TextConfig] = Field(min_length=1)
    encode: Encode = Encode()
    stage_a: StageA
    compressor: Compressor
    stage_b: StageB
    stage_c: StageC
    interpolate: Interpolation | None = None
    previewer: Previewer
    baseline: Baseline
    sample: Sampling
    eval: Eval
    cluster: Cluster
    tracking: Tracking
    rates: dict[str, PositiveFloat]

    @model_validator(mode="after")
    def _stages_have_an_origin(self) -> "Config":
        for stage in STAGES:
            section = getattr(self, stage)
            if section.train is None and section.weights is None and self.origin(stage) == "import":
                raise ValueError(f"{stage}: train and weights are both null; give {stage}.weights=PATH or a training")
        between, training = self.between, self.stage_c.train
        if between and self.stage_c.weights and not between.phases:
            raise ValueError("stage_c.weights and interpolate both give Stage C's weights; leave one of them null")
        for key, number in between.phases.items() if between else ():
            if training is None or number > len(training.phases):
                has = f"has {len(training.phases)}" if training else "is null"
                raise ValueError(
                    f"{key}={number} is a phase of stage_c.train, which {has}; give another, or interpolate=null"
                )
        return self

    @model_validator(mode="after")
    def _towers_exist(self) -> "Config":
        for stage in ("stage_b", "stage_c", "baseline"):
            tower = getattr(self, stage).text
            if tower not in self.text:
                raise ValueError(f"{stage}.text names the tower '{tower}', but text has {', '.join(self.text)}")
            width, wanted = self.text[tower].width, getattr(self, stage).model.text_width
            if width != wanted:
                raise ValueError(f"{stage}.model.text_width is {wanted}, but the tower '{tower}' gives width {width}")
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Config":
        for key, training in self.trainings().items():
            for number, phase in enumerate(training.phases):
                if phase.size % 128 and key != "stage_a.train":
                    raise ValueError(f"{key}.phases.{number}.size={phase.size}: must be a multiple of 128 px")
                if phase.size > self.data.image.size:
                    raise ValueError(
                        f"{key}.phases.{number}.size={phase.size} is larger than the stored pictures, "
                        f"data.image.size={self.data.image.size}"
                    )
        return self

    @model_validator(mode="after")
    def _aspects_fit(self) -> "Config":
        image, frames = self.data.image, {"data.image": self.data.image.frame}
        for key, training in self.trainings().items():
            for number, phase in enumerate(training.phases):
                frames[f"{key}.phases.{number}"] = Frame(phase.size, phase.max_aspect)
        for key, frame in frames.items():
            if frame.max_aspect > image.max_aspect:
                raise ValueError(
                    f"{key}.max_aspect={frame.max_aspect:g} is more than what is stored, "
                    f"data.image.max_aspect={image.max_aspect:g}"
                )
            if not frame.square and (frame.size % STEP or len(frame.sizes) == 1):
                raise ValueError(
                    f"{key}: in steps of {STEP} px there is no other size than the square of {frame.size} px up to "
                    f"max_aspect={frame.max_aspect:g}; raise size or max_aspect, or leave max_aspect at 1"
                )
        return self

    @model_validator(mode="after")
    def _latents_are_encoded(self) -> "Config":
        """Latents are stored for the trainings of Stage B and C, and others take those; checked where it matters."""
        from_a, from_c = not self.encode.latents_a.online, not self.encode.latents_c.online
        for asked, step, teacher, key, latents in (
            ("previewer" in self.targets and from_c, "train_previewer", "train_c", "stage_c", "latents_c"),
            (self._needs_baseline() and from_a, "train_baseline", "train_b", "stage_b", "latents_a"),
        ):
            frames = self.frames_of(teacher)
            if latents in self.targets and getattr(self.encode, latents).online:
                raise ValueError(
                    f"targets: encode.{latents}.mode=online stores none; set it to cached, or leave {latents} out"
                )
            if latents in self.targets and not frames:
                raise ValueError(
                    f"targets: {latents} are stored for the training of {key}, of which this config has none; leave "
                    f"{latents} out"
                )
            if asked and not frames:
                raise ValueError(
                    f"{step.removeprefix('train_')} takes the {latents} that are stored for the training of {key}, of "
                    f"which this config has none; set encode.{latents}.mode=online"
                )
            for frame in self.frames_of(step):
                if asked and frame not in frames:
                    raise ValueError(
                        f"{step.removeprefix('train_')}.train.phases has pictures of {frame.name} px, but it trains on "
                        f"the latents of {key}.train.phases, which are of {', '.join(one.name for one in frames)} px"
                    )
        return self

    def _needs_baseline(self) -> bool:
        return self.eval.baseline or not {"baseline", "baseline_samples"}.isdisjoint(self.targets)

    @model_validator(mode="after")
    def _parts_fit(self) -> "Config":
        size, loss, crop = self.data.image.size, self.stage_a.loss, self.stage_a.loss.crop
        smallest = min((frame.shortest for frame in self.frames_of("train_a")), default=size)
        pairs = (
            ("stage_b.model.latent_channels", self.stage_b.model.latent_channels, self.stage_a.model.latent_channels),
            ("stage_b.model.code_channels", self.stage_b.model.code_channels, self.compressor.model.latent_channels),
            (
                "stage_c.model.latent_channels",
                self.stage_c.model.latent_channels,
                self.compressor.model.latent_channels,
            ),
            (
                "previewer.model.latent_channels",
                self.previewer.model.latent_channels,
                self.compressor.model.latent_channels,
            ),
            (
                "baseline.model.latent_channels",
                self.baseline.model.latent_channels,
                self.stage_a.model.latent_channels,
            ),
        )
        for key, value, wanted in pairs:
            if value != wanted:
                raise ValueError(f"{key}={value}: what it works on has {wanted} channels")
        if self.stage_a.model.levels != 2:
            raise ValueError(
                f"stage_a.model.levels={self.stage_a.model.levels}: Stage B draws latents of a quarter of the "
                "picture's side, which takes 2 levels"
            )
        if "release" in self.targets and not self.stage_c.model.scaled_codes:
            raise ValueError(
                "stage_c.model.scaled_codes=false: the stock pipelines that a release is for take (code + 1) / 42; "
                "leave release out of targets"
            )
        if size % 128:
            raise ValueError(f"data.image.size={size}: must be a multiple of 128 px")
        if crop is not None and crop > smallest:
            raise ValueError(f"stage_a.loss.crop={crop} is larger than the pictures of a phase, {smallest} px")
        if (crop or smallest) < loss.smallest_side:
            raise ValueError(
                f"stage_a.loss: pictures or crops of {crop or smallest} px are too small for the perceptual or the "
                f"adversarial loss; use {loss.smallest_side} px or more, or weights of 0"
            )
        if self.sample.width != self.sample.height:
            raise ValueError(
                f"sample.width={self.sample.width}, sample.height={self.sample.height}: samples are compared with the "
                "stored pictures, which are square; `sample` takes any width= and height="
            )
        return self

    @model_validator(mode="after")
    def _validation_has_samples(self) -> "Config":
        for key, training in self.trainings().items():
            if training.keeps_best and not self.data.holdout:
                raise ValueError(
                    f"{key}.validation.keep=best needs pictures that no training sees: give data.holdout, such as "
                    "0.01, or use last"
                )
            if training.panel_every and key == WARMUP:
                raise ValueError(f"{key}.panel_every: the warm-up makes no pictures; leave it null")
            if training.keeps_best and getattr(getattr(self, key.split(".")[0]).loss, "weight", None) == "adaptive":
                raise ValueError(
                    f"{key}.validation.keep=best: adaptive weights change the scale of the loss while they learn, so "
                    "that no step's loss can be compared; use last, or another loss.weight"
                )
        return self

    @model_validator(mode="after")
    def _checkpointing_has_blocks(self) -> "Config":
        for key, training in self.trainings().items():
            if training.checkpointing and key in WITHOUT_BLOCKS:
                raise ValueError(f"{key}.checkpointing=true: this model has no blocks to recompute; leave it false")
        return self

    @model_validator(mode="after")
    def _views_exist(self) -> "Config":
        for key, training in self.trainings().items():
            for number, phase in enumerate(training.phases):
                if phase.view is not None and phase.max_aspect > 1:
                    raise ValueError(f"{key}.phases.{number}: a phase takes view or max_aspect, not both; drop one")
                if phase.view is not None and phase.view not in self.data.views:
                    known = ", ".join(self.data.views) or "no views; give data.views.NAME.min_aesthetic=... or the like"
                    raise ValueError(f"{key}.phases.{number}.view={phase.view}: data.views has {known}")
        return self

    @model_validator(mode="after")
    def _fewer_workers_are_fewer(self) -> "Config":
        if (self.cluster.min_workers or 0) > self.workers:
            raise ValueError(
                f"cluster.min_workers={self.cluster.min_workers} is more than workers={self.workers}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> "Config":
        for key, training in self.trainings().items():
            try:
                training.require_divisible(self.workers)
            except ValueError as error:
                raise ValueError(f"{key}.{error}{self._nearest_workers()}") from None
        return self

    def _nearest_workers(self) -> str:
        """A hint at the numbers of workers next to ours among which the batches of all trainings divide, if any."""
        trainings = self.trainings().values()
        most = min(phase.batch_size for training in trainings for phase in training.phases)
        fitting = [world for world in range(1, most + 1) if all(training.divides(world) for training in trainings)]
        fewer = [world for world in fitting if world < self.workers][-1:]
        more = [world for world in fitting if world > self.workers][:1]
        return f"; use workers={' or '.join(map(str, fewer + more))}" if fitting else ""

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

    def trainings(self) -> dict[str, TrainingConfig]:
        """Every training that this config wants, by its dotted key."""
        stages = [stage for stage in STAGES if self.origin(stage) == "train" or self.trained(stage) != stage]
        found = {f"{name}.train": getattr(self, name).train for name in (*stages, "previewer", "baseline")}
        if self.compressor.warmup and "stage_b.train" in found and not self.stage_b.weights:
            found[WARMUP] = self.compressor.warmup.train
        return found

    def trainings_of(self, step: str) -> dict[str, TrainingConfig]:
        """The trainings that a step runs, by the name of what is trained; none for most steps."""
        keys = {
            "train_a": ["stage_a.train"],
            "train_b": [WARMUP, "stage_b.train"],
            "train_c": ["stage_c.train"],
            "train_previewer": ["previewer.train"],
            "train_baseline": ["baseline.train"],
        }
        trainings = self.trainings()
        return {key.partition(".")[0]: trainings[key] for key in keys.get(step, []) if key in trainings}

    def in_bf16(self) -> list[str]:
        """The keys that ask for bf16, of trainings and sampling."""
        settings = {f"{key}.precision": training.precision for key, training in self.trainings().items()}
        settings |= {"sample.precision": self.sample.precision}
        settings |= {
            f"encode.{field}.precision": getattr(self.encode, field).precision for field in ("text", "latents_a")
        }
        return [key for key, precision in settings.items() if precision == "bf16"]

    def worlds_of(self, step: str) -> list[int]:
        """Numbers of workers with which a training step can go on, descending from `workers`: all batches divide."""
        least = self.cluster.min_workers or self.workers
        return [
            world
            for world in range(self.workers, least - 1, -1)
            if all(training.divides(world) for training in self.trainings_of(step).values())
        ]

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

    def existing(self) -> dict[str, str]:
        """Paths of the existing weights, and of a rival's pictures, that this config names, by their dotted keys."""
        loss, pickscore = self.stage_a.loss, self.eval.pickscore
        found = {f"text.{name}.weights": getattr(tower, "weights", None) for name, tower in self.text.items()}
        found["stage_a.loss.perceptual_weights"] = loss.perceptual_weights
        found["stage_a.loss.perceptual_heads"] = loss.perceptual_heads
        found |= {f"{section}.weights": getattr(self, section).weights for section in (*STAGES, "compressor")}
        if self.between:
            found |= self.between.paths
        if scorer := self.data.scorer:
            found |= {f"data.scorer.{name}": getattr(scorer, name) for name in ("clip_weights", "head_weights")}
        if pickscore:
            found["eval.pickscore.weights"] = pickscore.weights
            found["eval.pickscore.rival"] = None if pickscore.rival == BASELINE else pickscore.rival
        return {key: path for key, path in found.items() if path}

    def with_absolute_paths(self) -> "Config":
        """The same config for workers, which may start in another folder; fingerprints are those of the original."""
        tree = self.model_dump()
        paths = {f"data.{name}": getattr(self.data, name) for name in ("metadata", "scores", "removed")}
        settings = tree["data"].get(self.data.source) or {}
        paths |= {f"data.{self.data.source}.{name}": settings.get(name) for name in ("path", "annotations", "pictures")}
        paths["cluster.cache.folder"] = self.cluster.cache.folder
        for key, path in (self.existing() | paths).items():
            if path:
                _put(tree, key, storage.absolute(path))
        return Config.model_validate(tree)

    def inputs(self) -> dict[str, Input]:
        """What this config names that lies outside of it, by dotted key, but for the source's own settings."""
        data = self.data
        tables = {f"data.{name}": path for name in ("metadata", "scores") if (path := getattr(data, name))}
        wholes = self.existing() | ({"data.removed": data.removed} if data.removed else {})
        return {
            **{key: Whole(path) for key, path in wholes.items()},
            **{key: Rows(path, ".parquet") for key, path in tables.items()},
        }

    def lookup(self, key: str, identify: Callable[[Input], Any] = identity.of) -> Any:
        """The plain value (JSON types) below a dotted key, as fingerprints use it.

        `sizes.<step>` is `frames_of`, squares by their side. What the config names outside of itself counts by what
        `identify` makes of it, its content: moved, it gives the same artifacts; with another file behind the path,
        another line, or another caption, new ones.

        Raises:
            DataError: the source cannot be read.
            UsageError: another input cannot be read; names its key.
        """
        if key.startswith("sizes."):
            frames = self.frames_of(key.removeprefix("sizes."))
            return [frame.size if frame.square else frame.name for frame in frames]
        if key == f"data.{self.data.source}":
            return _identified(table.identity(self.data), identify, key)
        if key == "data.image" and self.data.image.frame.square:  # squares leave no trace of aspects
            return self.data.image.model_dump(mode="json", exclude={"max_aspect"})
        tree: Any = self.model_dump(mode="json")
        for name, found in self.inputs().items():
            if is_below(name, key):
                _put(tree, name, found)
        for part in key.split("."):
            tree = tree[part]
        if key.startswith("text."):
            tree = tree | {"tokenizer": TOKENIZER}
        return _identified(_without(tree, MANNERS), identify, key)


def _identified(tree: Any, identify: Callable[[Input], Any], key: str) -> Any:
    """A tree with what stands for inputs in their place; None drops the key of one."""
    if isinstance(tree, dict):
        found = {name: _identified(value, identify, f"{key}.{name}") for name, value in tree.items()}
        return {name: value for name, value in found.items() if value is not None or tree[name] is None}
    if not isinstance(tree, Input):
        return tree
    try:
        return identify(tree)
    except OSError as error:
        path = getattr(tree, "path", error.filename)
        raise UsageError(f"{key}: {path} cannot be read ({error.strerror or error}); make it readable") from error


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key."""
    *sections, name = key.split(".")
    for section in sections:
        tree = tree[section]
    tree[name] = value


def _without(tree: Any, names: Set[str]) -> Any:
    """A nested mapping without the keys of those names, and without validations that decide nothing."""
    if not isinstance(tree, dict):
        return tree
    if "validation" in tree and (tree["validation"] is None or tree["validation"]["keep"] == "last"):
        names = names | {"validation"}
    return {key: _without(value, names) for key, value in tree.items() if key not in names}
