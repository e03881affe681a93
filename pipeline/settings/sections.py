"""The sections of the config: what is set of each part of an experiment. What they ask of each other is in `checks`."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from settings import FILES, MANNER, WEIGHTS, Settings, Share, Text, manners
from stages.settings.base import ChosenPrecision
from stages.settings.losses import BaselineLoss, CompressorWarmupLoss, PreviewerLoss, StageALoss, StageBLoss, StageCLoss
from stages.settings.models import (
    BaselineConfig,
    CompressorConfig,
    PreviewerConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)
from stages.settings.sampling import SamplingConfig
from stages.settings.training import TrainingConfig

Stage = Literal["stage_a", "stage_b", "stage_c"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Ablation = Literal["preview", "without_text"]
WARMUP = "compressor.warmup.train"
WITHOUT_BLOCKS = frozenset({"previewer.train", WARMUP})  # trainings of models without blocks
LATENTS = {  # what trainings read of an encoder of pictures
    WARMUP: "latents_a",
    "stage_b.train": "latents_a",
    "baseline.train": "latents_a",
    "stage_c.train": "latents_c",
    "previewer.train": "latents_c",
}


def training_key(name: str) -> str:
    """The dotted key of a training's settings, by the name of what is trained."""
    return WARMUP if name == WARMUP.partition(".")[0] else f"{name}.train"


class StageA(Settings):
    """Stage A: its architecture, existing weights, its losses, its training."""

    model: StageAConfig
    """Its architecture."""
    weights: Annotated[Text | None, FILES, WEIGHTS] = None
    """File, folder or URI of weights to train from; with `train` null, taken as they are; null: random ones."""
    loss: StageALoss
    """What its training minimises."""
    train: TrainingConfig | None
    """Its training; null: `weights` are taken as they are."""


class Warmup(Settings):
    """Training of the compressor before Stage B, where it does not start from ImageNet weights."""

    loss: CompressorWarmupLoss
    """What the warm-up minimises: the error of the latents, or colours, that a throwaway decoder makes of the
    code."""
    train: TrainingConfig
    """The training of compressor and throwaway decoder."""


class Compressor(Settings):
    """Semantic compressor: architecture, start (weights or a warm-up), and whether B trains it along."""

    model: CompressorConfig
    """Its architecture."""
    weights: Annotated[Text | None, FILES, WEIGHTS]
    """ImageNet weights of the backbone, or a whole compressor: path or URI; null: random ones.

    A whole one goes with `stage_b.weights` where those hold none."""
    warmup: Warmup | None
    """Training before Stage B's, in place of ImageNet weights; null: none."""
    joint: bool
    """Whether Stage B's training trains the compressor along."""


class StageB(Settings):
    """Stage B, trained together with the compressor."""

    model: StageBConfig
    """Its architecture."""
    weights: Annotated[Text | None, FILES, WEIGHTS] = None
    """File, folder or URI of weights to train from; with `train` null, taken as they are; null: random ones.

    Their compressor belongs to them, or `compressor.weights` is one."""
    loss: StageBLoss
    """What its training minimises."""
    train: TrainingConfig | None
    """Its training; null: `weights` are taken as they are."""
    text: Text
    """Its text tower, by the name of one of `text`."""


class StageC(Settings):
    """Stage C, the prior."""

    model: StageCConfig
    """Its architecture."""
    weights: Annotated[Text | None, FILES, WEIGHTS] = None
    """File, folder or URI of weights to train from; with `train` null, taken as they are; null: random ones."""
    loss: StageCLoss
    """What its training minimises."""
    train: TrainingConfig | None
    """Its training; null: `weights`, or what `interpolate` names, are taken as they are."""
    text: Text
    """Its text tower, by the name of one of `text`."""


class Encoding(Settings):
    """How what an encoder makes of the data comes to the trainings."""

    mode: Literal["cached", "online"] = "cached"
    """cached: stored once, by a step of its own; online: made anew for each batch by the training that sees it."""
    dtype: Literal["fp16", "int8"] = "fp16"
    """Numbers that are stored: fp16, or int8 with a scale for each channel of each row."""
    batch: Annotated[int, Field(ge=1, le=100_000), MANNER] = 16
    """Rows encoded at a time on a device."""

    @property
    def online(self) -> bool:
        """Whether nothing is stored."""
        return self.mode == "online"


class AutocastEncoding(Encoding):
    """The same for an encoder that can compute in half precision; the compressor always computes in fp32."""

    precision: ChosenPrecision = "fp32"
    """Autocast of the encoder's forward pass; auto, with mode=online: bf16 where the device computes it, else fp32."""

    @model_validator(mode="after")
    def _what_is_stored_is_of_one_precision(self) -> Self:
        if self.precision == "auto" and not self.online:
            raise ValueError("precision=auto goes with mode=online: what is stored may be made by several devices")
        return self


class Encode(Settings):
    """The encoders: text towers, Stage A, the compressor."""

    text: AutocastEncoding = AutocastEncoding()
    """Hidden states of captions: most of the bytes that Stage C reads."""
    latents_a: AutocastEncoding = AutocastEncoding()
    """Stage A's latents, for Stage B and the baseline: more bytes than the pictures that they are made of."""
    latents_c: Encoding = Encoding()
    """Codes of the compressor, which computes in fp32, for Stage C and the previewer: the fewest bytes."""

    def changed(self, field: str) -> tuple[str, ...]:
        """The keys of a field's encoder that change values and are not at their defaults, which leave no trace."""
        encoding: Encoding = getattr(self, field)
        unused = {"dtype"} if encoding.online else set()
        changes = encoding.model_dump(exclude_defaults=True).keys() - manners(encoding).keys() - unused
        return tuple(f"encode.{field}.{name}" for name in sorted(changes))


class Interpolation(Settings):
    """Stage C as the weights between two others: (1 - share) x first + share x second.

    Two phases of no training say nothing: `stage_c.weights` then count.
    """

    first: Annotated[Annotated[int, Field(ge=1, le=1000)] | Text, FILES, WEIGHTS]
    """Weights of a Stage C: a file, folder or URI, or the number of a phase of `stage_c.train`, from 1.

    A phase stands for the weights after it."""
    second: Annotated[Annotated[int, Field(ge=1, le=1000)] | Text, FILES, WEIGHTS]
    """Weights of another Stage C of the same size, named like the first."""
    share: Share = 0.5
    """Share of the second: the weights are (1 - share) x first + share x second."""

    @property
    def sides(self) -> dict[str, int | str]:
        """Both, by their dotted keys."""
        return {f"interpolate.{name}": getattr(self, name) for name in ("first", "second")}

    @property
    def paths(self) -> dict[str, str]:
        """Those that are weights by others, by their dotted keys."""
        return {key: side for key, side in self.sides.items() if isinstance(side, str)}

    @property
    def phases(self) -> dict[str, int]:
        """Those that are phases of this config's own training, by their dotted keys."""
        return {key: side for key, side in self.sides.items() if isinstance(side, int)}


class Previewer(Settings):
    """The previewer; it learns from the codes that Stage C learns, so its sizes are among Stage C's."""

    model: PreviewerConfig
    """Its architecture."""
    loss: PreviewerLoss
    """What its training minimises."""
    train: TrainingConfig
    """Its training."""


class BaselineSampling(Settings):
    """How the baseline draws; captions, sizes and the negative one are those of `sample`."""

    steps: Annotated[int, Field(ge=1, le=10_000)]
    """Calls of the model."""
    guidance: float = Field(ge=0.0, le=1000.0)
    """Guidance in Imagen's convention; 1 or less is off."""


class Baseline(Settings):
    """The baseline LDM on Stage A's latents, its sizes among Stage B's."""

    model: BaselineConfig
    """Its architecture."""
    loss: BaselineLoss
    """What its training minimises."""
    train: TrainingConfig
    """Its training."""
    text: Text
    """Its text tower, by the name of one of `text`."""
    sample: BaselineSampling
    """How it draws."""


class Sampling(SamplingConfig):
    """How pictures are drawn from captions."""

    limit: Annotated[int, Field(ge=1, le=10**7)]
    """Captions of the step `sample`, from the first on."""
    batch: Annotated[int, Field(ge=1, le=1024), MANNER] = 1
    """Pictures drawn at a time; more differ by rounding alone."""
    compile: Annotated[bool, MANNER] = False
    """Whether Stage B and C are compiled first: faster after a minute at each new size."""
    offload: Annotated[bool, MANNER] = False
    """Whether each model is on the device for its turn only, for small GPUs."""
    ablations: Annotated[tuple[Ablation, ...], Field(max_length=2)] = ()
    """What is drawn beside each picture to show which model decides what (the paper's Appendix D).

    preview: what the previewer, which is trained too, sees in Stage C's code. without_text: what Stage B and A make of
    an original's code without its caption."""

    @property
    def idle(self) -> frozenset[str]:
        """None leaves no trace in fingerprints."""
        return frozenset() if self.ablations else frozenset({"ablations"})

    def settings(self) -> SamplingConfig:
        """What decides a picture."""
        return SamplingConfig.model_validate(self.model_dump(include=set(SamplingConfig.model_fields)))
