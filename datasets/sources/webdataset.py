"""The source `webdataset`: tar shards that others have made, img2dataset's for one, local or on an object store.

A picture's caption is that of the texts beside it (`datasets.sources.beside`). A link to an earlier member is that
member again. Of members with one name the last counts, as where a tar is unpacked: what is used is what a folder of the
same files would give.

Nothing in a tar is trusted. It is read, never unpacked; a name is no path; no more than `max_bytes` of a member are in
memory; whatever is damaged, too big, linked or there twice is counted and left out.

A picture's URL says where its bytes lie and what their hash is. So a download reads just these, and a tar that has been
changed since the plan was made gives no wrong picture: it is counted as gone. A compressed tar, which its content tells
and not its name, is unpacked for that into a file without a name, by each process that reads it.
"""

import hashlib
import io
import posixpath
import tarfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

import pyarrow as pa

from datasets import pictures
from datasets.config import DataError
from datasets.files import compressed, tars
from datasets.files.inputs import Named
from datasets.left_out import LeftOut
from datasets.outcomes import Lost
from datasets.source_settings import WebdatasetConfig
from datasets.sources import beside, loopback
from datasets.sources.beside import Said
from datasets.sources.captions import Loss, Parts, parts_of
from datasets.sources.files_at import files_at
from datasets.sources.loopback import Hosts

HOST = "webdataset.invalid"
KEY = "data.webdataset.path"
_PICTURES = (*pictures.SUFFIXES, ".img")
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".z", ".7z", ".zip")
_SUFFIXES = (".tar", ".tgz", ".tbz2", ".tbz", ".txz", ".tzst", *(f".tar{suffix}" for suffix in _PACKED))
_CONTENTS = compressed.Unpacked()  # for all shards that this process downloads


@dataclass(frozen=True)
class _Picture:
    """Where a picture lies, its hash and its size, px."""

    url: str
    digest: bytes
    size: tuple[int, int]


@dataclass
class _Held:
    """What a tar holds, or why it cannot be used, by names in Unicode's NFC."""

    pictures: dict[str, _Picture | Loss] = field(default_factory=dict)
    texts: dict[str, bytes | Loss] = field(default_factory=dict)


def tables(config: WebdatasetConfig, left_out: LeftOut) -> Iterator[pa.Table]:
    """The samples of one tar after the other; see `datasets.sources.table.Source`.

    Left out: `damaged_tar` (a tar's rest, or all of it: cut short, or none), `compressed_tar` (in a way that we do not
    read, or a bomb), and samples by reason: `too_big`, `unreadable` (a picture of no format that we read),
    `no_picture`, `no_caption`, `no_text`, `encoding`, `link` (out of the tar, or another member that is no file),
    `duplicate` (a later picture has that very name, or an earlier one, in whichever tar, the same bytes with the same
    caption: 16 bytes of each are kept in memory).
    """
    found, seen = 0, set[bytes]()
    for name, path in _files(config.path).items():
        try:
            held = _held(name, path, config.max_bytes, left_out)
        except compressed.Unreadable as error:
            left_out.add("compressed_tar", name, str(error))
            continue
        if rows := _rows(name, held, seen, left_out):
            found += len(rows)
            yield pa.Table.from_pylist(rows, schema=beside.SCHEMA)
    if not found:
        others = ", ".join(f"{kind} {count:,}" for kind, count in left_out.others.items())
        told = left_out.told() or (others and f"neither pictures nor captions: {others}") or "they are empty"
        examples = "".join(f"; {example}" for example in left_out.examples(1)[:3])
        raise DataError(f"{KEY}: no picture of the tars at {config.path} can be used ({told}){examples}")


@contextmanager
def hosts(config: WebdatasetConfig) -> Iterator[Hosts]:
    """Serve the pictures that URLs of `tables` name, and nothing else of the tars."""
    files = _files_once(config.path)

    def body(request: str) -> bytes | None:
        name, _, query = request.partition("?")
        path, place = files.get(unquote(name, errors="surrogateescape")), _Place.parsed(query)
        if path is None or place is None or place.size > config.max_bytes:
            return None
        try:
            content = _CONTENTS.read_at(path, place.size, place.offset)
        except (compressed.Unreadable, FileNotFoundError):  # it has been changed since, or is gone
            return None
        return content if hashlib.sha256(content).hexdigest() == place.sha256 else None

    with loopback.serve(body) as address:
        yield {HOST: address}


def identity(config: WebdatasetConfig) -> dict[str, Any]:
    """The settings, with the tars for their path."""
    return config.model_dump(exclude={"path"}) | {"tars": Named(_files(config.path))}


def licence(config: WebdatasetConfig) -> dict[str, str | None]:
    """The licence of the pictures and whom to credit, as the config says."""
    return {"licence": config.licence, "attribution": config.attribution}


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a picture lie in its tar, and their hash."""

    member: str
    offset: int
    size: int
    sha256: str

    def url(self, tar: str) -> str:
        query = urlencode(vars(self), errors="surrogateescape")
        return f"http://{HOST}/{quote(tar, errors='surrogateescape')}?{query}"

    @classmethod
    def parsed(cls, query: str) -> "_Place | None":
        try:
            fields = {name: values[0] for name, values in parse_qs(query, errors="surrogateescape").items()}
            place = cls(fields["member"], int(fields["offset"]), int(fields["size"]), fields["sha256"])
        except (KeyError, ValueError):
            return None
        return place if place.offset >= 0 and place.size >= 0 else None


def _files(path: str) -> dict[str, str]:
    return files_at(path, KEY, _SUFFIXES, ".tar file", "a tar, a folder, a pattern or a URI")


_files_once = cache(_files)  # of a download's tasks there is one a shard, and a listing of many tars takes seconds


def _held(name: str, path: str, max_bytes: int, left_out: LeftOut) -> _Held:
    """The pictures and texts of a tar, in its order, as far as it can be read."""
    found = _Held()
    with tars.opened(path, max_bytes) as file:
        try:
            for member, source in tars.members(file):
                _take(member, source, file, name, max_bytes, found, left_out)
        except OSError:  # of the store: it says nothing about the tar
            raise
        except Exception as error:  # tarfile raises anything over hostile bytes; it costs the rest of one tar
            left_out.add("damaged_tar", name, f"its rest is damaged ({error}), or all of it")
    return found


def _take(
    member: tarfile.TarInfo,
    source: tarfile.TarInfo | None,
    file: tars.Limited,
    tar: str,
    max_bytes: int,
    held: _Held,
    left_out: LeftOut,
) -> None:
    """Note a member, with the bytes of `source`; what is neither picture nor text is passed over."""
    name = unicodedata.normalize("NFC", posixpath.normpath(member.name))  # ./x is x
    if any(part.startswith(".") and part != ".." for part in name.split("/")):
        left_out.pass_over("hidden", f"{tar}/{name}", "hidden files and folders are passed over")
        return
    is_picture = name.lower().endswith(_PICTURES)
    if not is_picture and not beside.is_text(name):
        kind = posixpath.splitext(name)[1].lower() or "no suffix"
        told = f"neither picture ({' '.join(_PICTURES)}) nor caption ({' '.join(beside.TEXTS)})"
        left_out.pass_over(kind, f"{tar}/{name}", told)
        return
    found = _found(member, source, file, max_bytes if is_picture else tars.TEXT_BYTES)
    if not is_picture:
        if name in held.texts:
            left_out.pass_over("captions", f"{tar}/{name}", "a later member has the same name")
        held.texts[name] = found
        return
    if name in held.pictures:
        left_out.add("duplicate", f"{tar}/{name}", "a later picture has the same name, and is used in its place")
    if isinstance(found, bytes):
        assert source is not None, "it has been read"
        held.pictures[name] = _picture(found, member.name, source.offset_data, tar)
    else:
        held.pictures[name] = found


def _found(member: tarfile.TarInfo, source: tarfile.TarInfo | None, file: tars.Limited, limit: int) -> bytes | Loss:
    """The bytes of a member, which are those of `source`; or why they are not taken."""
    if source is None:
        told = f"{member.name} is a link to {member.linkname or 'nothing'}, which is no earlier file of the tar"
        return "link", told
    if source.size > limit:
        return "too_big", f"{member.name} has {source.size:,} bytes, more than {limit:,}"
    file.seek(source.offset_data)
    content = file.read(source.size)
    if len(content) < source.size:
        raise tarfile.ReadError("cut short")
    return content


def _picture(content: bytes, member: str, offset: int, tar: str) -> _Picture | Loss:
    sha256 = hashlib.sha256(content)
    url = _Place(member, offset, len(content), sha256.hexdigest()).url(tar)
    try:
        return _Picture(url, sha256.digest(), pictures.size(io.BytesIO(content)))
    except Lost as error:
        return "unreadable", str(error)


def _rows(tar: str, held: _Held, seen: set[bytes], left_out: LeftOut) -> list[dict[str, Any]]:
    """The rows of a tar; `seen` are hashes of those of all tars so far."""

    def read(name: str) -> Parts:
        content = held.texts[name]
        if isinstance(content, tuple):
            return [], [content]
        return beside.captions(beside.about(content)) if beside.is_json(name) else parts_of(content)

    said, rows = Said(left_out), []
    said.take(beside.found(held.pictures, held.texts, (), read, left_out, lambda name: f"{tar}/{name}"))
    jsons = beside.texts_of(held.pictures, list(filter(beside.is_json, held.texts)))
    for name, picture in held.pictures.items():
        place = f"{tar}/{name}"
        if isinstance(picture, tuple):
            left_out.add(picture[0], place, picture[1])
            continue
        if name not in said.captions:
            said.lose(name, [("no_caption", place, "there is no caption beside it")])
            continue
        about = next((held.texts[each] for each in jsons.get(name, ())), b"")
        columns = beside.columns(beside.about(about)[0] if isinstance(about, bytes) else {})
        for caption in said.captions[name]:
            row = hashlib.blake2b(picture.digest + caption.encode(), digest_size=16).digest()
            if row in seen:
                left_out.add("duplicate", place, "another picture of the same bytes has the same caption")
                continue
            seen.add(row)
            size = {"WIDTH": picture.size[0], "HEIGHT": picture.size[1]}
            rows.append({**columns, **size, "URL": picture.url, "TEXT": caption.encode()})
    said.pass_over()
    return rows
