"""The source `webdataset`: tar shards that others have made, img2dataset's for one, local or on an object store.

A sample is the members with the same name up to the first dot: a picture, and its caption in .txt or as `caption` in
.json, where LAION's other columns may stand too; its `url` is the picture's origin, which a removal list may name.

Nothing in a tar is trusted. It is read, never unpacked; a name is no path; no more than `max_bytes` of a member are in
memory; whatever is damaged, too big, linked or there twice is counted and left out.

A picture's URL says where its bytes lie and what their hash is. So a download reads just these, and a tar that has been
changed since the plan was made gives no wrong picture: it is counted as gone.
"""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

import pyarrow as pa

from datasets import pictures
from datasets.config import DataError, WebdatasetConfig
from datasets.files import storage
from datasets.files.inputs import Named
from datasets.outcomes import Lost
from datasets.sources import laion, loopback
from datasets.sources.loopback import Hosts

HOST = "webdataset.invalid"
KEY = "data.webdataset.path"
_PICTURES = ("jpg", "jpeg", "png", "webp", "gif")
_TEXTS = ("txt", "json")
_TEXT_BYTES = 1 << 18  # longest caption or JSON, and longest header, that is read
_READ_AHEAD = 1 << 20
_SCORES = ("similarity", "punsafe", "pwatermark", "aesthetic")
_SCHEMA = pa.schema(
    [("URL", pa.string()), ("TEXT", pa.binary()), ("WIDTH", pa.float64()), ("HEIGHT", pa.float64())]
    + [(laion.COLUMNS[name], pa.float64()) for name in _SCORES]
    + [(laion.COLUMNS[name], pa.binary()) for name in ("licence", "origin")]
)


@dataclass
class _Sample:
    """What a tar holds under one name; `lost` is why it cannot be used."""

    url: str | None = None
    digest: bytes = b""
    size: tuple[int, int] = (0, 0)  # px
    texts: dict[str, bytes] = field(default_factory=dict)
    lost: str | None = None


def tables(config: WebdatasetConfig, unusable: Counter[str]) -> Iterator[pa.Table]:
    """The samples of one tar after the other; see `datasets.sources.table.Source`.

    Left out: `damaged_tar` (a tar's rest, or all of it: cut short, or none), and samples by reason: `too_big`,
    `unreadable` (a picture of no format that we read), `no_picture`, `no_caption`, `link` (or another member that is no
    file), `duplicate` (a second picture of that name, or the same bytes with the same caption in that tar).
    """
    found = 0
    for name, path in _files(config).items():
        rows = _rows(_samples(name, path, config.max_bytes, unusable), unusable)
        if rows:
            found += len(rows)
            yield pa.Table.from_pylist(rows, schema=_SCHEMA)
    if not found:
        told = ", ".join(f"{reason} {count}" for reason, count in unusable.items() if count) or "they are empty"
        raise DataError(f"{KEY}: no picture of the tars at {config.path} can be used ({told})")


@contextmanager
def hosts(config: WebdatasetConfig) -> Iterator[Hosts]:
    """Serve the pictures that URLs of `tables` name, and nothing else of the tars."""
    files = _files(config)

    def body(request: str) -> bytes | None:
        name, _, query = request.partition("?")
        path, place = files.get(unquote(name, errors="surrogateescape")), _Place.parsed(query)
        if path is None or place is None or place.size > config.max_bytes:
            return None
        with storage.opened(path) as source:
            content: bytes = source.read_at(place.size, place.offset)
        return content if hashlib.sha256(content).hexdigest() == place.sha256 else None

    with loopback.serve(body) as address:
        yield {HOST: address}


def identity(config: WebdatasetConfig) -> dict[str, Any]:
    """The settings, with the tars for their path."""
    return config.model_dump(exclude={"path"}) | {"tars": Named(_files(config))}


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


def _files(config: WebdatasetConfig) -> dict[str, str]:
    files = storage.matching(config.path, ".tar")
    if not files:
        raise DataError(f"{KEY}: there is no .tar file at {config.path}; give a tar, a folder, a pattern or a URI")
    return files


def _samples(name: str, path: str, max_bytes: int, unusable: Counter[str]) -> list[_Sample]:
    """The samples of a tar, in its order, as far as it can be read."""
    samples: dict[str, _Sample] = {}
    with storage.opened(path) as source, _Limited(source, max_bytes) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    _take(member, file, name, max_bytes, samples)
                    if tar.offset <= member.offset:  # a negative length, which would lead round and round
                        raise tarfile.ReadError("it leads back")
                file.seek(tar.offset)
                if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("no end mark: tarfile takes a damaged header for the end")
        except OSError:  # of the store: it says nothing about the tar
            raise
        except Exception:  # tarfile raises anything over hostile bytes; it costs the rest of one tar
            unusable["damaged_tar"] += 1
    return list(samples.values())


def _take(member: tarfile.TarInfo, file: "_Limited", tar: str, max_bytes: int, samples: dict[str, _Sample]) -> None:
    """Add a member to its sample; what is neither picture nor text is passed over."""
    folder, _, base = member.name.rpartition("/")
    stem, _, kind = base.partition(".")
    kind = kind.lower()
    if not stem or kind not in (*_PICTURES, *_TEXTS):  # hidden files have no stem
        return
    sample = samples.setdefault(f"{folder}/{stem}", _Sample())
    if not member.isreg() or member.issparse():
        sample.lost = "link"
    elif member.size > (max_bytes if kind in _PICTURES else _TEXT_BYTES):
        sample.lost = "too_big"
    elif kind in sample.texts or (sample.url and kind in _PICTURES):
        sample.lost = "duplicate"
    else:
        file.seek(member.offset_data)
        content = file.read(member.size)
        if len(content) < member.size:
            raise tarfile.ReadError("cut short")
        if kind in _TEXTS:
            sample.texts[kind] = content
            return
        sha256 = hashlib.sha256(content)
        sample.digest = sha256.digest()
        sample.url = _Place(member.name, member.offset_data, member.size, sha256.hexdigest()).url(tar)
        try:
            sample.size = pictures.size(io.BytesIO(content))
        except Lost:
            sample.lost = "unreadable"


def _rows(samples: list[_Sample], unusable: Counter[str]) -> list[dict[str, Any]]:
    rows, seen = [], set()
    for sample in samples:
        about = _about(sample.texts.get("json", b""))
        caption = sample.texts.get("txt", b"") or _utf_8(about.get("caption") or about.get("text") or "")
        lost = sample.lost or ("no_picture" if not sample.url else None if caption.strip() else "no_caption")
        if not lost and (sample.digest, caption) in seen:
            lost = "duplicate"
        if lost:
            unusable[lost] += 1
            continue
        seen.add((sample.digest, caption))
        scores = {name: about.get(laion.COLUMNS[name].lower()) for name in _SCORES}
        licence = about.get(laion.COLUMNS["licence"].lower()) or ""
        rows.append(
            {
                "URL": sample.url,
                "TEXT": caption,
                "WIDTH": sample.size[0],
                "HEIGHT": sample.size[1],
                **{laion.COLUMNS[name]: _number(value) for name, value in scores.items()},
                laion.COLUMNS["licence"]: _utf_8(licence),
                laion.COLUMNS["origin"]: _utf_8(about.get("url") or ""),
            }
        )
    return rows


def _about(content: bytes) -> dict[str, Any]:
    """The object in a .json, its names in lower case; empty where it is none."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return {name.lower(): value for name, value in found.items()} if isinstance(found, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, float | int) and abs(value) < 1e9 else None


def _utf_8(value: Any) -> bytes:
    return str(value).encode(errors="replace")  # JSON can spell halves of characters


class _Limited(io.BufferedReader):
    """A file of which no read takes more than a limit, and none lies beyond its end: a header may say anything."""

    def __init__(self, source: pa.NativeFile, max_bytes: int):
        super().__init__(source, _READ_AHEAD)
        self._limit, self._end = max(max_bytes, _TEXT_BYTES), source.size()

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= self._limit:
            raise tarfile.ReadError(f"a read of {size} bytes")
        return super().read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if offset > self._end:  # which an object store takes for an error of its own
            raise tarfile.ReadError(f"cut short before byte {offset}")
        return super().seek(offset, whence)
