"""The source `webdataset`: tar shards that others have made, img2dataset's for one, local or on an object store.

A sample is the members with the same name but for the suffix: a picture, and its caption in .txt (.cap, .caption) or
as `caption` in .json, where LAION's other columns may stand too; its `url` is the picture's origin, which a removal
list may name. Several pictures have that caption each. A link to an earlier member is that member again. Of members
with one name the last counts, as where a tar is unpacked: what is used is what a folder of the same files would give.

Nothing in a tar is trusted. It is read, never unpacked; a name is no path; no more than `max_bytes` of a member are in
memory; whatever is damaged, too big, linked or there twice is counted and left out.

A picture's URL says where its bytes lie and what their hash is. So a download reads just these, and a tar that has been
changed since the plan was made gives no wrong picture: it is counted as gone. A compressed tar, which its content tells
and not its name, is unpacked for that into a file without a name, by each process that reads it.
"""

import hashlib
import io
import json
import posixpath
import tarfile
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
from datasets.sources import laion, loopback
from datasets.sources.captions import SHOWN, Loss, first, number, text
from datasets.sources.files_at import files_at
from datasets.sources.loopback import Hosts

HOST = "webdataset.invalid"
KEY = "data.webdataset.path"
_PICTURES = (*pictures.SUFFIXES, ".img")
_CAPTIONS = (".txt", ".cap", ".caption", ".text")  # the first counts where a picture has several; then .json
_KEYS = ("caption", "text", "captions")  # of a .json
_TEXTS = (*_CAPTIONS, ".json")
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".z", ".7z", ".zip")
_SUFFIXES = (".tar", ".tgz", ".tbz2", ".tbz", ".txz", ".tzst", *(f".tar{suffix}" for suffix in _PACKED))
_CONTENTS = compressed.Unpacked()  # for all shards that this process downloads
_SCORES = ("similarity", "punsafe", "pwatermark", "aesthetic")
_SCHEMA = pa.schema(
    [("URL", pa.string()), ("TEXT", pa.binary()), ("WIDTH", pa.float64()), ("HEIGHT", pa.float64())]
    + [(laion.COLUMNS[name], pa.float64()) for name in _SCORES]
    + [(laion.COLUMNS[name], pa.binary()) for name in ("licence", "origin")]
)


@dataclass(frozen=True)
class _Picture:
    """Where a picture lies, its hash and its size, px."""

    url: str
    digest: bytes
    size: tuple[int, int]


@dataclass
class _Sample:
    """What a tar holds under one name: pictures by theirs, and texts by suffix; or why one cannot be used."""

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
            samples = _samples(name, path, config.max_bytes, left_out)
        except compressed.Unreadable as error:
            left_out.add("compressed_tar", name, str(error))
            continue
        if rows := _rows(name, samples, seen, left_out):
            found += len(rows)
            yield pa.Table.from_pylist(rows, schema=_SCHEMA)
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


def _samples(name: str, path: str, max_bytes: int, left_out: LeftOut) -> dict[str, _Sample]:
    """The samples of a tar by name, in its order, as far as it can be read."""
    samples: dict[str, _Sample] = {}
    with tars.opened(path, max_bytes) as file:
        try:
            for member, held in tars.members(file):
                _take(member, held, file, name, max_bytes, samples, left_out)
        except OSError:  # of the store: it says nothing about the tar
            raise
        except Exception as error:  # tarfile raises anything over hostile bytes; it costs the rest of one tar
            left_out.add("damaged_tar", name, f"its rest is damaged ({error}), or all of it")
    return samples


def _take(
    member: tarfile.TarInfo,
    held: tarfile.TarInfo | None,
    file: tars.Limited,
    tar: str,
    max_bytes: int,
    samples: dict[str, _Sample],
    left_out: LeftOut,
) -> None:
    """Add a member, with the bytes of `held`, to its sample; what is neither picture nor text is passed over."""
    name = posixpath.normpath(member.name)  # ./x is x
    stem, kind = posixpath.splitext(name)
    kind = kind.lower()
    if posixpath.basename(member.name).startswith("."):
        left_out.pass_over("hidden", f"{tar}/{member.name}", "hidden files are passed over")
        return
    if kind not in (*_PICTURES, *_TEXTS):
        told = f"neither picture ({' '.join(_PICTURES)}) nor caption ({' '.join(_TEXTS)})"
        left_out.pass_over(kind or "no suffix", f"{tar}/{member.name}", told)
        return
    sample = samples.setdefault(stem, _Sample())
    found = _found(member, held, file, max_bytes if kind in _PICTURES else tars.TEXT_BYTES)
    if kind in _TEXTS:
        if kind in sample.texts:
            left_out.pass_over("captions", f"{tar}/{name}", "a later member has the same name")
        sample.texts[kind] = found
        return
    if name in sample.pictures:
        left_out.add("duplicate", f"{tar}/{name}", "a later picture has the same name, and is used in its place")
    if isinstance(found, bytes):
        assert held is not None, "it has been read"
        sample.pictures[name] = _picture(found, member.name, held.offset_data, tar)
    else:
        sample.pictures[name] = found


def _found(member: tarfile.TarInfo, held: tarfile.TarInfo | None, file: tars.Limited, limit: int) -> bytes | Loss:
    """The bytes of a member, which are those of `held`; or why they are not taken."""
    if held is None:
        told = f"{member.name} is a link to {member.linkname or 'nothing'}, which is no earlier file of the tar"
        return "link", told
    if held.size > limit:
        return "too_big", f"{member.name} has {held.size:,} bytes, more than {limit:,}"
    file.seek(held.offset_data)
    content = file.read(held.size)
    if len(content) < held.size:
        raise tarfile.ReadError("cut short")
    return content


def _picture(content: bytes, member: str, offset: int, tar: str) -> _Picture | Loss:
    sha256 = hashlib.sha256(content)
    url = _Place(member, offset, len(content), sha256.hexdigest()).url(tar)
    try:
        return _Picture(url, sha256.digest(), pictures.size(io.BytesIO(content)))
    except Lost as error:
        return "unreadable", str(error)


def _rows(tar: str, samples: dict[str, _Sample], seen: set[bytes], left_out: LeftOut) -> list[dict[str, Any]]:
    """The rows of a tar's samples; `seen` are hashes of those of all tars so far."""
    rows = []
    for stem, sample in samples.items():
        lost = next((text for text in sample.texts.values() if isinstance(text, tuple)), None)
        texts = {kind: text for kind, text in sample.texts.items() if isinstance(text, bytes)}
        about, unread = _about(texts.get(".json", b"{}"))
        captions = _captions(texts, about)
        if not sample.pictures:
            cause, told = lost or ("no_picture", "there is no picture of that name")
            left_out.add(cause, f"{tar}/{stem}", told)
        if unread and not captions:
            lost = lost or ("no_text", f"its .json is no JSON object ({unread})")
        for name, picture in sample.pictures.items():
            place = f"{tar}/{name}"
            if isinstance(picture, tuple):
                left_out.add(picture[0], place, picture[1])
                continue
            if lost:
                left_out.add(lost[0], place, lost[1])
                continue
            columns = _columns(about) | {"URL": picture.url, "WIDTH": picture.size[0], "HEIGHT": picture.size[1]}
            for caption in first(captions, left_out, place):
                row = hashlib.blake2b(picture.digest + caption.encode(), digest_size=16).digest()
                if row in seen:
                    left_out.add("duplicate", place, "another picture of the same bytes has the same caption")
                    continue
                seen.add(row)
                rows.append({**columns, "TEXT": caption.encode()})
    return rows


def _columns(about: dict[str, Any]) -> dict[str, Any]:
    """LAION's columns of a .json, without caption and size."""
    texts = {"licence": about.get(laion.COLUMNS["licence"].lower()), "origin": about.get("url")}
    return {laion.COLUMNS[score]: number(about.get(laion.COLUMNS[score].lower())) for score in _SCORES} | {
        laion.COLUMNS[name]: (text(value) or "").encode(errors="replace")  # JSON can spell halves of characters
        for name, value in texts.items()
    }


def _captions(texts: dict[str, bytes], about: dict[str, Any]) -> list[object]:
    """What may hold captions, in the order in which it counts: texts, then what the .json has."""
    return [*(texts[kind] for kind in _CAPTIONS if kind in texts), *(about[key] for key in _KEYS if key in about)]


def _about(content: bytes) -> tuple[dict[str, Any], str]:
    """The object in a .json, its names in lower case; where it is none, an empty one, and why."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        return {}, str(error)
    if not isinstance(found, dict):
        return {}, f"it is {type(found).__name__} {repr(found)[:SHOWN]}"
    return {name.lower(): value for name, value in found.items()}, ""
