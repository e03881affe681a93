"""Settings of the data plane, checked when they are built. Imports nothing heavy: `plan` stays quick."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from datasets.buckets import Frame

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


NO_SCORES = (
    "the metadata have no aesthetic scores; join some with data.scores=TABLE, or have them computed: "
    "data.scorer.clip_weights=PATH data.scorer.head_weights=PATH"
)


class DataError(ValueError):
    """Metadata, filters or sizes cannot give a data set; the message names the config key and the remedy."""


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused, the text under a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Thresholds(Settings):
    """Bounds on a row's size and scores. None switches a rule off; a missing or NaN value fails one."""

    min_side: Count | None = None
    """Smallest shorter side, px."""
    max_side: Count | None = None
    """Largest longer side, px."""
    max_aspect: Annotated[float, Field(ge=1.0)] | None = None
    """Largest ratio of the longer to the shorter side."""
    min_aesthetic: float | None = None
    """Smallest score of LAION's second aesthetic predictor, 1 to 10; the first one's scale is another."""
    max_punsafe: Share | None = None
    """Largest probability that the picture is unsafe."""
    max_pwatermark: Share | None = None
    """Largest probability that the picture has a watermark."""
    min_similarity: float | None = None
    """Smallest cosine between CLIP's embeddings of picture and caption."""


class FilterConfig(Thresholds):
    """Which rows of the metadata are planned."""

    min_words: Count = 1
    """Fewest words of a caption."""
    max_characters: Count = 2000
    """Longest caption, in characters."""
    max_same_caption: Count | None = None
    """Most rows with the same caption: shops and stock agencies repeat theirs a thousand times."""
    max_same_url: Count | None = None
    """Most rows with the same URL and different captions."""


class ViewConfig(Thresholds):
    """Which of the stored pictures a training phase sees, by the plan's values of them, or by `scorer`'s score."""

    duplicates: Literal["keep", "drop"] = "keep"
    """Whether pictures that look like others are left out; one of them stays."""

    @property
    def scored(self) -> bool:
        """Whether it goes by aesthetic scores."""
        return self.min_aesthetic is not None


class ImageConfig(Settings):
    """How a fetched picture is stored: short side resized, the middle of the longer side, encoded."""

    size: Count
    """Shorter side, px. Pictures with a shorter one are lost rather than enlarged."""
    max_aspect: Annotated[float, Field(ge=1.0)] = 1.0
    """Largest ratio of the longer to the shorter side that is stored. 1: squares; above it, shards have buckets."""
    format: Literal["png", "jpg"]
    """png keeps every pixel, jpg a fifth of the bytes."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Of jpg."""
    max_pixels: Count = 64 * 1024 * 1024
    """Pictures with more are refused before they are decoded."""

    @property
    def frame(self) -> Frame:
        """The buckets of the plan."""
        return Frame(self.size, self.max_aspect)


class DownloadConfig(Settings):
    """How pictures are fetched."""

    threads: Count
    """Connections at a time, for one shard."""
    timeout_s: Annotated[float, Field(gt=0.0)]
    """Longest silence of a server, seconds."""
    max_seconds: Annotated[float, Field(gt=0.0)] = 60.0
    """Longest time for one picture, redirects included."""
    per_host: Count = 8
    """Connections to one host at a time, over all workers."""
    private_addresses: bool = False
    """Whether hosts on private and loopback addresses may be asked: for mirrors on one's own network."""
    retries: Annotated[int, Field(ge=0)]
    """Further passes over the pictures that failed for a passing reason."""
    max_wait_s: Annotated[float, Field(ge=0.0)] = 60.0
    """Longest wait before such a pass for a server that asked for patience (Retry-After)."""
    max_bytes: Count = 20 * 1024 * 1024
    """Longest answer that is read."""
    user_agent: Annotated[str, Field(pattern=r"^[\x21-\x7e][\x20-\x7e]*$")]
    """How we introduce ourselves: product/version (contact)."""
    max_lost: Share
    """Largest share of the planned pictures that a download may lose."""


class OpenMojiConfig(Settings):
    """The embedded source: which pictures, and constants for the scores that it does not have."""

    captions: tuple[str, ...] | None
    """Names of the package `emoji`; None takes every picture that has one."""
    size: Count
    """Side at which the pictures are drawn and served, px."""
    similarity: float
    """Constant."""
    punsafe: Share
    """Constant."""
    pwatermark: Share
    """Constant."""
    aesthetic: float
    """Constant."""


class FolderConfig(Settings):
    """One's own pictures with captions."""

    path: str
    """A local folder: x.jpg with x.txt beside it, or a metadata.csv or metadata.jsonl with file_name and text."""
    licence: str | None = None
    """Of the pictures, an identifier for the model card; None: not stated."""
    attribution: str | None = None
    """Whom to credit, in one's own words, for the model card."""


class CocoCaptionsConfig(Settings):
    """COCO's captions and where their pictures come from."""

    annotations: str
    """captions_*.json: a file, a folder, a pattern, or a URI."""
    url: Literal["coco_url", "flickr_url"] = "coco_url"
    """Field of an image with its URL: COCO's server, or Flickr's."""
    pictures: str | None = None
    """A local folder that holds the pictures by their file_name, at any depth, instead."""


class LocalizedNarrativesConfig(Settings):
    """Localized Narratives and where the pictures that they describe come from."""

    annotations: str
    """*.jsonl: a file, a folder, a pattern, or a URI."""
    images: dict[str, str]
    """By dataset_id, a template of a picture's URL, or of its name below `pictures`; `{image_id}` stands for the ID."""
    pictures: str | None = None
    """A local folder of pictures."""

    @model_validator(mode="after")
    def _templates_are_templates(self) -> Self:
        for dataset, template in self.images.items():
            try:
                named = template.format(image_id="0") != template.format(image_id="1")
            except (AttributeError, IndexError, KeyError, ValueError):
                named = False
            if not named:
                raise ValueError(f"the template of {dataset} is {template!r}; it must hold {{image_id}} only")
        return self


class WebdatasetConfig(Settings):
    """Existing tar shards."""

    path: str
    """Tars: a file, a folder, a pattern, or a URI."""
    max_bytes: Count
    """Largest picture that is read; larger ones are left out."""
    licence: str | None = None
    """Of the pictures, an identifier for the model card; None: not stated."""
    attribution: str | None = None
    """Whom to credit, in one's own words, for the model card."""


class ScorerConfig(Settings):
    """LAION's aesthetic predictor: a CLIP, and a head on its embedding of a picture."""

    clip_weights: str
    """Path or URI of the CLIP (safetensors or torch), under open_clip's names or transformers'."""
    head_weights: str
    """Path or URI of the head; thresholds are on its scale."""
    model: str = "ViT-L-14-quickgelu"
    """open_clip's name of the CLIP that the head is for; LAION's are for OpenAI's ViT-L/14."""
    batch: Count = 32
    """Pictures scored at a time on a device."""


Section = Field(None, exclude_if=lambda settings: settings is None)  # of another source: not shown


class DataConfig(Settings):
    """Where pictures and captions come from, which are taken, and how they are stored."""

    source: Literal["openmoji", "laion_aesthetic", "folder", "coco_captions", "localized_narratives", "webdataset"]
    """A line of `datasets.sources.table`, or LAION's metadata alone."""
    metadata: str | None
    """Parquet with LAION's columns: a file, a folder, a pattern, or a URI. None: generated by the source."""
    scores: str | None = None
    """Parquet with URL and AESTHETIC_SCORE, whose scores count; rows that it does not name are left out."""
    scorer: ScorerConfig | None = None
    """Scores computed from the stored pictures, which views take in place of the plan's; None: none are."""
    removed: str | None = None
    """Removal list: a text file with a key or a URL a line, which are not planned."""
    limit: Count | None
    """Rows to plan, drawn by the seed from those that pass the filters. None takes all."""
    shard_rows: Count
    """Planned rows of a shard."""
    filters: FilterConfig
    views: dict[Annotated[str, Field(pattern="^[a-z0-9_]+$")], ViewConfig] = Field(default_factory=dict)
    """Selections of the stored pictures, for `view` of a training's phases."""
    holdout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the pictures that no training sees; those whose keys, hashes of their content, are the lowest."""
    image: ImageConfig
    attempt: Count = 1
    """Which download of this plan: a later one asks again for what the one before lost for a passing reason."""
    download: DownloadConfig
    openmoji: OpenMojiConfig | None = Section
    folder: FolderConfig | None = Section
    coco_captions: CocoCaptionsConfig | None = Section
    localized_narratives: LocalizedNarrativesConfig | None = Section
    webdataset: WebdatasetConfig | None = Section

    @property
    def settings(self) -> Settings | None:
        """The source's own settings; LAION's metadata has none."""
        found: Settings | None = getattr(self, self.source, None)
        return found

    @model_validator(mode="after")
    def _source_is_complete(self) -> Self:
        if self.source != "laion_aesthetic" and self.settings is None:
            raise ValueError(f"data.{self.source} is missing: choose the source with data={self.source}")
        for name, field in type(self).model_fields.items():
            if field.exclude_if and name != self.source and getattr(self, name) is not None:
                raise ValueError(f"data.{name} is of another source than data.source={self.source}: choose data={name}")
        if self.source == "laion_aesthetic" and self.metadata is None:
            raise ValueError(
                "data.metadata is not set: give a Parquet file, folder, pattern or URI with LAION's columns "
                "(URL, TEXT, WIDTH, HEIGHT, ...), for example data.metadata=/data/laion/*.parquet"
            )
        return self

    @property
    def expected_rows(self) -> int | None:
        """Most rows that the plan can have, as far as the config alone tells."""
        generated = self.openmoji is not None and self.metadata is None
        captions = self.openmoji.captions if self.openmoji and generated else None
        bounds = [bound for bound in (self.limit, len(captions) if captions else None) if bound is not None]
        return min(bounds, default=None)
