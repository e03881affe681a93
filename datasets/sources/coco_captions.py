"""COCO Captions: `captions_*.json` with images, annotations and licenses, as cocodataset.org gives them out.

A row is a caption; a picture has five or so. The pictures are fetched from COCO's own server or from Flickr, or served
from a local folder (`datasets.sources.folder`). Each picture's licence stands in its row.
"""

import codecs
import json
import posixpath
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pyarrow as pa

from datasets.config import CocoCaptionsConfig, DataError
from datasets.files import storage
from datasets.files.inputs import Named
from datasets.sources import folder
from datasets.sources.loopback import Hosts

KEY = "data.coco_captions"
LICENCE = {
    "licence": "other",
    "licence_url": "https://cocodataset.org/#termsofuse",
    "source": "https://cocodataset.org",
    "attribution": "Captions by the COCO Consortium, CC BY 4.0; pictures from Flickr, each under its own licence.",
}

_EDGE = 1 << 10  # bytes


def tables(config: CocoCaptionsConfig, unusable: Counter[str]) -> Iterator[pa.Table]:
    """The captions of one file after the other; see `datasets.sources.table.Source`.

    Left out: `no_picture` (a caption whose image is not listed, or not in the local folder), `no_caption` (an image).
    """
    names = _names(config.pictures)
    for path in _files(config).values():
        rows = _rows(path, config.url, names, unusable)
        if not rows:
            raise DataError(f"{KEY}.annotations: {path} holds no caption with its picture; give captions_*.json")
        yield pa.Table.from_pylist(rows)


def hosts(config: CocoCaptionsConfig) -> AbstractContextManager[Hosts]:
    """The local pictures' server, if there are any."""
    return folder.serving(config.pictures, f"{KEY}.pictures")


def identity(config: CocoCaptionsConfig) -> dict[str, Any]:
    """The settings, with the files for their paths; a first file cut short is refused here."""
    _check(next(iter(_files(config).values())))
    pictures = config.pictures and folder.content(config.pictures, f"{KEY}.pictures")
    return {"url": config.url, "annotations": Named(_files(config)), "pictures": pictures}


def licence(config: CocoCaptionsConfig) -> dict[str, str | None]:
    """COCO's terms, and whom to credit."""
    return dict(LICENCE)


def _files(config: CocoCaptionsConfig) -> dict[str, str]:
    files = storage.matching(config.annotations, ".json")
    if not files:
        raise DataError(f"{KEY}.annotations: there is no .json file at {config.annotations}; give captions_*.json")
    return files


def _check(path: str) -> None:
    """Refuse what is no JSON object by its first and last bytes: the files are large."""
    with storage.opened(path) as file:
        start = file.read_at(_EDGE, 0).removeprefix(codecs.BOM_UTF8).strip()
        end = file.read_at(_EDGE, max(0, file.size() - _EDGE)).strip()
    if not (start.startswith(b"{") and end.endswith(b"}")):
        what = "is no JSON object, or cut short" if start else "is empty"
        raise DataError(f"{KEY}.annotations: {path} {what}; give captions_*.json, or fetch it again")


def _names(pictures: str | None) -> dict[str, str] | None:
    """Where below the local folder each picture lies, by its file name: COCO's are unique."""
    if pictures is None:
        return None
    files, _ = folder.listing(pictures, f"{KEY}.pictures")
    return {posixpath.basename(name): name for name in files}


def _rows(path: str, url: str, names: dict[str, str] | None, unusable: Counter[str]) -> list[dict[str, Any]]:
    rows = []
    try:
        content = json.loads(storage.read(path))
        licences = {item["id"]: f"{item['name']} ({item['url']})" for item in content.get("licenses", [])}
        images = {image["id"]: image for image in content["images"]}
        captioned = set()
        for annotation in content["annotations"]:
            image, caption = images.get(annotation["image_id"]), str(annotation["caption"])
            name = names.get(image["file_name"]) if names is not None and image else None
            if image:
                captioned.add(image["id"])
            if image is None or (names is not None and name is None):
                unusable["no_picture"] += 1
                continue
            rows.append(
                {
                    "URL": (folder.url(name) if name else str(image[url])).encode(errors="replace"),
                    "TEXT": caption.encode(errors="replace"),  # JSON can spell halves of characters
                    "WIDTH": float(image["width"]),
                    "HEIGHT": float(image["height"]),
                    "LICENSE": licences.get(image.get("license")),
                    "ORIGINAL_URL": image.get(url) if name else None,
                }
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(
            f"{KEY}.annotations: {path} is no JSON of COCO captions ({reason}); give captions_*.json"
        ) from error
    unusable["no_caption"] += len(images) - len(captioned)
    return rows
