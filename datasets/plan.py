"""The plan: which pictures a run fetches, and the key, shard and row that each of them keeps for ever.

A key is derived from the content (URL and caption), so the same picture has it in every data set. Shard and
row are given out once, here; pictures that are lost later leave gaps. All artifacts made from the pictures
share them.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import quote, urlsplit, urlunsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datasets import filters, laion
from datasets.config import DataConfig, DataError

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
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
_PASSED_ON = ("width", "height", "similarity", "punsafe", "pwatermark", "aesthetic")
_BIDI_CONTROLS = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_URL_CHARACTERS = "/%:@!$&'()*+,;=~-._?"  # what `quote` leaves alone: reserved characters, existing escapes
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Plan:
    """Planned rows (`SCHEMA`, sorted by shard and row), and what became of all others.

    `rejected` counts by reason: the filters' names, `url`, `caption`, `duplicate`, `limit`. Together with the
    planned rows they make up the `read` ones.
    """

    rows: pa.Table
    read: int
    rejected: dict[str, int]


def make(config: DataConfig, seed: int) -> Plan:
    """Read a source's metadata, filter it, draw from it, and lay the rest out in shards, in its own order.

    The draw takes the `limit` rows whose keys, hashed with the seed, come first: it depends on nothing
    else, and a larger limit only adds rows. All rows that pass the filters are held in memory, about half a
    kilobyte each.

    Raises:
        DataError: there is no metadata, it is not LAION's, it has no rows, or none passes the filters.
    """
    picture_rules = filters.picture_rules(config.filters)
    caption_rules = filters.caption_rules(config.filters)
    read, passed = 0, []
    rejected: Counter[str] = Counter()
    for table in _source(config, picture_rules):
        read += table.num_rows
        pictures, bad_pictures = filters.accept(table, picture_rules)
        readable, bad_texts = _clean(pictures)  # the slow part: after the filters that drop most
        kept, bad_captions = filters.accept(readable, caption_rules)
        rejected.update(bad_pictures | bad_texts | bad_captions)
        passed.append(kept)
    if read == 0:
        raise DataError(f"data.metadata: {config.metadata or config.source} holds no rows")
    rows = pa.concat_tables(passed)
    if rows.num_rows == 0:
        reasons = ", ".join(f"{reason} removed {count}" for reason, count in rejected.items() if count)
        raise DataError(f"data.filters: none of {read} rows passes: {reasons}; loosen these or change data.metadata")
    rows, rejected["duplicate"] = _unique(rows)
    rows, rejected["limit"] = _drawn(rows, config.limit, seed)
    assert rows.num_rows + rejected.total() == read
    return Plan(_in_shards(rows, config.shard_rows), read, dict(rejected))


def parquet_bytes(rows: pa.Table) -> bytes:
    """The planned rows as a Parquet file; equal plans give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def shards(content: bytes) -> Iterator[tuple[int, pa.Table]]:
    """Each shard's number and its planned rows, from the bytes of a plan."""
    rows = pq.read_table(pa.BufferReader(content), schema=SCHEMA)
    numbers, starts, counts = np.unique(rows["shard"].to_numpy(), return_index=True, return_counts=True)
    for number, start, count in zip(numbers, starts, counts, strict=True):
        yield int(number), rows.slice(start, count)


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
    visible = "".join(letter for letter in spaced if not _is_control(letter))
    return " ".join(unicodedata.normalize("NFC", visible).split())


def _is_control(letter: str) -> bool:
    return unicodedata.category(letter) == "Cc" or ord(letter) in _BIDI_CONTROLS


def _source(config: DataConfig, rules: list[filters.Rule]) -> Iterable[pa.Table]:
    if config.metadata is not None:
        return laion.tables(config.metadata, {"url", "caption"}.union(*(rule.columns for rule in rules)))
    from datasets import openmoji  # a LAION run needs none of its packages

    assert config.openmoji is not None
    return [laion.renamed(openmoji.metadata(config.openmoji))]


def _clean(rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """Rows with normalised URLs, clean captions and keys; those without are counted and left out."""
    places, keys, urls, captions = [], [], [], []
    rejected = {"url": 0, "caption": 0}
    for place, (raw_url, raw_caption) in enumerate(
        zip(rows["url"].to_pylist(), rows["caption"].to_pylist(), strict=True)
    ):
        try:
            url = normalised_url((raw_url or b"").decode())
        except ValueError:  # among them: not UTF-8, a host that IDNA refuses, a port that is no number
            rejected["url"] += 1
            continue
        try:
            caption = clean_caption((raw_caption or b"").decode())
        except UnicodeDecodeError:
            caption = ""
        if not caption:
            rejected["caption"] += 1
            continue
        places.append(place)
        keys.append(key_of(url, caption))
        urls.append(url)
        captions.append(caption)
    kept = rows.take(pa.array(places, pa.int64()))
    texts = {"key": keys, "url": urls, "caption": captions}
    columns = {name: pa.array(values, pa.string()) for name, values in texts.items()}
    return pa.table(columns | {name: kept[name] for name in _PASSED_ON}), rejected


def _unique(rows: pa.Table) -> tuple[pa.Table, int]:
    """The first row of each key, and how many others there were."""
    _, first = np.unique(rows["key"].to_numpy(), return_index=True)
    return rows.take(np.sort(first)), rows.num_rows - len(first)


def _drawn(rows: pa.Table, limit: int | None, seed: int) -> tuple[pa.Table, int]:
    """At most `limit` rows in their old order, and how many others there were."""
    if limit is None or limit >= rows.num_rows:
        return rows, 0
    salt = seed.to_bytes(8, "little")
    lots = [hashlib.blake2b(key.encode(), digest_size=16, key=salt).digest() for key in rows["key"].to_pylist()]
    drawn = sorted(range(len(lots)), key=lots.__getitem__)[:limit]
    return rows.take(np.sort(drawn)), rows.num_rows - limit


def _in_shards(rows: pa.Table, shard_rows: int) -> pa.Table:
    shard, row = np.divmod(np.arange(rows.num_rows, dtype=np.int32), np.int32(shard_rows))
    return rows.append_column("shard", pa.array(shard)).append_column("row", pa.array(row)).cast(SCHEMA)
