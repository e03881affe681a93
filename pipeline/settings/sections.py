"""The sections of the config: what is set of each part of an experiment. What they ask of each other is in `checks`."""

from typing import Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt

from stages.settings.base import Precision, Settings
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
from stages.settings.training import EXECUTION, TrainingConfig

BASELINE = "baseline"  # the rival that this pipeline trains itself
Stage = Literal["stage_a", "stage_b", "stage_c"]
STAGES: tuple[Stage, ...] = get_args(Stage)
WARMUP = "compressor.warmup.train"
WITHOUT_BLOCKS = frozenset({"previewer.train", WARMUP})  # trainings without blocks to recompute
MANNERS = EXECUTION | {"batch", "offload"}  # how a training runs and how sampling uses a device, not what comes out


class StageA(Settings):
    """Stage A: its architecture, existing weights, its losses, its training."""

    model: StageAConfig
    weights: str | None = None
    loss: StageALoss
    train: TrainingConfig | None


class Warmup(Settings):
    """Training of the compressor before Stage B, where it does not start from ImageNet weights."""

    loss: CompressorWarmupLoss
    train: TrainingConfig


class Compressor(Settings):
    """Semantic compressor: architecture, start (weights or a warm-up), and whether B trains it along.

    `weights` are ImageNet weights of the backbone, or a whole compressor: the one of `stage_b.weights` where that holds
    none.
    """

    model: CompressorConfig
    weights: str | None
    warmup: Warmup | None
    joint: bool


class StageB(Settings):
    """Stage B, trained together with the compressor; `text` names a tower."""

    model: StageBConfig
    weights: str | None = None
    loss: StageBLoss
    train: TrainingConfig | None
    text: str


class StageC(Settings):
    """Stage C; `text` names a tower."""

    model: StageCConfig
    weights: str | None = None
    loss: StageCLoss
    train: TrainingConfig | None
    text: str


class Encoding(Settings):
    """How what an encoder makes of the data comes to the trainings."""

    mode: Literal["cached", "online"] = "cached"
    """Stored once, by a step of its own, or made anew for each batch by the training that sees it."""
    dtype: Literal["fp16", "int8"] = "fp16"
    """Of what is stored; int8 has a scale for each channel of each row."""
    batch: PositiveInt = 16
    """Rows encoded at a time on a device."""

    @property
    def online(self) -> bool:
        """Whether nothing is stored."""
        return self.mode == "online"


class AutocastEncoding(Encoding):
    """The same for an encoder that can compute in half precision; the compressor always computes in fp32."""

    precision: Precision = "fp32"
    """Autocast of the forward pass."""


class Encode(Settings):
    """The encoders: text towers, Stage A, the compressor."""

    text: AutocastEncoding = AutocastEncoding()
    latents_a: AutocastEncoding = AutocastEncoding()
    latents_c: Encoding = Encoding()

    def changed(self, field: str) -> tuple[str, ...]:
        """The keys of a field's encoder that change values and are not at their defaults, which leave no trace."""
        encoding: Encoding = getattr(self, field)
        unused = {"dtype"} if encoding.online else set()
        changes = encoding.model_dump(exclude_defaults=True).keys() - MANNERS - unused
        return tuple(f"encode.{field}.{name}" for name in sorted(changes))


class Interpolation(Settings):
    """Stage C as the weights between two others: (1 - share) x first + share x second.

    Either is a file, folder or URI, or the number of a phase of `stage_c.train`, from 1, for the weights after it. Two
    phases of no training say nothing: `stage_c.weights` then count.
    """

    first: PositiveInt | str
    second: PositiveInt | str
    share: float = Field(0.5, ge=0, le=1)

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
    loss: PreviewerLoss
    train: TrainingConfig


class BaselineSampling(Settings):
    """How the baseline draws; captions, sizes and the negative one are those of `sample`."""

    steps: PositiveInt
    guidance: float = Field(ge=0)


class Baseline(Settings):
    """The baseline LDM on Stage A's latents, its sizes among Stage B's; `text` names a tower."""

    model: BaselineConfig
    loss: BaselineLoss
    train: TrainingConfig
    text: str
    sample: BaselineSampling


class Sampling(SamplingConfig):
    """How pictures are drawn from captions."""

    limit: PositiveInt
    """Captions of the step `sample`, from the first on."""
    batch: PositiveInt = 1
    """Pictures drawn at a time; more differ by rounding (see `stages.sampling.sample`)."""
    compile: bool = False
    """Whether Stage B and C are compiled first."""
    offload: bool = False
    """Whether each model is on the device for its turn only."""

    def settings(self) -> SamplingConfig:
        """What decides a picture."""
        return SamplingConfig.model_validate(self.model_dump(include=set(SamplingConfig.model_fields)))


class PickScore(Settings):
    """PickScore, a learned preference; `weights` is the path of the ViT-H-14 checkpoint.

    `rival` is a folder of pictures, or `baseline` for those that this config's baseline draws.
    """

    weights: str
    rival: str


class Eval(Settings):
    """What `evaluate` measures beside retrieval and PSNR, and which other models it measures too."""

    pickscore: PickScore | None = None
    # Which rivals there are shows in the fingerprints of what is compared; none leaves no trace there.
    rivals: tuple[Literal["baseline"], ...] = Field((), exclude_if=lambda rivals: not rivals)

    @property
    def baseline(self) -> bool:
        """Whether the baseline is a rival."""
        return BASELINE in self.rivals or (self.pickscore is not None and self.pickscore.rival == BASELINE)


class Encoders(Settings):
    """The pool of encoding and sampling actors; `gpus` is each one's share of a GPU."""

    min: PositiveInt
    max: PositiveInt
    gpus: float = Field(1.0, gt=0, le=1)


class Cache(Settings):
    """Files of artifacts on the own disk of each node that trains."""

    folder: str | None = None
    gib: PositiveFloat = 100.0


class Cluster(Settings):
    """Where the work runs. Nothing here changes a result, so nothing here enters a fingerprint."""

    address: str | None
    num_cpus: PositiveInt | None
    device: Literal["auto", "cpu", "cuda"]
    cpus_per_worker: PositiveInt
    gpus_per_worker: int = Field(ge=0)
    gpu_memory_gib: PositiveFloat | None = None
    encoders: Encoders
    cache: Cache = Cache()
    stall_s: PositiveFloat = 600.0
    storage_s: float = Field(300.0, ge=0)
    retries: int = Field(ge=0)
    min_workers: PositiveInt | None = None
    replacement_s: float = Field(600.0, ge=0)


class Tracking(Settings):
    """MLflow; `uri` null keeps an sqlite store under the root."""

    uri: str | None
    experiment: str
