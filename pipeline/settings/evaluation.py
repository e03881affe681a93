"""The section `eval` of the config: prompt sets, rivals and scorers, and the words that stand for them elsewhere."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from settings import FILES, MANNER, WEIGHTS, Settings, Share, Text, paths
from stages.settings.base import Precision
from stages.settings.scoring import Alteration, Resize

BASELINE = "baseline"  # the rival that this pipeline trains itself
OURS, NULL = "ours", "null"  # our own pictures, and those of the same model with other seeds
REFERENCE = "reference"  # real pictures
RUN = "run="  # a rival that is another run in the same root
HELD_OUT, TRAINING = "held_out", "training"  # prompt sets that are captions of the data
Name = Annotated[str, Field(pattern="^[a-z0-9_]+$", max_length=32)]  # of a prompt set, of a rival


def is_ours(place: str) -> bool:
    """Whether what stands for the path of prompts or of a rival is a word for something that this pipeline makes."""
    return place in (BASELINE, HELD_OUT, TRAINING) or place.startswith(RUN)


def samples_of(prompts: str) -> str:
    """The artifact with our pictures of a prompt set, to whose name those of others prefix theirs."""
    return "samples" if prompts == TRAINING else f"samples_{prompts}"


class Scorers(Settings):
    """What scores pictures for their prompts, each by the path or URI of its weights; null: off.

    Beside them, likeness to the originals is measured wherever there are any: PSNR, SSIM, and LPIPS where
    `stage_a.loss.perceptual_weights` and `perceptual_heads` are there."""

    pickscore: Annotated[Text | None, FILES, WEIGHTS] = None
    """PickScore_v1, how much people would like a picture: open_clip's ViT-H-14, or Hugging Face's layout.

    What it gives is called PickScore if the file is the published one, else `clip:` and the start of its sha256."""
    clip_h: Annotated[Text | None, FILES, WEIGHTS] = None
    """CLIP ViT-H/14 of LAION, for the CLIP score, 100 x cosine."""
    clip_l: Annotated[Text | None, FILES, WEIGHTS] = None
    """CLIP ViT-L/14 of OpenAI, for the CLIP score."""
    aesthetic: Annotated[Text | None, FILES, WEIGHTS] = None
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


class Distances(Settings):
    """How far the drawn pictures of a prompt set lie, as a set, from real ones: FID, KID, and Inception's score (IS).

    Their features are taken once for each set of pictures, Inception and resize, by steps of their own."""

    inception: Annotated[Text | None, FILES, WEIGHTS] = None
    """Inception of 2015 in torch-fidelity's form, by path or URI; null: none of this is measured.

    What comes out is called FID, KID and IS if the file is the published one, else `fd:`, `kd:`, `is:` and the start of
    its sha256."""
    references: Annotated[dict[Name, Text], FILES] = Field(default_factory=dict)
    """Real pictures by prompt set: a folder or tar.

    None: of captions of the data the originals; for other prompts only IS, which needs none."""
    side: Annotated[int, Field(ge=32, le=2048)] = 256
    """Side to which pictures are resized for FID and KID, px: 256 in the paper; Inception itself goes on to 299."""
    side_is: Annotated[int, Field(ge=32, le=2048)] = 299
    """The same for IS: 299 in the paper."""
    resize: Resize = "bicubic"
    """Filter that makes them smaller; the paper names none.

    Pillow's, with antialiasing, or torch's bilinear one without."""
    fid_from: Annotated[int, Field(ge=2, le=10**7)] = 10_000
    """Fewest pictures of either side of which FID is told: of fewer it is mostly its own bias, and KID stands alone."""
    alterations: dict[Name, Alteration] = Field(default_factory=dict)
    """Changes of the drawn pictures, by name, whose distances are told too."""
    counts: Annotated[tuple[Annotated[int, Field(ge=4, le=10**7)], ...], Field(max_length=100)] = ()
    """Numbers of pictures, the first of both sides, whose distances are told too."""
    batch: Annotated[int, Field(ge=1, le=1024), MANNER] = 32
    """Pictures whose features are taken at a time on a device."""

    @model_validator(mode="after")
    def _something_takes_features(self) -> Self:
        for name in ("references", "alterations", "counts"):
            if getattr(self, name) and self.inception is None:
                raise ValueError(f"{name} are given and no inception; give eval.distances.inception=PATH")
        return self


class Speed(Settings):
    """How fast pictures are drawn, by stage, on the device that the run has."""

    batches: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(min_length=1, max_length=100)] = (
        1,
        2,
        4,
        8,
    )
    """Pictures drawn at a time."""
    compiled: bool = True
    """Whether also with Stage B and C compiled, which takes about a minute for each number of pictures."""
    repeats: Annotated[int, Field(ge=1, le=1000)] = 5
    """Times that each is drawn and timed, after once untimed; the median counts."""


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
    distances: Distances = Distances()
    """How far the drawn pictures lie, as a set, from real ones."""
    speed: Speed | None = None
    """How fast pictures are drawn; null: nobody looks."""

    @property
    def idle(self) -> frozenset[str]:
        """What is off leaves no trace in fingerprints."""
        return frozenset([*["distances"] * (self.distances.inception is None), *["speed"] * (self.speed is None)])

    @property
    def baseline(self) -> bool:
        """Whether the baseline is a rival."""
        return BASELINE in self.rivals.values()

    @property
    def compares(self) -> bool:
        """Whether there are tables of win rates or distances, in each of which stands what chance alone gives."""
        return bool(self.rivals or self.scorers.paths or self.distances.inception)

    def rival_path(self, name: str, prompts: str) -> tuple[str, str] | None:
        """Key below `eval` and path of a rival's pictures for a prompt set; None: it has none, or is trained here."""
        place = self.rivals[name]
        if isinstance(place, str):
            return None if is_ours(place) else (f"rivals.{name}", place)
        return (f"rivals.{name}.{prompts}", place[prompts]) if prompts in place else None
