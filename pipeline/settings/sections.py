"""The sections of the config: what is set of each part of an experiment. What they ask of each other is in `checks`."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from settings import FILES, MANNER, PLACE, Settings, Share, Text, manners, paths
from stages.settings.base import Precision
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

BASELINE = "baseline"  # the rival that this pipeline trains itself
OURS, NULL = "ours", "null"  # our own pictures, and those of the same model with other seeds
RUN = "run="  # a rival that is another run in the same root
HELD_OUT, TRAINING = "held_out", "training"  # prompt sets that are captions of the data
Name = Annotated[str, Field(pattern="^[a-z0-9_]+$", max_length=32)]  # of a prompt set, of a rival
Stage = Literal["stage_a", "stage_b", "stage_c"]
STAGES: tuple[Stage, ...] = get_args(Stage)
WARMUP = "compressor.warmup.train"
WITHOUT_BLOCKS = frozenset({"previewer.train", WARMUP})  # trainings without blocks to recompute


def is_ours(place: str) -> bool:
    """Whether what stands for the path of prompts or of a rival is a word for something that this pipeline makes."""
    return place in (BASELINE, HELD_OUT, TRAINING) or place.startswith(RUN)


def samples_of(prompts: str) -> str:
    """The artifact with our pictures of a prompt set, to whose name those of others prefix theirs."""
    return "samples" if prompts == TRAINING else f"samples_{prompts}"


class StageA(Settings):
    """Stage A: its architecture, existing weights, its losses, its training."""

    model: StageAConfig
    """Its architecture."""
    weights: Annotated[Text | None, FILES] = None
    """File, folder or URI of weights to train from; with `train` null, taken as they are; null: random ones."""
    loss: StageALoss
    """What its training minimises."""
    train: TrainingConfig | None
    """Its training; null: `weights` are taken as they are."""


class Warmup(Settings):
    """Training of the compressor before Stage B, where it does not start from ImageNet weights."""

    loss: CompressorWarmupLoss
    """What the warm-up minimises: the error of latents that a throwaway decoder makes of the code."""
    train: TrainingConfig
    """The training of compressor and throwaway decoder."""


class Compressor(Settings):
    """Semantic compressor: architecture, start (weights or a warm-up), and whether B trains it along."""

    model: CompressorConfig
    """Its architecture."""
    weights: Annotated[Text | None, FILES]
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
    weights: Annotated[Text | None, FILES] = None
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
    weights: Annotated[Text | None, FILES] = None
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

    precision: Precision = "fp32"
    """Autocast of the encoder's forward pass."""


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

    first: Annotated[Annotated[int, Field(ge=1, le=1000)] | Text, FILES]
    """Weights of a Stage C: a file, folder or URI, or the number of a phase of `stage_c.train`, from 1.

    A phase stands for the weights after it."""
    second: Annotated[Annotated[int, Field(ge=1, le=1000)] | Text, FILES]
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

    def settings(self) -> SamplingConfig:
        """What decides a picture."""
        return SamplingConfig.model_validate(self.model_dump(include=set(SamplingConfig.model_fields)))


class Scorers(Settings):
    """What scores pictures for their prompts, each by the path or URI of its weights; null: off.

    Beside them, likeness to the originals is measured wherever there are any: PSNR, SSIM, and LPIPS where
    `stage_a.loss.perceptual_weights` and `perceptual_heads` are there."""

    pickscore: Annotated[Text | None, FILES] = None
    """PickScore_v1, how much people would like a picture: open_clip's ViT-H-14, or Hugging Face's layout.

    What it gives is called PickScore if the file is the published one, else `clip:` and the start of its sha256."""
    clip_h: Annotated[Text | None, FILES] = None
    """CLIP ViT-H/14 of LAION, for the CLIP score, 100 x cosine."""
    clip_l: Annotated[Text | None, FILES] = None
    """CLIP ViT-L/14 of OpenAI, for the CLIP score."""
    aesthetic: Annotated[Text | None, FILES] = None
    """Head of LAION's aesthetic predictor, on the embeddings of `clip_l`."""
    precision: Precision = "fp32"
    """Towers of the CLIPs in fp32, or under bf16 autocast; embeddings and scores are fp32 in both."""

    @model_validator(mode="after")
    def _the_head_has_its_clip(self) -> Self:
        if self.aesthetic and not self.clip_l:
            raise ValueError("aesthetic is a head on clip_l, which is null; give eval.scorers.clip_l=PATH too")
        return self

    @property
    def paths(self) -> dict[str, str]:
        """Those that are given, by their names."""
        return paths(self, FILES)


class Eval(Settings):
    """What `evaluate` measures: on which prompts, by which scorers, against which rivals."""

    prompts: Annotated[dict[Name, Text], FILES] = Field(default_factory=dict)
    """Prompt sets by name: a file of prompts, or `held_out` or `training`, captions of the data.

    None: the held-out captions where `data` holds out any, else those of the training. Files are Parti's .tsv, COCO's
    captions_*.json, Localized Narratives' .jsonl, and .txt with a prompt a line. Of captions, `sample.limit` are drawn.
    """
    limit: Annotated[int, Field(ge=1, le=10**7)] | None = None
    """Prompts of each file, drawn by the seed; null: all of them."""
    rivals: Annotated[dict[Name, Text | dict[Name, Text]], FILES] = Field(default_factory=dict)
    """Rivals by name: a folder or tar of pictures, `run=ID` of this root, or `baseline`, the one trained here.

    Where the prompt sets have pictures of their own: paths by prompt set. Names of files are keys, as in `samples`, or
    prompts.csv (file, prompt) says what each shows."""
    allow_missing: Share = 0.0
    """Share of a set's prompts for which a rival may have no usable picture; they are left out of its comparison."""
    scorers: Scorers = Scorers()
    """What scores pictures for their prompts; each needs weights that are not ours to ship."""
    batch: Annotated[int, Field(ge=1, le=1024), MANNER] = 16
    """Pictures scored at a time on a device."""

    @property
    def baseline(self) -> bool:
        """Whether the baseline is a rival."""
        return BASELINE in self.rivals.values()

    @property
    def compares(self) -> bool:
        """Whether there are tables of win rates, under each of which stands what chance alone gives."""
        return bool(self.rivals or self.scorers.paths)

    def rival_path(self, name: str, prompts: str) -> tuple[str, str] | None:
        """Key below `eval` and path of a rival's pictures for a prompt set; None: it has none, or is trained here."""
        place = self.rivals[name]
        if isinstance(place, str):
            return None if is_ours(place) else (f"rivals.{name}", place)
        return (f"rivals.{name}.{prompts}", place[prompts]) if prompts in place else None


class Encoders(Settings):
    """The pool of encoding and sampling actors."""

    min: Annotated[int, Field(ge=1, le=100_000)]
    """Actors from the start."""
    max: Annotated[int, Field(ge=1, le=100_000)]
    """Actors at most."""
    gpus: float = Field(1.0, gt=0.0, le=1.0)
    """Share of a GPU that each actor takes, where there are any."""

    @model_validator(mode="after")
    def _min_is_below_max(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is above max={self.max}; lower it, or raise max")
        return self


class Cache(Settings):
    """Files of artifacts on the own disk of each node that trains, hashed once a node."""

    folder: Annotated[Text | None, PLACE] = None
    """A local folder on each node; null: no cache.

    Without one, local files are read in place, those of an object store anew each epoch."""
    gib: float = Field(100.0, ge=0.001, le=10.0**6)
    """Room that the cache may take, GiB; what was read longest ago goes first."""


class Cluster(Settings):
    """Where the work runs. Nothing here changes a result, so nothing here enters a fingerprint."""

    address: Text | None
    """Address of a running Ray (`auto` on one of its nodes); null: one is started here and stopped at the end."""
    num_cpus: Annotated[int, Field(ge=1, le=100_000)] | None
    """CPU cores that a Ray started here may use (a running one knows its own); null: all."""
    device: Literal["auto", "cpu", "cuda"]
    """What models run on; auto: GPUs where there are any. cuda refuses a cluster without GPUs."""
    cpus_per_worker: Annotated[int, Field(ge=1, le=100_000)]
    """Cores of a training rank on a running Ray; on one started here, ranks share all of them."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=64)]
    """GPUs of a training rank, where there are any."""
    gpu_memory_gib: Annotated[float, Field(ge=0.1, le=4096.0)] | None = None
    """Memory of a GPU, GiB, against which `plan` and `run` hold what a training needs; null: unknown, no check."""
    price_per_hour: Annotated[float, Field(ge=0.0, le=10_000.0)] | None = None
    """Price of a device-hour, in any currency, for what `plan` and `report hours` tell; null: unknown."""
    encoders: Encoders
    """The pool of encoding and sampling actors."""
    cache: Cache = Cache()
    """Where nodes keep what trainings read; worth it where the root is far away."""
    stall_s: Annotated[float, Field(ge=1.0, le=604_800.0)] = 600.0
    """Seconds without a sign of progress from a rank, after which a training is ended and tried again.

    It must be longer than a checkpoint takes to be read."""
    storage_s: Annotated[float, Field(ge=0.0, le=604_800.0)] = 300.0
    """Seconds in which a request to the root, a store or a shared disk, is made again while it fails for a reason that
    may pass."""
    retries: Annotated[int, Field(ge=0, le=1000)]
    """Further attempts at a step after a failure of the infrastructure."""
    min_workers: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Fewest ranks that a training goes on with once nodes are lost; null: `workers`, it waits for new nodes."""
    replacement_s: Annotated[float, Field(ge=0.0, le=604_800.0)] = 600.0
    """Seconds that lost nodes have to be replaced in, before a training goes on with fewer ranks."""


class Budget(Settings):
    """What a run may cost. Nothing here changes a result, so nothing here enters a fingerprint."""

    hours: Annotated[float, Field(gt=0.0, le=10.0**9)] | None = None
    """Device-hours for all that the targets need, those of runs before included; null: as many as it takes.

    Once they are used up, the run saves and ends with exit code 6; with a larger budget it goes on."""


class Tracking(Settings):
    """MLflow, to which runs are reported."""

    uri: Text | None
    """Address of an MLflow server; null: an sqlite store under the root, which is then local."""
    experiment: Text
    """Name of the MLflow experiment."""
