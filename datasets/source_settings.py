"""Settings of sources: where rows and pictures come from, and which of the rows are planned."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from datasets.caption_settings import Name
from settings import MANNER, PLACE, TABLE, Count, Settings, Share, Text

SourceName = Literal[
    "openmoji", "laion_aesthetic", "folder", "coco_captions", "localized_narratives", "webdataset", "mixture"
]
MIXTURE = "mixture"


def _is_encoding(name: str) -> str:
    try:
        "".encode(name)
    except LookupError:
        raise ValueError("is no encoding that Python knows; give utf-8, cp1252, utf-16 or the like") from None
    return name


Side = Annotated[int, Field(ge=1, le=10**6)]  # px
Bytes = Annotated[int, Field(ge=1, le=10**12)]
Aspect = Annotated[float, Field(ge=1.0, le=1000.0)]  # of the longer to the shorter side
Score = Annotated[float, Field(ge=-1000.0, le=1000.0)]
Cosine = Annotated[float, Field(ge=-1.0, le=1.0)]


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

    A picture is fetched for each of its rows; but once with `data.captions`, where this does not count."""

    @model_validator(mode="after")
    def _captions_fit(self) -> Self:
        if self.max_characters < 2 * self.min_words - 1:
            raise ValueError(
                f"max_characters={self.max_characters} is too few for min_words={self.min_words}, so that no caption "
                "passes; raise one or lower the other"
            )
        return self


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


Section = Field(None, exclude_if=lambda settings: settings is None)  # of another source: not shown


class SourceConfig(Settings):
    """A source with what is its own: its rows, their scores, and which of them are planned."""

    source: SourceName
    """Where rows and pictures come from, as `data=` chooses it; its own settings are the section of that name.

    `mixture`: from all of `sources`."""
    metadata: Annotated[Text | None, TABLE] = None
    """Parquet with LAION's columns: a file, a folder, a pattern, or a URI; null: the source's own rows.

    `laion_aesthetic` has none of its own."""
    scores: Annotated[Text | None, TABLE] = None
    """Parquet with URL and AESTHETIC_SCORE, whose scores count; null: the metadata's own.

    Scores are joined by URL; rows that it does not name are left out."""
    filters: FilterConfig = FilterConfig()
    """Which rows of the metadata are planned; null switches a rule off."""
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
    def settings(self) -> Settings | None:
        """The source's own settings; LAION's metadata has none."""
        found: Settings | None = getattr(self, self.source, None)
        return found

    @property
    def named_rows(self) -> int | None:
        """Most rows that it can give, as far as the config alone tells."""
        named = self.openmoji.named if self.openmoji and self.metadata is None else None
        return len(named) if named else None


class MixedSource(SourceConfig):
    """One of the sources of a mixture. What is not said is as in conf/data/ of that source."""

    name: Name | None = None
    """What it is called in plans, reports and the hosts of its pictures; null: as its source is."""
    weight: Annotated[float, Field(gt=0.0, le=1e6)] | None = None
    """Its share of the planned rows, relative to the others' weights; null, for all or none: every row is taken."""


SECTIONS = tuple(name for name in get_args(SourceName) if name in SourceConfig.model_fields)
_OWN = re.compile(rf"\bdata\.(?=({'|'.join(('metadata', 'scores', 'filters', *SECTIONS))})\b)")


@dataclass(frozen=True)
class Part:
    """A source of a plan: the dotted key of its settings, its name there, and its settings.

    `apart`: there are others, whose pictures may have the same names.
    """

    key: str
    name: str
    config: SourceConfig
    weight: float | None = None
    apart: bool = False

    def renamed(self, text: str) -> str:
        """A sentence that names the keys of a source as `data.<key>`, with those of this one."""
        return _OWN.sub(f"{self.key}.", text)

    def check(self) -> None:
        """Refuse, with a `ValueError`, settings that are of another source, or that lack."""
        config, source = self.config, self.config.source
        choose = f"choose {'data' if self.key == 'data' else f'{self.key}.source'}="
        if source == MIXTURE:
            raise ValueError(f"{self.key}.source: a mixture holds no mixtures; name their sources here")
        if source in SECTIONS and config.settings is None:
            raise ValueError(f"{self.key}.{source} is missing: {choose}{source}")
        if wrong := next((name for name in SECTIONS if name != source and getattr(config, name) is not None), None):
            raise ValueError(
                f"{self.key}.{wrong} is of another source than {self.key}.source={source}: {choose}{wrong}"
            )
        if source not in SECTIONS and config.metadata is None:
            raise ValueError(
                f"{self.key}.metadata is not set: give a Parquet file, folder, pattern or URI with LAION's columns "
                f"(URL, TEXT, WIDTH, HEIGHT, ...), for example {self.key}.metadata=/data/laion/*.parquet"
            )


def check_mixture(shared: SourceConfig, sources: Sequence[MixedSource]) -> None:
    """Refuse, with a `ValueError`, a mixture of none, of two with one name, with weights for some, or with settings of
    its own that are each source's."""
    if not sources:
        raise ValueError("data.sources is empty; name the sources of the mixture: [{source: folder, ...}, ...]")
    own = [name for name in ("metadata", "scores", *SECTIONS) if getattr(shared, name) is not None]
    if own := own + ["filters"] * (shared.filters != FilterConfig()):
        raise ValueError(
            f"data.{own[0]} is of a single source; give it to those of the mixture: data.sources.0.{own[0]}"
        )
    names = [source.name or source.source for source in sources]
    for place, name in enumerate(names):
        if name in names[:place]:
            key = f"data.sources.{place}"
            raise ValueError(f"{key}: another source is called {name}; give this one another {key}.name")
    without = [place for place, source in enumerate(sources) if source.weight is None]
    if 0 < len(without) < len(sources):
        raise ValueError(f"data.sources.{without[0]}.weight is missing: give one to all of the sources, or to none")
