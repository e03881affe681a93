"""One's own pictures: a local folder with captions, as LAION metadata and as a web server (`loopback`).

Captions lie as people have them (`folder_captions`). Where a picture has several, a table counts, then .txt. Every file
is used, or named with its cause; hidden ones are passed over. Names are taken in Unicode's NFC, so that a table finds a
file whose name came from a Mac.

A picture's URL is its name below the folder, so keys do not tell where the folder lies. On a cluster the folder must be
at the same path on every node.
"""

import hashlib
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
from datasets.config import DataError
from datasets.files import storage
from datasets.files.inputs import Named
from datasets.left_out import LeftOut
from datasets.outcomes import Lost
from datasets.source_settings import FolderConfig
from datasets.sources import beside, folder_captions, loopback
from datasets.sources.beside import Said, placed
from datasets.sources.captions import parts_of
from datasets.sources.files_at import there_are
from datasets.sources.loopback import Address, Hosts

HOST = "folder.invalid"
KEY = "data.folder.path"


def tables(config: FolderConfig, left_out: LeftOut) -> Iterator[pa.Table]:
    """The folder's rows in LAION's schema, by name of the picture; scores, licence and origin as a .json has them.

    Left out: `no_caption` and `no_text` (`captions`), `no_picture`, `fields`, `encoding` (`folder_captions`),
    `unreadable` (of no format that we read, or damaged in its header), `duplicate` (the same bytes with the same
    caption), and `link` (one that leads nowhere, in circles, or out of the folder where these are not followed).

    Raises:
        DataError: the folder is not there, cannot be read, or holds no picture that can be used; a table is damaged.
    """
    files = listing(config.path, KEY, left_out, config.follow_links)
    copies, told = _Copies(files), _Told(files, config.encoding)
    rows, sizes = [], {}
    for name, caption in sorted(_pairs(files, config, left_out)):
        if copies.seen(name, caption):
            left_out.add("duplicate", name, "another picture of the same bytes has the same caption")
            continue
        if name not in sizes:
            sizes[name] = _size(name, files[name], left_out)
        if size := sizes[name]:
            row = {"URL": url(name), "TEXT": caption.encode(), "WIDTH": size[0], "HEIGHT": size[1]}
            rows.append(row | told.of(name))
    if not rows:
        raise DataError(
            f"{KEY}: no picture in {config.path} can be used{there_are(left_out.counts + left_out.others)}; the first: "
            f"{'; '.join(left_out.examples(1)[:3])}; {folder_captions.HELP}"
        )
    yield pa.Table.from_pylist(rows, schema=beside.SCHEMA)


def hosts(config: FolderConfig) -> AbstractContextManager[Hosts]:
    """Serve the folder's pictures while a download runs."""
    return serving(config.path, KEY, config.follow_links)


def identity(config: FolderConfig) -> dict[str, Any]:
    """The settings, of the later ones those that are changed; for the path, what a plan reads: pictures and captions.

    Raises:
        DataError: the folder is not there, cannot be read, or holds no pictures.
    """
    changed = config.model_dump(exclude={"path", "max_left_out"}, exclude_defaults=True)
    return {**licence(config), **changed, "content": content(config.path, KEY, config.follow_links)}


def licence(config: FolderConfig) -> dict[str, str | None]:
    """The licence of the pictures and whom to credit, as the config says."""
    return {"licence": config.licence, "attribution": config.attribution}


@contextmanager
def serving(path: str | None, key: str, follow: bool = True) -> Iterator[Hosts]:
    """`serve` as a map from host to address; an empty one where there is no folder."""
    if path is None:
        yield {}
    else:
        with serve(path, key, follow) as address:
            yield {HOST: address}


@contextmanager
def serve(path: str, key: str, follow: bool = True) -> Iterator[Address]:
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
        file = _served(root, unquote(name, errors="surrogateescape"), spelt, follow)
        return file.read_bytes() if file else None

    with loopback.serve(body) as address:
        yield address


def url(name: str) -> str:
    """The URL under which `serve` gives out a picture, by its name relative to the folder."""
    return f"http://{HOST}/{quote(name, errors='surrogateescape')}"


def content(path: str, key: str, follow: bool = True) -> Named:
    """The pictures and captions of a folder by their relative name; raises as `listing`."""
    return Named({name: str(file) for name, file in listing(path, key, follow=follow).items()})


def listing(path: str, key: str, left_out: LeftOut | None = None, follow: bool = True) -> dict[str, Path]:
    """The pictures and captions below a folder by their relative name (NFC), links to files and folders followed.

    Each folder is entered once, however many links lead to it. With `follow` false, links out of the folder and those
    to folders are left out.

    Raises:
        DataError: names `key`; the folder is not there, cannot be read, or holds no pictures.
    """
    left_out = LeftOut() if left_out is None else left_out
    root = _root(path, key)
    files: dict[str, Path] = {}
    real, entered = root.resolve(), set[Path]()

    def refuse(error: OSError) -> None:
        raise DataError(f"{key}: {error.filename} cannot be read ({error.strerror}); give a local folder")

    for place, folders, names in os.walk(root, onerror=refuse, followlinks=follow):
        folders[:] = [
            name for name in sorted(folders) if _is_entered(Path(place, name), root, entered, follow, left_out)
        ]
        below = os.path.relpath(place, root).replace(os.sep, "/")
        for own in sorted(names, key=_nfc_first):  # by strings: making paths of many files takes most of the time
            file, name = (
                os.path.join(place, own),
                unicodedata.normalize("NFC", own if below == "." else f"{below}/{own}"),
            )
            if own.startswith("."):
                left_out.pass_over("hidden", name, "hidden files are passed over")
            elif os.path.islink(file) and not _is_followed(Path(file), real, follow):
                told = "it leads out of the folder; to follow it: data.folder.follow_links=true"
                there = os.path.exists(file)
                left_out.add("link", name, told if there else f"it leads nowhere: to {os.readlink(file)}")
            elif not (is_picture(name) or _is_captions(name)) or not os.path.isfile(file):
                kind = posixpath.splitext(name)[1].lower() or "no suffix"
                captions = f"{' '.join(beside.TEXTS)}, metadata.csv"
                told = f"neither picture ({' '.join(pictures.SUFFIXES)}) nor caption ({captions})"
                left_out.pass_over(kind, name, told)
            elif name in files:
                left_out.add("duplicate", name, "another file has this name in another spelling by Unicode; rename one")
            else:
                files[name] = Path(file)
    if not any(map(is_picture, files)):
        told = there_are(left_out.counts + left_out.others)
        raise DataError(f"{key}: there are no pictures in {path}{told}; give the folder that holds them")
    return files


def _nfc_first(name: str) -> tuple[bool, str]:
    """In the order of names, after those that are spelt in NFC, as `_served` looks for them."""
    return not (name.isascii() or unicodedata.is_normalized("NFC", name)), name


def _is_followed(link: Path, root: Path, follow: bool) -> bool:
    return link.exists() and (follow or link.resolve().is_relative_to(root))


def is_picture(name: str) -> bool:
    """Whether a file is a picture, by its suffix."""
    return name.lower().endswith(pictures.SUFFIXES)


def _pairs(files: dict[str, Path], config: FolderConfig, left_out: LeftOut) -> Iterator[tuple[str, str]]:
    """Names of pictures with their captions, a pair a caption."""
    found = {name: file for name, file in files.items() if is_picture(name)}
    said = Said(left_out)
    said.take(folder_captions.of_tables(files, found, config, left_out))
    for name in sorted(said.captions):  # a table's rows count, each
        for loss in said.refused.pop(name, ()):
            left_out.add(*loss)
    said.take(folder_captions.of_files(files, found, frozenset(said.captions), config, left_out))
    for name in sorted(found.keys() - said.captions.keys()):
        called = "" if config.uncaptioned == "left_out" else folder_captions.of_name(name, config.uncaptioned)
        texts, losses = placed(parts_of(called), name)  # of a name of bytes that are no text there are none
        if texts:
            said.captions[name] = texts
        else:
            alone = ("no_caption", name, "there is no caption beside it, and none in a table")
            said.lose(name, losses if called else [alone])
    said.pass_over()
    yield from ((name, text) for name, texts in said.captions.items() for text in texts)


class _Told:
    """What .json files beside pictures say of these, but for captions."""

    def __init__(self, files: dict[str, Path], encoding: str) -> None:
        self._files, self._encoding = files, encoding
        jsons = list(filter(beside.is_json, files))
        self._beside = beside.texts_of(list(filter(is_picture, files)), jsons)

    def of(self, picture: str) -> dict[str, Any]:
        """LAION's columns."""
        for name in self._beside.get(picture, ())[:1]:
            said, _ = folder_captions.about(self._files[name], self._encoding)
            return beside.columns(said)
        return {}


def _size(name: str, file: Path, left_out: LeftOut) -> tuple[int, int] | None:
    """Width and height of a picture, px, seen upright; what cannot be read is left out."""
    try:
        with file.open("rb") as stream:
            return pictures.size(stream)
    except (Lost, OSError) as error:
        left_out.add("unreadable", name, str(error))
        return None


class _Copies:
    """Tells pictures of the same bytes under the same caption; reads only those that are of one length."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files
        self._lengths = {name: file.stat().st_size for name, file in files.items()}
        self._common = Counter(self._lengths.values())
        self._digests: dict[str, bytes] = {}
        self._seen: set[tuple[bytes, str]] = set()

    def seen(self, name: str, caption: str) -> bool:
        """Whether the same has come before; it has from now on."""
        found = (self._digest(name), caption)
        if found in self._seen:
            return True
        self._seen.add(found)
        return False

    def _digest(self, name: str) -> bytes:
        if self._common[self._lengths[name]] == 1:
            return name.encode(errors="surrogateescape")
        if name not in self._digests:
            with self._files[name].open("rb") as file:
                self._digests[name] = hashlib.file_digest(file, "sha256").digest()
        return self._digests[name]


def _is_entered(folder: Path, root: Path, entered: set[Path], follow: bool, left_out: LeftOut) -> bool:
    """Whether the walk goes into a folder: a visible one, through a link where it does not come otherwise."""
    name = folder.relative_to(root).as_posix()
    if folder.name.startswith("."):
        left_out.pass_over("hidden", name, "hidden folders are passed over")
        return False
    if not folder.is_symlink():
        return True
    target, here = folder.resolve(), root.resolve()
    if not follow:
        left_out.add("link", name, "it leads to a folder; to follow it: data.folder.follow_links=true")
    elif target.is_relative_to(here) or here.is_relative_to(target) or any(map(target.is_relative_to, entered)):
        left_out.add("link", name, "it leads to a folder that is listed without it, or that holds this one")
    else:
        entered.add(target)
        return True
    return False


def _served(root: Path, name: str, spelt: Callable[[Path], dict[str, str]], follow: bool) -> Path | None:
    """The picture of a name that `listing` would give, if there is one; None for all else."""
    parts = name.split("/")
    if not is_picture(name) or any(not part or part.startswith(".") for part in parts):
        return None
    file = root
    for part in parts:
        if file.is_symlink() and file != root and not follow:
            return None
        file = file / part if (file / part).exists() else file / spelt(file).get(part, part)
    inside = follow or file.resolve().is_relative_to(root.resolve())
    return file if inside and file.is_file() else None


def _spelt(folder: Path) -> dict[str, str]:
    """Names in a folder as they are spelt there, by their NFC, where that differs."""
    names = os.listdir(folder) if folder.is_dir() else ()
    return {nfc: name for name in names if (nfc := unicodedata.normalize("NFC", name)) != name}


def _root(path: str, key: str) -> Path:
    if storage.is_remote(path):
        raise DataError(f"{key}: {path} is a URI; give a local folder")
    return Path(storage.absolute(path))


def _is_captions(name: str) -> bool:
    return beside.is_text(name) or folder_captions.is_table(name)
