"""The plan: which pictures a run fetches, and the key, shard and row that each of them keeps for ever.

A key is derived from the content (URL and caption), so the same picture has it in every data set. Shard and
row are given out once, here; pictures that are lost later leave gaps. All artifacts made from the pictures
share them. Where pictures are stored in several aspect ratios, a shard holds rows of one bucket.

Rows are laid out in the order of their lots, hashes of key and seed. So the shards are shuffled from the start, the
hosts of a shard are many, a limit is a fair draw, and all copies of a key meet: one sort, out of memory, does it all.
"""

import contextlib
import hashlib
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from urllib.parse import quote, urlsplit, urlunsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datasets.buckets import Frame
from datasets.config import DataConfig, DataError
from datasets.files import storage
from datasets.left_out import LeftOut
from datasets.planning import filters, scores
from datasets.planning.spill import Cap, Spill
from datasets.sources import laion, table

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("licence", pa.string()),  # of the picture, as the source names it
        ("origin", pa.string()),  # URL of the picture that the one at `url` is a copy of
        ("width", pa.float64()),
        ("height", pa.float64()),
        ("similarity", pa.float64()),
        ("punsafe", pa.float64()),
        ("pwatermark", pa.float64()),
        ("aesthetic", pa.float64()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
    ]
)
BUCKETED = SCHEMA.append(pa.field("bucket", pa.string()))  # of plans with aspect-ratio buckets: such as 896x1152
NAMES = ("key", "url", "origin")  # by which a removal list may name a picture
SHARDS_PER_PART = 256
_PASSED_ON = ("width", "height", "similarity", "punsafe", "pwatermark", "aesthetic")
_BIDI_CONTROLS = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_URL_CHARACTERS = "/%:@!$&'()*+,;=~-._?"  # what `quote` leaves alone: reserved characters, existing escapes
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Counts:
    """How many rows were planned of those that were read, and what became of all others.

    `rejected` counts by reason: the filters' names, `url`, `caption`, `removed`, `duplicate`, `limit`, and what
    the source itself could not use. Together with the planned rows they make up the `read` ones. `left_out` names them,
    and what a source passed over. `buckets` counts the planned rows by bucket, where there are any.
    """

    planned: int
    read: int
    rejected: dict[str, int]
    buckets: dict[str, int]
    left_out: LeftOut


def make(config: DataConfig, seed: int, keep: Callable[[pa.Table], None]) -> Counts:
    """Read a source's metadata, filter it, draw from it, and lay the rest out in shards.

    `keep` gets the planned rows (`SCHEMA` or `BUCKETED`, sorted by shard and row) in parts of up to 256 full shards.
    Which rows are planned, and where they lie, depends on the rows that pass the filters and on the seed alone; a
    larger limit only adds rows. Memory holds one part, and a 256th of the rows; temporary files hold the others.

    Raises:
        DataError: there is no metadata, it is not LAION's, it has no rows, or none passes the filters.
    """
    frame = config.image.frame
    picture_rules = _picture_rules(config)
    caption_rules = filters.caption_rules(config.filters)
    left_out, passed = LeftOut(), 0
    rejected = left_out.counts
    rules = [rule.name for rule in (*picture_rules, *caption_rules)]
    rejected.update(dict.fromkeys((*rules, "url", "caption", "removed", "duplicate", "limit"), 0))
    removed = removals(config.removed)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="plan-"))
        spill = stack.enter_context(Spill(folder, "lot"))
        caps = [stack.enter_context(Cap(folder, name, limit)) for name, limit in filters.caps(config.filters)]
        for table in _source(config, left_out):
            rejected_before = rejected.total()
            pictures, _ = filters.accept(table, picture_rules, left_out)
            readable = _clean(pictures, seed, removed, left_out)  # the slow part: after the filters that drop most
            kept, _ = filters.accept(readable, caption_rules, left_out)
            assert kept.num_rows + rejected.total() - rejected_before == table.num_rows
            passed += kept.num_rows
            spill.add(kept)
            for cap in caps:
                cap.add(kept)
        read = passed + rejected.total()
        if read == 0:
            raise DataError(f"data.metadata: {config.metadata or config.source} holds no rows")
        if passed == 0:
            reasons = ", ".join(f"{reason} removed {count}" for reason, count in rejected.items() if count)
            raise DataError(
                f"data.filters: none of {read} rows passes: {reasons}; loosen these or change data.metadata"
            )
        layout = _Layout(frame, config.shard_rows, config.limit, keep)
        for first, rows in spill.buckets():
            unique = _unique(rows)
            _leave_out("duplicate", rows, unique, "another row has the same URL and caption", left_out)
            for cap in caps:
                fair = cap.kept(first, unique)
                _leave_out(cap.name, unique, fair, f"more rows than data.filters.{cap.name} have the same", left_out)
                unique = fair
            rejected["limit"] += layout.add(unique.sort_by("lot"))
        layout.close()
    assert layout.rows + rejected.total() == read
    return Counts(layout.rows, read, dict(rejected), dict(layout.buckets), left_out)


def check(config: DataConfig, ask_stores: bool) -> None:
    """Refuse Parquet files that `make` would refuse, as far as the first one's schema tells; those at URIs if asked to.

    Raises:
        DataError: as of `make`.
    """
    columns = {
        "data.metadata": (config.metadata, _needed(config)),
        "data.scores": (config.scores, {"url", "aesthetic"}),
    }
    for key, (path, needed) in columns.items():
        if path is not None and (ask_stores or not storage.is_remote(path)):
            laion.columns(path, needed, key)


def removals(path: str | None, named_by: str = "data.removed") -> frozenset[str]:
    """What is on a removal list: keys (32 hex digits) and normalised URLs, from a text file with one of them a line.

    `named_by` is the word that named the file.

    Raises:
        DataError: there is no such file, or a line is neither.
    """
    if path is None:
        return frozenset()
    if not storage.exists(path):
        raise DataError(f"{named_by}: there is no file {path}; give a text file with a key or a URL a line")
    found = set()
    for number, line in enumerate(storage.read(path).decode().splitlines(), start=1):
        word = line.strip()
        if not word or word.startswith("#"):
            continue
        try:
            found.add(word if re.fullmatch("[0-9a-f]{32}", word) else normalised_url(word))
        except ValueError:
            raise DataError(f"{named_by}: line {number} of {path} is neither a key nor a URL: {word!r}") from None
    return frozenset(found)


def parts(files: Iterable[str]) -> list[str]:
    """The parts of a plan among the files of its artifact, in their order; beside them lies what was left out."""
    return sorted(name for name in files if name.startswith("plan/"))


def parquet_bytes(rows: pa.Table, shard_rows: int) -> bytes:
    """A part of the plan as a Parquet file, a row group a full shard; equal plans give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", row_group_size=shard_rows)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def shards(content: bytes) -> Iterator[tuple[int, pa.Table]]:
    """Each shard's number and its planned rows, from the bytes of a part of a plan."""
    rows = pq.read_table(pa.BufferReader(content))
    numbers, starts, counts = np.unique(rows["shard"].to_numpy(), return_index=True, return_counts=True)
    for number, start, count in zip(numbers, starts, counts, strict=True):
        yield int(number), rows.slice(start, count)


def captions(read: Callable[[str], bytes], files: Iterable[str], numbers: Iterable[int]) -> dict[str, str]:
    """The planned captions of some shards by key; `read` gives a file of the plan's artifact, `files` are their names.

    Only the parts with these shards are read: each has as many, but for the last, which has the rest.
    """
    names, wanted = parts(files), sorted(set(numbers))
    found: dict[str, str] = {}
    for place in sorted({min(number // SHARDS_PER_PART, len(names) - 1) for number in wanted}):
        rows = pq.read_table(pa.BufferReader(read(names[place])), columns=["key", "caption", "shard"])
        ours = rows.take(np.flatnonzero(np.isin(rows["shard"].to_numpy(), wanted)))
        found |= dict(zip(ours["key"].to_pylist(), ours["caption"].to_pylist(), strict=True))
    return found


def key_of(url: str, caption: str) -> str:
    """A picture's key, 32 hex digits: blake2b-128 of its normalised URL, a NUL, and its clean caption."""
    return hashlib.blake2b(f"{url}\0{caption}".encode(), digest_size=16).hexdigest()


def normalised_url(url: str) -> str:
    """One spelling for URLs that mean the same: scheme and host in lower case, no fragment, all escaped.

    Raises:
        ValueError: no http(s) URL with a host, or one that carries a password.
    """
    parts = urlsplit(url.strip())
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname or "@" in parts.netloc:
        raise ValueError(f"{url!r} is no http(s) URL of a public file")
    host = parts.hostname.encode("idna").decode() if ":" not in parts.hostname else f"[{parts.hostname}]"
    port = f":{parts.port}" if parts.port not in (None, _DEFAULT_PORTS[parts.scheme]) else ""
    path, query = (quote(part, safe=_URL_CHARACTERS) for part in (parts.path or "/", parts.query))
    return urlunsplit((parts.scheme, host + port, path, query, ""))


def clean_caption(caption: str) -> str:
    """NFC, without control and text-direction characters, runs of white space as one space."""
    spaced = " ".join(caption.split())
    if spaced.isascii() and spaced.isprintable():  # most are, and going through the letters takes ten times as long
        return spaced
    visible = "".join(letter for letter in spaced if not _is_control(letter))
    return " ".join(unicodedata.normalize("NFC", visible).split())


def _is_control(letter: str) -> bool:
    return unicodedata.category(letter) == "Cc" or ord(letter) in _BIDI_CONTROLS


def _picture_rules(config: DataConfig) -> list[filters.Rule]:
    return filters.picture_rules(config.filters) + ([] if config.image.frame.square else [filters.sized()])


def _needed(config: DataConfig) -> set[str]:
    """The columns that LAION's metadata must have."""
    needed = {"url", "caption"}.union(*(rule.columns for rule in _picture_rules(config)))
    return needed - {"aesthetic"} if config.scores else needed


def _source(config: DataConfig, left_out: LeftOut) -> Iterable[pa.Table]:
    """The source's rows under our names; what it could not even make a row of is counted by cause in `left_out`."""
    if config.metadata is not None:
        tables: Iterable[pa.Table] = laion.tables(config.metadata, _needed(config), left_out=left_out)
    else:
        tables = map(laion.renamed, table.tables(config, left_out))
    return scores.joined(tables, config.scores, left_out) if config.scores else tables


def _leave_out(cause: str, rows: pa.Table, kept: pa.Table, sentence: str, left_out: LeftOut) -> None:
    """Count the rows that are not among those that are kept: `kept` has some of `rows`, in their order."""
    if count := rows.num_rows - kept.num_rows:
        keys = Counter(rows["key"].to_pylist())
        keys.subtract(kept["key"].to_pylist())
        urls = dict(zip(rows["key"].to_pylist(), filters.urls(rows), strict=True))
        left_out.add_all(cause, (urls[key] for key in keys.elements()), count, sentence)


def _clean(rows: pa.Table, seed: int, removed: Set[str], left_out: LeftOut) -> pa.Table:
    """Rows with normalised URLs, clean captions, keys and lots; those without, or removed, are left out."""
    salt = seed.to_bytes(8, "little")
    places, keys, lots, urls, captions, licences, origins = [], [], [], [], [], [], []
    raw = (rows[name].to_pylist() for name in ("url", "caption", "licence", "origin"))
    for place, (raw_url, raw_caption, raw_licence, raw_origin) in enumerate(zip(*raw, strict=True)):
        try:
            url = normalised_url((raw_url or b"").decode())
        except ValueError:  # among them: not UTF-8, a host that IDNA refuses, a port that is no number
            left_out.add("url", repr(raw_url)[:200], "it is no http(s) URL of a public file")
            continue
        try:
            caption = clean_caption((raw_caption or b"").decode())
            told = "its caption says nothing"
        except UnicodeDecodeError:
            caption, told = "", "its caption is no UTF-8"
        if not caption:
            left_out.add("caption", url, told)
            continue
        key = key_of(url, caption)
        origin = _normalised_or_none(raw_origin)
        if not removed.isdisjoint((key, url, origin)):
            left_out.add("removed", url, "data.removed names it")
            continue
        places.append(place)
        keys.append(key)
        lots.append(hashlib.blake2b(key.encode(), digest_size=8, key=salt).digest())
        urls.append(url)
        captions.append(caption)
        licences.append(clean_caption((raw_licence or b"").decode(errors="replace")) or None)
        origins.append(origin)
    kept = rows.take(pa.array(places, pa.int64()))
    texts = {"key": keys, "url": urls, "caption": captions, "licence": licences, "origin": origins}
    columns = {name: pa.array(values, pa.string()) for name, values in texts.items()}
    numbers = pa.array(np.frombuffer(b"".join(lots), ">u8").astype(np.uint64))
    return pa.table({**columns, "lot": numbers, **{name: kept[name] for name in _PASSED_ON}})


def _normalised_or_none(url: bytes | None) -> str | None:
    try:
        return normalised_url(url.decode()) if url else None
    except ValueError:
        return None


class _Layout:
    """Gives out shards and rows up to a limit, and hands over a part as soon as it is full.

    A shard gets its number when it is full, and the others at the end: so those of a part are consecutive, and only one
    shard a bucket waits.
    """

    def __init__(self, frame: Frame, shard_rows: int, limit: int | None, keep: Callable[[pa.Table], None]):
        self._frame, self._shard_rows, self._limit, self._keep = frame, shard_rows, limit, keep
        self._open: dict[str, pa.Table] = {}  # rows by bucket, fewer than a shard each
        self._numbered: list[pa.Table] = []
        self._numbered_rows = self._shards = 0
        self.rows = 0
        self.buckets: Counter[str] = Counter()

    def add(self, rows: pa.Table) -> int:
        """Lay out rows; returns how many are beyond the limit."""
        room = rows.num_rows if self._limit is None else self._limit - self.rows
        taken = rows.slice(0, room).drop("lot")
        self.rows += taken.num_rows
        for bucket, group in self._by_bucket(taken):
            waiting = pa.concat_tables([self._open[bucket], group]) if bucket in self._open else group
            full = waiting.num_rows // self._shard_rows * self._shard_rows
            self._number(waiting.slice(0, full))
            self._open[bucket] = waiting.slice(full)
        while self._numbered_rows >= SHARDS_PER_PART * self._shard_rows:
            self._hand_over(SHARDS_PER_PART * self._shard_rows)
        return rows.num_rows - taken.num_rows

    def close(self) -> None:
        """Hand over what is left."""
        for bucket in sorted(self._open):
            self._number(self._open[bucket])
        if self._numbered_rows:
            self._hand_over(self._numbered_rows)

    def _by_bucket(self, rows: pa.Table) -> Iterator[tuple[str, pa.Table]]:
        """Each bucket with its rows, in their order; squares are all together, without the column."""
        if self._frame.square:
            yield "", rows
            return
        ratios = rows["width"].to_numpy() / rows["height"].to_numpy()
        places = np.searchsorted(self._frame.borders, ratios, side="right")
        for place in np.unique(places):
            bucket = str(self._frame.sizes[place])
            group = rows.filter(pa.array(places == place))
            self.buckets[bucket] += group.num_rows
            yield bucket, group.append_column("bucket", pa.array([bucket] * group.num_rows))

    def _number(self, rows: pa.Table) -> None:
        shard, row = np.divmod(np.arange(rows.num_rows), self._shard_rows)
        numbers = {"shard": shard + self._shards, "row": row}
        for name, values in numbers.items():
            rows = rows.append_column(name, pa.array(values))
        self._shards += -(-rows.num_rows // self._shard_rows)
        self._numbered.append(rows.select((SCHEMA if self._frame.square else BUCKETED).names))
        self._numbered_rows += rows.num_rows

    def _hand_over(self, count: int) -> None:
        rows = pa.concat_tables(self._numbered)
        self._keep(rows.slice(0, count).cast(SCHEMA if self._frame.square else BUCKETED))
        self._numbered, self._numbered_rows = [rows.slice(count)], rows.num_rows - count


def _unique(rows: pa.Table) -> pa.Table:
    """The first row of each key, in their old order."""
    _, first = np.unique(rows["key"].to_numpy(), return_index=True)
    return rows.take(pa.array(np.sort(first)))
