"""One's own pictures: a local folder with captions, as LAION metadata and as a web server (`loopback`).

Captions lie as people have them: in `x.txt` beside `x.jpg`, or in Hugging Face's imagefolder form, a `metadata.csv` or
`metadata.jsonl` with `file_name`, relative to that file, and `text`. Where a picture has both, the table counts. Hidden
files are passed over. Names are taken in Unicode's NFC, so that a table finds a file whose name came from a Mac.

A picture's URL is its name below the folder, so keys do not tell where the folder lies. On a cluster the folder must be
at the same path on every node.
"""

import codecs
import csv
import hashlib
import json
import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa

from datasets import pictures
from datasets.config import DataError, FolderConfig
from datasets.files import storage
from datasets.files.inputs import Named
from datasets.outcomes import Lost
from datasets.sources import loopback
from datasets.sources.loopback import Address, Hosts

HOST = "folder.invalid"
KEY = "data.folder.path"
_TABLES = ("metadata.csv", "metadata.jsonl")
_READ = (".jpg", ".jpeg", ".png", ".webp", ".gif")
_SUFFIXES = (*_READ, ".bmp", ".tif", ".tiff", ".heic", ".avif")  # the others count as unreadable
_HELP = "put the caption of x.jpg into x.txt beside it, or give a metadata.csv with the columns file_name,text"


def tables(config: FolderConfig, unusable: Counter[str]) -> Iterator[pa.Table]:
    """`metadata` as sources give it (`datasets.sources.table`)."""
    table, counts = metadata(config)
    unusable.update(counts)
    yield table


def metadata(config: FolderConfig) -> tuple[pa.Table, dict[str, int]]:
    """The folder's rows in LAION's schema, by name of the picture; scores are left out, since there are none.

    Also returns how many pictures and captions are left out, by reason: `no_caption`, `no_picture`, `unreadable`
    (of no format that we read, or damaged in its header), `duplicate` (the same bytes with the same caption), and
    `link` (a link to a folder, or out of this one).

    Raises:
        DataError: the folder is not there, cannot be read, or holds no picture that can be used; a table is damaged.
    """
    files, links = listing(config.path, KEY)
    pairs, rejected = _pairs(files)
    rejected["link"] = links
    rows, seen = [], set()
    for name, caption in sorted(pairs):
        try:
            with open(files[name], "rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
                width, height = pictures.size(file)
        except (Lost, OSError):
            rejected["unreadable"] += 1
            continue
        if (digest, caption) in seen:
            rejected["duplicate"] += 1
            continue
        seen.add((digest, caption))
        rows.append({"URL": url(name), "TEXT": caption, "WIDTH": width, "HEIGHT": height})
    counts = {reason: count for reason, count in rejected.items() if count}
    if not rows:
        told = ", ".join(f"{reason} {count}" for reason, count in counts.items())
        raise DataError(f"data.folder.path: no picture in {config.path} can be used ({told}); {_HELP}")
    return pa.Table.from_pylist(rows), counts


def hosts(config: FolderConfig) -> AbstractContextManager[Hosts]:
    """Serve the folder's pictures while a download runs."""
    return serving(config.path, KEY)


def identity(config: FolderConfig) -> dict[str, Any]:
    """The settings; for the path, what a plan reads: pictures and captions.

    Raises:
        DataError: the folder is not there, cannot be read, or holds no pictures.
    """
    return config.model_dump(exclude={"path"}) | {"content": content(config.path, KEY)}


def licence(config: FolderConfig) -> dict[str, str | None]:
    """The licence of the pictures and whom to credit, as the config says."""
    return {"licence": config.licence, "attribution": config.attribution}


@contextmanager
def serving(path: str | None, key: str) -> Iterator[Hosts]:
    """`serve` as a map from host to address; an empty one where there is no folder."""
    if path is None:
        yield {}
    else:
        with serve(path, key) as address:
            yield {HOST: address}


@contextmanager
def serve(path: str, key: str) -> Iterator[Address]:
    """Serve a folder's pictures by their names on loopback, and nothing else; yields the server's address.

    Each is looked for when it is asked for: a download's tasks have no need of the whole folder's listing.

    Raises:
        DataError: names `key`; the folder is not there, or no local one.
    """
    root = _root(path, key)
    if not root.is_dir():
        raise DataError(f"{key}: there is no folder {path} on this machine; give a local folder that every node has")
    spelt = lru_cache(maxsize=None)(_spelt)

    def body(name: str) -> bytes | None:
        file = _served(root, unquote(name, errors="surrogateescape"), spelt)
        return file.read_bytes() if file else None

    with loopback.serve(body) as address:
        yield address


def url(name: str) -> str:
    """The URL under which `serve` gives out a picture, by its name relative to the folder."""
    return f"http://{HOST}/{quote(name, errors='surrogateescape')}"


def content(path: str, key: str) -> Named:
    """The pictures and captions of a folder by their relative name; raises as `listing`."""
    files, _ = listing(path, key)
    return Named({name: str(file) for name, file in files.items() if is_picture(name) or _is_captions(name)})


def listing(path: str, key: str) -> tuple[dict[str, Path], int]:
    """Files below a folder by their relative name (NFC), and the number of links that were not followed.

    Raises:
        DataError: names `key`; the folder is not there, cannot be read, or holds no pictures.
    """
    root, links = _root(path, key), 0
    files: dict[str, Path] = {}

    def refuse(error: OSError) -> None:
        raise DataError(f"{key}: {error.filename} cannot be read ({error.strerror}); give a local folder")

    for place, folders, names in os.walk(root, onerror=refuse):
        folders[:] = _visible(folders)
        links += sum(Path(place, name).is_symlink() for name in folders)  # which os.walk does not enter
        for file in (Path(place, name) for name in _visible(names)):
            if not _inside(file, root):
                links += 1
            elif file.is_file():
                files[unicodedata.normalize("NFC", file.relative_to(root).as_posix())] = file
    if not any(map(is_picture, files)):
        raise DataError(f"{key}: there are no pictures in {path}; give the folder that holds them")
    return files, links


def _pairs(files: dict[str, Path]) -> tuple[list[tuple[str, bytes]], Counter[str]]:
    """Names of pictures with their captions, and counts of those that lack the other."""
    pairs, rejected = [], Counter[str]()
    for table in (name for name in files if posixpath.basename(name) in _TABLES):
        for file_name, text in _rows(files[table]):
            name = posixpath.normpath(posixpath.join(posixpath.dirname(table), unicodedata.normalize("NFC", file_name)))
            if name in files and is_picture(name):
                pairs.append((name, text.encode()))
            else:
                rejected["no_picture"] += 1
    named = {name for name, _ in pairs}
    stems = {posixpath.splitext(name)[0] for name in files if is_picture(name)}
    captions = {posixpath.splitext(name)[0]: files[name] for name in sorted(files) if _is_text(name)}  # .txt after .TXT
    for name in files:
        stem, _ = posixpath.splitext(name)
        if _is_text(name):
            rejected["no_picture"] += stem not in stems
        elif is_picture(name) and name not in named:
            caption = captions.get(stem)
            pairs.append((name, caption.read_bytes().removeprefix(codecs.BOM_UTF8) if caption else b""))
    rejected["no_caption"] = sum(not caption.strip() for _, caption in pairs)
    return [(name, caption) for name, caption in pairs if caption.strip()], rejected


def _rows(table: Path) -> Iterator[tuple[str, str]]:
    """`file_name` and `text` of a metadata.csv or metadata.jsonl; a caption that is null counts as empty."""
    try:
        with open(table, encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines) if table.suffix == ".csv" else map(json.loads, filter(str.strip, lines))
            for row in rows:
                yield row["file_name"], row["text"] or ""
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        reason = f"no column {error}" if isinstance(error, KeyError) else error
        raise DataError(f"data.folder.path: {table} is no table of file_name and text: {reason}") from error


def _served(root: Path, name: str, spelt: Callable[[Path], dict[str, str]]) -> Path | None:
    """The picture of a name that `listing` would give, if there is one; None for all else."""
    parts = name.split("/")
    if not is_picture(name) or _visible(parts) != parts or not all(parts):
        return None
    file = root
    for part in parts:
        if file.is_symlink() and file != root:  # a folder that `listing` does not enter
            return None
        file = file / part if (file / part).exists() else file / spelt(file).get(part, part)
    return file if file.is_file() and _inside(file, root) else None


def _spelt(folder: Path) -> dict[str, str]:
    """Names in a folder as they are spelt there, by their NFC, where that differs."""
    names = os.listdir(folder) if folder.is_dir() else ()
    return {nfc: name for name in names if (nfc := unicodedata.normalize("NFC", name)) != name}


def _root(path: str, key: str) -> Path:
    if storage.is_remote(path):
        raise DataError(f"{key}: {path} is a URI; give a local folder")
    return Path(storage.absolute(path))


def _inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root)


def _visible(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(".")]


def is_picture(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES)


def _is_text(name: str) -> bool:
    return name.lower().endswith(".txt")


def _is_captions(name: str) -> bool:
    return _is_text(name) or posixpath.basename(name) in _TABLES
