"""Settings of the data plane, checked when they are built. Imports nothing heavy: `plan` stays quick."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from datasets.addresses import Allowed
from datasets.buckets import Frame
from datasets.caption_settings import CaptionerConfig, Name, RecapConfig, Weight, check_names, clean_caption
from datasets.source_settings import MIXTURE, Bytes, MixedSource, Part, SourceConfig, Thresholds, check_mixture
from settings import FILES, MANNER, WEIGHTS, Settings, Share, Text


def _allowed(entry: str) -> str:
    Allowed([entry])
    return entry


def _is_proxy(uri: str) -> str:
    if not re.fullmatch(r"http://[^\s/@?#]+:[0-9]+/?", uri):
        raise ValueError(f"{uri!r} is no proxy that is asked by HTTP; give http://HOST:PORT")
    return uri


Pixels = Annotated[int, Field(ge=1, le=10**10)]
Seconds = Annotated[float, Field(gt=0.0, le=86_400.0)]
Batch = Annotated[int, Field(ge=1, le=10_000)]  # rows taken through a model at a time

NO_SCORES = (
    "the metadata have no aesthetic scores; join some with data.scores=TABLE, or have them computed: "
    "data.scorer.clip_weights=PATH data.scorer.head_weights=PATH"
)


class DataError(ValueError):
    """Metadata, filters or sizes cannot give a data set; the message names the config key and the remedy."""


class ViewConfig(Thresholds):
    """Which of the stored pictures a training phase sees, by the plan's values of them, or by `scorer`'s score."""

    duplicates: Literal["keep", "drop"] = "keep"
    """Whether all but one of the pictures that look alike are left out, which takes a step that reads every picture."""

    @property
    def scored(self) -> bool:
        """Whether it goes by aesthetic scores."""
        return self.min_aesthetic is not None


class ImageConfig(Settings):
    """How a fetched picture is stored: short side resized, the middle of the longer side, encoded."""

    size: Annotated[int, Field(ge=1, le=8192)]
    """Shorter side of a stored picture, px. Pictures with a shorter one are lost rather than enlarged."""
    max_aspect: Annotated[float, Field(ge=1.0, le=64.0)] = 1.0
    """Largest ratio of the longer to the shorter side that is stored. 1: squares; above it, shards have buckets."""
    format: Literal["png", "jpg"]
    """How a stored picture is encoded: png keeps every pixel, jpg a fifth of the bytes."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Quality of jpg."""
    max_pixels: Pixels = 64 * 1024 * 1024
    """Most pixels of a fetched picture: larger ones are refused before they are decoded."""

    @property
    def frame(self) -> Frame:
        """The buckets of the plan."""
        return Frame(self.size, self.max_aspect)

    @model_validator(mode="after")
    def _some_are_small_enough(self) -> Self:
        if self.max_pixels < self.size**2:
            raise ValueError(
                f"max_pixels={self.max_pixels} refuses every picture of size={self.size} px; raise it to "
                f"{self.size**2} or more"
            )
        return self


class DownloadConfig(Settings):
    """How pictures are fetched."""

    threads: Annotated[int, Field(ge=1, le=1000)]
    """Connections at a time, for one shard."""
    timeout_s: Annotated[float, Field(gt=0.0, le=3600.0)]
    """Longest silence of a server, seconds."""
    max_seconds: Seconds = 60.0
    """Longest time for one picture, seconds, redirects included."""
    per_host: Annotated[int, Field(ge=1, le=10_000)] = 8
    """Connections to one host at a time, over all workers, at most: from two on one more than it has answered over."""
    allow: tuple[Annotated[Text, AfterValidator(_allowed)], ...] = ()
    """Hosts, addresses and networks (`10.0.0.0/8`) of one's own that may be asked beside the public ones: mirrors.

    Never link-local ones, nor those at which clouds tell their machines' keys."""
    private_addresses: bool = False
    """Whether hosts on all private and loopback addresses may be asked; `allow` names single ones."""
    proxy: Annotated[Text, AfterValidator(_is_proxy)] | None = None
    """Proxy that is asked for what is on public addresses, `http://HOST:PORT`; null: none, also of the environment.

    Names that do not resolve here are left to it."""
    lookup_s: Annotated[float, Field(gt=0.0, le=600.0)] = 5.0
    """Longest time to look a host's name up, seconds; one that takes longer counts as unknown."""
    lookups: Annotated[int, Field(ge=1, le=1000)] = 64
    """Names looked up at a time, by one worker."""
    retries: Annotated[int, Field(ge=0, le=100)]
    """Further passes over the pictures that failed for a passing reason."""
    max_wait_s: Annotated[float, Field(ge=0.0, le=86_400.0)] = 60.0
    """Longest time that a picture waits for a server that has enough (429, 503, Retry-After), seconds.

    One that answers nothing else for so long is left alone for ten times as long; its pictures are lost meanwhile, as
    `throttled`, which passes."""
    max_bytes: Bytes = 20 * 1024 * 1024
    """Longest answer of a server that is read, bytes."""
    user_agent: Annotated[str, Field(pattern=r"^[\x21-\x7e][\x20-\x7e]*$", max_length=500)]
    """How we introduce ourselves to servers: product/version (contact)."""
    max_lost: Share
    """Largest share of the planned pictures that a download may lose."""


class ScorerConfig(Settings):
    """LAION's aesthetic predictor: a CLIP, and a head on its embedding of a picture."""

    clip_weights: Annotated[Text, FILES, WEIGHTS]
    """Path or URI of the CLIP (safetensors or torch), under open_clip's names or transformers'."""
    head_weights: Annotated[Text, FILES, WEIGHTS]
    """Path or URI of the head; thresholds are on its scale."""
    model: Text = "ViT-L-14-quickgelu"
    """open_clip's name of the CLIP that the head is for; LAION's are for OpenAI's ViT-L/14."""
    batch: Annotated[Batch, MANNER] = 32
    """Pictures scored at a time on a device."""


class DataConfig(SourceConfig):
    """Where pictures and captions come from, which are taken, and how they are stored."""

    sources: tuple[MixedSource, ...] = Field((), max_length=100, exclude_if=lambda sources: not sources)
    """The sources of `source: mixture`, each with filters, metadata and scores of its own in place of `data`'s."""
    scorer: ScorerConfig | None = None
    """Scores computed from the stored pictures, which views take in place of the plan's; null: none are."""
    removed: Annotated[Text | None, FILES] = None
    """Removal list: a text file with a key or a URL a line, which are not planned; null: none."""
    limit: Annotated[int, Field(ge=1, le=10**12)] | None
    """Rows to plan, drawn by the seed from those that pass the filters; null: all of them."""
    shard_rows: Annotated[int, Field(ge=1, le=100_000)]
    """Planned rows of a shard."""
    views: dict[Annotated[str, Field(pattern="^[a-z0-9_]+$", max_length=64)], ViewConfig] = Field(default_factory=dict)
    """Selections of the stored pictures by name, for `view` of a training's phases; each has bounds as `filters`."""
    holdout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the pictures that no training sees, for validation; 0: none, and no validation.

    They are drawn by the hashes of their URLs, the same at every seed, limit and number of workers. With each go all
    rows that show it: other captions, other URLs of the same bytes, duplicates where they are known."""
    held_out_captions: tuple[Annotated[Text, AfterValidator(clean_caption)], ...] = Field((), max_length=10_000)
    """Captions of which no training sees a picture, beside those of `holdout`: compositions to ask for later."""
    image: ImageConfig
    """How a picture is stored."""
    captions: dict[Name, Weight] = Field(default_factory=dict)
    """Weights by which trainings draw one of a picture's captions in each pass, by their names: {alt: 1, dense: 1}.

    `alt` are the source's own. With any, a planned row is a picture with all its captions; empty: each caption is a row
    of its own. Of a picture without a caption of these names, or of weight 0, any is drawn, which is counted."""
    recaps: dict[Name, RecapConfig] = Field(default_factory=dict)
    """Captions from tables, by the name that they get in `captions`."""
    captioners: dict[Name, CaptionerConfig] = Field(default_factory=dict)
    """Captions by models, by the name that they get in `captions`."""
    attempt: Annotated[int, Field(ge=1, le=1000)] = 1
    """Which download of this plan, from 1: a later one asks again for what was lost for a passing reason (`data
    retry`)."""
    download: DownloadConfig
    """How pictures are fetched."""

    @property
    def holds_out(self) -> bool:
        """Whether there are pictures that no training sees."""
        return bool(self.holdout or self.held_out_captions)

    @property
    def captioned(self) -> tuple[str, ...]:
        """Names of the captions that are not the source's own, sorted."""
        return tuple(sorted({*self.recaps, *self.captioners}))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The sources that the plan is made of: a single one is a mixture of one."""
        if self.source != MIXTURE:
            return (Part("data", self.source, self),)
        return tuple(
            Part(f"data.sources.{place}", source.name or source.source, source, source.weight, apart=True)
            for place, source in enumerate(self.sources)
        )

    @model_validator(mode="after")
    def _sources_are_complete(self) -> Self:
        if self.source == MIXTURE:
            check_mixture(self, self.sources)
        elif self.sources:
            raise ValueError(f"data.sources is of another source than data.source={self.source}: choose data=mixture")
        for part in self.parts:
            part.check()
        return self

    @model_validator(mode="after")
    def _captions_are_there(self) -> Self:
        check_names(self.captions, self.recaps.keys(), self.captioners.keys())
        return self

    @model_validator(mode="after")
    def _pictures_are_large_enough(self) -> Self:
        for part in self.parts:
            drawn = part.config.openmoji and part.config.openmoji.size
            largest = {"filters.max_side": part.config.filters.max_side, "openmoji.size": drawn}
            for key, side in largest.items():
                if side and side < self.image.size:
                    raise ValueError(
                        f"{f'{part.key}.{key}'.removeprefix('data.')}={side} is below image.size={self.image.size}: no "
                        "picture is enlarged, so that none would be left; raise it, or lower image.size"
                    )
        return self

    @property
    def expected_rows(self) -> int | None:
        """Most rows that the plan can have, as far as the config alone tells."""
        named = [part.config.named_rows for part in self.parts]
        known = [rows for rows in named if rows is not None]
        bounds = [self.limit, sum(known) if len(known) == len(named) else None]
        return min((bound for bound in bounds if bound is not None), default=None)
