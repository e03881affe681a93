"""Localized Narratives: the published JSON Lines with dataset_id, image_id and caption, with or without the traces.

They describe pictures of Open Images, COCO, Flickr30k and ADE20k and do not say where these lie: that is configured, a
template for each `dataset_id`. A row is a narrative; its picture's size is not known before it is fetched, unless it
lies in a local folder.
"""

import io
import json
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from datasets import pictures
from datasets.config import DataError
from datasets.files import storage
from datasets.files.inputs import Named
from datasets.left_out import LeftOut
from datasets.outcomes import Lost
from datasets.source_settings import LocalizedNarrativesConfig
from datasets.sources import folder
from datasets.sources.captions import captions, text
from datasets.sources.files_at import files_at
from datasets.sources.loopback import Hosts

KEY = "data.localized_narratives"
LICENCE = {
    "licence": "other",
    "licence_url": "https://creativecommons.org/licenses/by/4.0/",
    "source": "https://google.github.io/localized-narratives",
    "attribution": "Captions: Localized Narratives (Pont-Tuset et al., ECCV 2020), CC BY 4.0. "
    "The licence of each picture is its owner's.",
}
_BATCH_ROWS = 1 << 14
_SCHEMA = pa.schema([("URL", pa.binary()), ("TEXT", pa.binary()), ("WIDTH", pa.float64()), ("HEIGHT", pa.float64())])


def tables(config: LocalizedNarrativesConfig, left_out: LeftOut) -> Iterator[pa.Table]:
    """The narratives, 16,384 at a time; see `datasets.sources.table.Source`.

    Left out: `no_template` (its dataset_id has none), `no_picture` (not in the local folder), `unreadable` (there, but
    of no format that we read), `no_row` (a line that is no narrative), and captions that are none, as of `captions`.
    """
    _check(config)
    local = folder.listing(config.pictures, f"{KEY}.pictures") if config.pictures else None
    unknown = Counter[str]()
    rows: list[dict[str, Any]] = []
    found = 0
    for path in _files(config).values():
        for place, dataset, image, caption in _narratives(path, left_out):
            template = config.images.get(dataset)
            if template is None:
                unknown[dataset] += 1
                left_out.add("no_template", place, f"data.localized_narratives.images has no template of {dataset}")
                continue
            about = _about(template.format(image_id=image), local, left_out)
            texts = captions(caption, left_out, place) if about else []
            rows += [{**(about or {}), "TEXT": said.encode()} for said in texts]
            if len(rows) >= _BATCH_ROWS:
                found += len(rows)
                yield pa.Table.from_pylist(rows, schema=_SCHEMA)
                rows = []
    if rows:
        yield pa.Table.from_pylist(rows, schema=_SCHEMA)
    elif not found:
        told = f"; their dataset_id {', '.join(sorted(unknown)[:5])} has no template" if unknown else ""
        told += "".join(f"; for one, {example}" for example in left_out.examples(1)[:3])
        raise DataError(f"{KEY}.images: no narrative at {config.annotations} can be used ({left_out.told()}){told}")


def hosts(config: LocalizedNarrativesConfig) -> AbstractContextManager[Hosts]:
    """The local pictures' server, if there are any."""
    return folder.serving(config.pictures, f"{KEY}.pictures")


def identity(config: LocalizedNarrativesConfig) -> dict[str, Any]:
    """The settings, with the files for their paths; files without narratives are refused here."""
    _check(config)
    local = config.pictures and folder.content(config.pictures, f"{KEY}.pictures")
    return {
        "images": dict(config.images),
        "annotations": Named(_files(config)),
        "pictures": local,
    }


def licence(config: LocalizedNarrativesConfig) -> dict[str, str | None]:
    """The captions' terms, and whom to credit."""
    return dict(LICENCE)


def _files(config: LocalizedNarrativesConfig) -> dict[str, str]:
    return files_at(config.annotations, f"{KEY}.annotations", ".jsonl", ".jsonl file", "the narratives")


def _check(config: LocalizedNarrativesConfig) -> None:
    """Refuse files that have no narrative."""
    left_out = LeftOut()
    narratives = chain.from_iterable(_narratives(path, left_out) for path in _files(config).values())
    if next(narratives, None) is None:
        wrong = "".join(f" ({example})" for example in left_out.examples(1))
        raise DataError(
            f"{KEY}.annotations: there is no narrative in {config.annotations}{wrong}; give the published *.jsonl"
        )


def _about(place: str, local: dict[str, Path] | None, left_out: LeftOut) -> dict[str, Any] | None:
    """The columns of the picture at a URL, or of that name below the local folder."""
    if place.startswith(("http://", "https://")):
        return {"URL": place.encode(errors="replace")}
    place = unicodedata.normalize("NFC", place)  # as `folder.listing` has names
    file = (local or {}).get(place)
    if file is None:
        left_out.add("no_picture", place, "it is not in data.localized_narratives.pictures")
        return None
    try:
        with file.open("rb") as stream:
            width, height = pictures.size(stream)
    except (Lost, OSError) as error:
        left_out.add("unreadable", place, str(error))
        return None
    return {"URL": folder.url(place).encode(), "WIDTH": width, "HEIGHT": height}


def _narratives(path: str, left_out: LeftOut) -> Iterator[tuple[str, str, str, object]]:
    """Place, dataset_id, image_id and caption of every line; what is no narrative is left out."""
    with storage.streamed(path) as stream, io.BufferedReader(stream) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{posixpath.basename(path)} line {number}"
            try:
                narrative = json.loads(line)
                dataset, image = (_name(narrative, key) for key in ("dataset_id", "image_id"))
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else error
                left_out.add("no_row", place, f"it is no narrative ({reason})")
            else:
                yield place, dataset, image, narrative.get("caption")


def _name(narrative: dict[str, object], key: str) -> str:
    """A narrative's dataset_id or image_id, a text or a number."""
    name = text(narrative[key])
    if name is None:
        raise ValueError(f"{key}={narrative[key]!r}")
    return name
