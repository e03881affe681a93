"""Settings of the data plane, checked when they are built. Imports nothing heavy: `plan` stays quick."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from datasets.addresses import Allowed
from datasets.buckets import Frame
from settings import FILES, MANNER, PLACE, TABLE, Count, Settings, Share, Text


def _allowed(entry: str) -> str:
    Allowed([entry])
    return entry


def _is_encoding(name: str) -> str:
    try:
        "".encode(name)
    except LookupError:
        raise ValueError("is no encoding that Python knows; give utf-8, cp1252, utf-16 or the like") from None
    return name


Side = Annotated[int, Field(ge=1, le=10**6)]  # px
Bytes = Annotated[int, Field(ge=1, le=10**12)]
Pixels = Annotated[int, Field(ge=1, le=10**10)]
Seconds = Annotated[float, Field(gt=0.0, le=86_400.0)]
Aspect = Annotated[float, Field(ge=1.0, le=1000.0)]  # of the longer to the shorter side
Score = Annotated[float, Field(ge=-1000.0, le=1000.0)]
Cosine = Annotated[float, Field(ge=-1.0, le=1.0)]
Batch = Annotated[int, Field(ge=1, le=10_000)]  # rows taken through a model at a time


NO_SCORES = (
    "the metadata have no aesthetic scores; join some with data.scores=TABLE, or have them computed: "
    "data.scorer.clip_weights=PATH data.scorer.head_weights=PATH"
)


class DataError(ValueError):
    """Metadata, filters or sizes cannot give a data set; the message names the config key and the remedy."""


class Thresholds(Settings):
    """Bounds on a row's size and scores. Null switches a rule off; a missing or NaN value fails one."""

    min_side: Side | None = None
    """Smallest shorter side, px; null: any."""
    max_side: Side | None = None
    """Largest longer side, px; null: any."""
    max_aspect: Aspect | None = None
    """Largest ratio of the longer to the shorter side; null: any."""
    min_aesthetic: Score | None = None
    """Smallest score of LAION's second aesthetic predictor, 1 to 10 (the first one's scale is another); null: any."""
    max_punsafe: Share | None = None
    """Largest probability that the picture is unsafe; null: any."""
    max_pwatermark: Share | None = None
    """Largest probability that the picture has a watermark; null: any."""
    min_similarity: Cosine | None = None
    """Smallest cosine between CLIP's embeddings of picture and caption; null: any."""

    @model_validator(mode="after")
    def _sides_are_ordered(self) -> Self:
        if self.min_side and self.max_side and self.min_side > self.max_side:
            raise ValueError(
                f"min_side={self.min_side} is above max_side={self.max_side}, so that nothing passes; lower one, raise "
                "the other, or set one to null"
            )
        return self


class FilterConfig(Thresholds):
    """Which rows of the metadata are planned."""

    min_words: Annotated[int, Field(ge=1, le=1000)] = 1
    """Fewest words of a caption."""
    max_characters: Annotated[int, Field(ge=1, le=10**6)] = 2000
    """Longest caption, in characters."""
    max_same_caption: Count | None = None
    """Most rows with the same caption, for shops repeat theirs a thousand times; null: any."""
    max_same_url: Count | None = None
    """Most rows with the same URL and different captions, drawn by the seed; null: any.

    A picture is fetched for each of its rows."""

    @model_validator(mode="after")
    def _captions_fit(self) -> Self:
        if self.max_characters < 2 * self.min_words - 1:
            raise ValueError(
                f"max_characters={self.max_characters} is too few for min_words={self.min_words}, so that no caption "
                "passes; raise one or lower the other"
            )
        return self


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
    proxy: Annotated[str, Field(pattern=r"^http://[^\s/@?#]+:[0-9]+/?$", max_length=500)] | None = None
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


class OpenMojiConfig(Settings):
    """The embedded source: which pictures, and constants for the scores that it does not have."""

    captions: Annotated[tuple[Text, ...], Field(min_length=1)] | None
    """Names of the package `emoji`, without skin tones; null takes every picture that has one (about 1,900)."""
    more_captions: tuple[Text, ...] = Field((), exclude_if=lambda captions: not captions)
    """Further names, beside `captions`."""
    size: Annotated[int, Field(ge=1, le=8192)]
    """Side at which the pictures are drawn and served, px."""
    similarity: Cosine
    """Constant in place of CLIP's cosine of picture and caption."""
    punsafe: Share
    """Constant in place of the probability that a picture is unsafe."""
    pwatermark: Share
    """Constant in place of the probability that a picture has a watermark."""
    aesthetic: Score
    """Constant in place of the aesthetic score."""

    @property
    def named(self) -> tuple[Text, ...] | None:
        """All captions that are named; None: every picture's."""
        return None if self.captions is None else (*self.captions, *self.more_captions)


class FolderConfig(Settings):
    """One's own pictures with captions."""

    path: Annotated[Text, PLACE]
    """A local folder: x.jpg with x.txt or x.caption beside it, or metadata.csv, .tsv, .jsonl or .parquet.

    Tables have the columns file_name and text (or caption); a list of captions gives a row for each."""
    encoding: Annotated[str, AfterValidator(_is_encoding)] = "utf-8"
    """Encoding of captions in text files, CSV and JSON Lines, such as cp1252 or utf-16; a byte order mark may lead."""
    caption_lines: Literal["joined", "each"] = "joined"
    """Lines of a caption's text file: joined, one caption; or each a caption of its own, a row each."""
    uncaptioned: Literal["left_out", "file_name", "folder_name"] = "left_out"
    """What becomes of a picture without a caption: left out, or captioned by the name of its file or folder."""
    follow_links: bool = True
    """Whether links out of the folder, and those to folders, are followed: into a cache, say.

    Give false for a folder by strangers: a link may lead anywhere on this machine."""
    max_left_out: Annotated[Share, MANNER] = 0.5
    """Largest share of the pictures, captions and rows of the folder that may be left out; `plan` lists it."""
    licence: Text | None = None
    """Licence of the pictures for the model card, an identifier such as cc-by-4.0; null: not stated."""
    attribution: Text | None = None
    """Whom to credit in the model card, in one's own words; null: nobody."""


class CocoCaptionsConfig(Settings):
    """COCO's captions and where their pictures come from."""

    annotations: Annotated[Text, PLACE]
    """Files `captions_*.json`: one, a folder, a pattern, or a URI."""
    url: Literal["coco_url", "flickr_url"] = "coco_url"
    """Which of a picture's two URLs is fetched: that of COCO's server, or Flickr's, the original, often gone."""
    pictures: Annotated[Text | None, PLACE] = None
    """A local folder that holds the pictures by their file_name, at any depth; null: they are fetched."""


class LocalizedNarrativesConfig(Settings):
    """Localized Narratives and where the pictures that they describe come from."""

    annotations: Annotated[Text, PLACE]
    """Files `*.jsonl`: one, a folder, a pattern, or a URI."""
    images: dict[Text, Text]
    """By dataset_id, a template of a picture's URL, or of its name below `pictures`; `{image_id}` stands for the ID."""
    pictures: Annotated[Text | None, PLACE] = None
    """A local folder of pictures, for Flickr30k and ADE20k, which are not on the web by their IDs; null: none."""

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

    path: Annotated[Text, PLACE]
    """Tars, compressed or not: a file, a folder, a pattern, or a URI."""
    max_bytes: Bytes
    """Largest picture that is read, bytes; larger ones are left out."""
    licence: Text | None = None
    """Licence of the pictures for the model card, an identifier such as cc-by-4.0; null: not stated."""
    attribution: Text | None = None
    """Whom to credit in the model card, in one's own words; null: nobody."""


class ScorerConfig(Settings):
    """LAION's aesthetic predictor: a CLIP, and a head on its embedding of a picture."""

    clip_weights: Annotated[Text, FILES]
    """Path or URI of the CLIP (safetensors or torch), under open_clip's names or transformers'."""
    head_weights: Annotated[Text, FILES]
    """Path or URI of the head; thresholds are on its scale."""
    model: Text = "ViT-L-14-quickgelu"
    """open_clip's name of the CLIP that the head is for; LAION's are for OpenAI's ViT-L/14."""
    batch: Annotated[Batch, MANNER] = 32
    """Pictures scored at a time on a device."""


Section = Field(None, exclude_if=lambda settings: settings is None)  # of another source: not shown


class DataConfig(Settings):
    """Where pictures and captions come from, which are taken, and how they are stored."""

    source: Literal["openmoji", "laion_aesthetic", "folder", "coco_captions", "localized_narratives", "webdataset"]
    """Where rows and pictures come from, as `data=` chooses it; its own settings are the section of that name."""
    metadata: Annotated[Text | None, TABLE]
    """Parquet with LAION's columns: a file, a folder, a pattern, or a URI; null: the source's own rows.

    `laion_aesthetic` has none of its own."""
    scores: Annotated[Text | None, TABLE] = None
    """Parquet with URL and AESTHETIC_SCORE, whose scores count; null: the metadata's own.

    Scores are joined by URL; rows that it does not name are left out."""
    scorer: ScorerConfig | None = None
    """Scores computed from the stored pictures, which views take in place of the plan's; null: none are."""
    removed: Annotated[Text | None, FILES] = None
    """Removal list: a text file with a key or a URL a line, which are not planned; null: none."""
    limit: Annotated[int, Field(ge=1, le=10**12)] | None
    """Rows to plan, drawn by the seed from those that pass the filters; null: all of them."""
    shard_rows: Annotated[int, Field(ge=1, le=100_000)]
    """Planned rows of a shard."""
    filters: FilterConfig
    """Which rows of the metadata are planned; null switches a rule off."""
    views: dict[Annotated[str, Field(pattern="^[a-z0-9_]+$", max_length=64)], ViewConfig] = Field(default_factory=dict)
    """Selections of the stored pictures by name, for `view` of a training's phases; each has bounds as `filters`."""
    holdout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the pictures that no training sees, for validation; 0: none, and no validation.

    They are drawn by the hashes of their URLs, the same at every seed, limit and number of workers. With each go all
    rows that show it: other captions, other URLs of the same bytes, duplicates where they are known."""
    held_out_captions: tuple[Text, ...] = Field((), max_length=10_000)
    """Captions of which no training sees a picture, beside those of `holdout`: compositions to ask for later."""
    image: ImageConfig
    """How a picture is stored."""
    attempt: Annotated[int, Field(ge=1, le=1000)] = 1
    """Which download of this plan, from 1: a later one asks again for what was lost for a passing reason (`data
    retry`)."""
    download: DownloadConfig
    """How pictures are fetched."""
    openmoji: OpenMojiConfig | None = Section
    """Settings of `source: openmoji`."""
    folder: FolderConfig | None = Section
    """Settings of `source: folder`."""
    coco_captions: CocoCaptionsConfig | None = Section
    """Settings of `source: coco_captions`."""
    localized_narratives: LocalizedNarrativesConfig | None = Section
    """Settings of `source: localized_narratives`."""
    webdataset: WebdatasetConfig | None = Section
    """Settings of `source: webdataset`."""

    @property
    def holds_out(self) -> bool:
        """Whether there are pictures that no training sees."""
        return bool(self.holdout or self.held_out_captions)

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

    @model_validator(mode="after")
    def _pictures_are_large_enough(self) -> Self:
        largest = {"filters.max_side": self.filters.max_side, "openmoji.size": self.openmoji and self.openmoji.size}
        for key, side in largest.items():
            if side and side < self.image.size:
                raise ValueError(
                    f"{key}={side} is below image.size={self.image.size}: no picture is enlarged, so that none would "
                    "be left; raise it, or lower image.size"
                )
        return self

    @property
    def expected_rows(self) -> int | None:
        """Most rows that the plan can have, as far as the config alone tells."""
        generated = self.openmoji is not None and self.metadata is None
        named = self.openmoji.named if self.openmoji and generated else None
        bounds = [bound for bound in (self.limit, len(named) if named else None) if bound is not None]
        return min(bounds, default=None)
