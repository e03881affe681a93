"""COCO Captions: `captions_*.json` with images, annotations and licenses, as cocodataset.org gives them out.

A row is a caption; a picture has five or so. The pictures are fetched from COCO's own server or from Flickr, or served
from a local folder (`datasets.sources.folder`). Each picture's licence stands in its row.
"""

import codecs
import json
import posixpath
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import pyarrow as pa

from datasets.config import DataError
from datasets.files import storage
from datasets.files.inputs import Named
from datasets.left_out import LeftOut
from datasets.source_settings import CocoCaptionsConfig
from datasets.sources import folder
from datasets.sources.captions import captions, number, text
from datasets.sources.files_at import files_at
from datasets.sources.loopback import Hosts

KEY = "data.coco_captions"
LICENCE = {
    "licence": "other",
    "licence_url": "https://cocodataset.org/#termsofuse",
    "source": "https://cocodataset.org",
    "attribution": "Captions by the COCO Consortium, CC BY 4.0; pictures from Flickr, each under its own licence.",
}

_EDGE = 1 << 10  # bytes
_OTHERS = ("instances_", "person_keypoints_", "image_info_", "stuff_", "panoptic_")  # files of COCO's beside captions

Local = Mapping[str, list[str]]  # pictures of the local folder by their file names


def tables(config: CocoCaptionsConfig, left_out: LeftOut) -> Iterator[pa.Table]:
    """The captions of one file after the other; see `datasets.sources.table.Source`.

    Left out: `no_picture` (a caption whose image is not listed, not in the local folder, or without a URL),
    `no_caption` (an image without annotation, or one as of `captions`), `no_text`, and `no_row` (an image or annotation
    that is none).
    """
    names = _names(config.pictures)
    files = _files(config)
    for file in sorted(_all(config).keys() - files.keys()):
        left_out.pass_over(".json", file, "COCO's files of that name hold no captions")
    for file, path in files.items():
        rows = _rows(file, path, config.url, names, left_out)
        if not rows:
            raise DataError(
                f"{KEY}.annotations: {path} holds no caption with its picture ({left_out.told()}); give captions_*.json"
            )
        yield pa.Table.from_pylist(rows)


def hosts(config: CocoCaptionsConfig) -> AbstractContextManager[Hosts]:
    """The local pictures' server, if there are any."""
    return folder.serving(config.pictures, f"{KEY}.pictures")


def identity(config: CocoCaptionsConfig) -> dict[str, Any]:
    """The settings, with the files for their paths; a first file cut short is refused here."""
    files = _files(config)
    _check(next(iter(files.values())))
    pictures = config.pictures and folder.content(config.pictures, f"{KEY}.pictures")
    return {"url": config.url, "annotations": Named(files), "pictures": pictures}


def licence(config: CocoCaptionsConfig) -> dict[str, str | None]:
    """COCO's terms, and whom to credit."""
    return dict(LICENCE)


def _files(config: CocoCaptionsConfig) -> dict[str, str]:
    """The files of captions: all but COCO's others, where there are any."""
    files = _all(config)
    return {name: path for name, path in files.items() if not posixpath.basename(name).startswith(_OTHERS)} or files


def _all(config: CocoCaptionsConfig) -> dict[str, str]:
    return files_at(config.annotations, f"{KEY}.annotations", ".json", ".json file", "captions_*.json")


def _check(path: str) -> None:
    """Refuse what is no JSON object by its first and last bytes: the files are large."""
    with storage.opened(path) as file:
        start = file.read_at(_EDGE, 0).removeprefix(codecs.BOM_UTF8).strip()
        end = file.read_at(_EDGE, max(0, file.size() - _EDGE)).strip()
    if not (start.startswith(b"{") and end.endswith(b"}")):
        what = "is no JSON object, or cut short" if start else "is empty"
        raise DataError(f"{KEY}.annotations: {path} {what}; give captions_*.json, or fetch it again")


def _names(pictures: str | None) -> Local | None:
    """Where below the local folder pictures lie, by the last part of their names."""
    if pictures is None:
        return None
    found: dict[str, list[str]] = {}
    for name in filter(folder.is_picture, folder.listing(pictures, f"{KEY}.pictures")):
        found.setdefault(posixpath.basename(name), []).append(name)
    return found


def _found(called: object, names: Local) -> list[str]:
    """The local pictures that a file_name may mean, with or without the folders that they lie in."""
    if not isinstance(called, str):
        return []
    called = unicodedata.normalize("NFC", called)  # as `folder.listing` has names
    there = names.get(posixpath.basename(called), [])
    return [name for name in there if f"/{name}".endswith(f"/{called}") or f"/{called}".endswith(f"/{name}")]


def _rows(file: str, path: str, url: str, names: Local | None, left_out: LeftOut) -> list[dict[str, Any]]:
    """The captions of a file with their pictures."""
    try:
        content = json.loads(storage.read(path))
        if not isinstance(content, dict):
            raise TypeError("it is no object")
        lists = [content.get("licenses", []), content["images"], content["annotations"]]
        if not all(isinstance(found, list) for found in lists):
            raise TypeError("its licenses, images or annotations are no list")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(
            f"{KEY}.annotations: {path} is no JSON of COCO captions ({reason}); give captions_*.json"
        ) from error
    licences = {str(item["id"]): _licence(item) for _, item in _objects(f"{file} license", lists[0], "id")}
    images: dict[int | str, dict[str, Any] | None] = {}
    for place, listed in _objects(f"{file} image", lists[1], "id", left_out):
        first = images.setdefault(listed["id"], listed)
        if first is None or any(first.get(name) != listed.get(name) for name in ("file_name", url)):
            left_out.add("duplicate", place, "another picture has this id, so nobody knows whose captions those are")
            images[listed["id"]] = None
    rows: list[dict[str, Any]] = []
    captioned = set()
    for place, annotation in _objects(f"{file} annotation", lists[2], "image_id", left_out):
        captioned.add(annotation["image_id"])
        image = images.get(annotation["image_id"])
        if image is None:
            told = "that of several pictures" if annotation["image_id"] in images else "not listed"
            left_out.add("no_picture", place, f"its image_id={annotation['image_id']} is {told}")
            continue
        about = _about(image, url, names, licences)
        if about is None:
            where = (
                f"{url}={image.get(url)}" if names is None else "it is not in the local folder, or there several times"
            )
            left_out.add("no_picture", place, f"no picture {image.get('file_name')}: {where}")
            continue
        rows += [
            {**about, "TEXT": caption.encode()} for caption in captions(annotation.get("caption"), left_out, place)
        ]
    for image_id in images.keys() - captioned:
        left_out.add("no_caption", f"{file} image {image_id}", "no annotation names it")
    return rows


def _objects(
    what: str, found: list[Any], key: str, left_out: LeftOut | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a list that have a number or a text as `key`, with what to call them; others are left out."""
    for place, item in enumerate(found):
        if isinstance(item, dict) and isinstance(item.get(key), int | str):
            yield f"{what} {item.get('id', place)}", item
        elif left_out is not None:
            left_out.add("no_row", f"{what} {place}", f"it is no object with {key}")


def _licence(item: dict[str, Any]) -> str | None:
    """A licence as the file has it: `name (url)`, or what is there of these."""
    name, url = text(item.get("name")), text(item.get("url"))
    return f"{name} ({url})" if name and url else name or url


def _about(
    image: dict[str, Any], url: str, names: Local | None, licences: Mapping[str, str | None]
) -> dict[str, Any] | None:
    """A picture's columns; None where nobody knows where it is."""
    local = None if names is None else _found(image.get("file_name"), names)
    place = image.get(url) if local is None else folder.url(local[0]) if len(local) == 1 else None
    if not isinstance(place, str):
        return None
    return {
        "URL": place.encode(errors="replace"),
        "WIDTH": number(image.get("width")),
        "HEIGHT": number(image.get("height")),
        "LICENSE": licences.get(str(image.get("license"))),
        "ORIGINAL_URL": text(image.get(url)) if local else None,
    }
