"""The pictures that no training is to see, with every caption, copy and duplicate of them."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Set

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets.outcomes import Outcome
from datasets.reading.views import View, stored_keys

Rows = list[tuple[str, str, str | None]]  # key, URL, and sha256 of the body, of the pictures that a shard stores


def hold_out(
    stored: Callable[[], Iterable[tuple[int, Rows]]],
    share: float,
    named: Set[str] = frozenset(),
    alike: Mapping[str, str] | None = None,
) -> View:
    """About that share of the pictures, those whose keys are named, and all that shows one of them.

    A picture is drawn by the hash of its URL alone: it is held out in every data set, at every limit and seed, and at
    every larger share. With it go the rows of the same URL under other captions, those of which the body has the same
    bytes, and those that look alike; with these go theirs, until nothing is added.

    Args:
        stored: gives, as often as it is called, number and rows of each shard, in the order in which they are stored.
        share: of all pictures, from 0 to below 1.
        named: keys.
        alike: for keys of pictures that look like others, the key of the one that stands for them; None: not known.
    """
    alike = alike or {}
    shown: set[str] = set()  # URLs, digests of bodies, and keys that stand for what looks alike, of held-out rows
    while True:
        known, found = len(shown), {}
        for shard, rows in stored():
            held = []
            for key, url, sha256 in rows:
                names = {url, alike.get(key, key), *filter(None, [sha256])}
                held.append(_place(url) < share or key in named or not shown.isdisjoint(names))
                if held[-1]:
                    shown |= names
            found[shard] = held
        if len(shown) == known:
            return View.of(found)


def rows_of(planned: pa.Table, index: bytes) -> Rows:
    """The stored rows of a shard, from its planned ones (`plan.SCHEMA`) and the table of what became of them."""
    urls = dict(zip(planned["key"].to_pylist(), planned["url"].to_pylist(), strict=True))
    table = pq.read_table(pa.BufferReader(index), columns=["key", "status", "sha256"])
    kept = table.filter(pc.field("status") == str(Outcome.OK))
    return [(row["key"], urls[row["key"]], row["sha256"]) for row in kept.to_pylist()]


def by_keys(shards: Iterable[int], read_index: Callable[[int], bytes], share: float) -> View:
    """What was held out before pictures were told from rows: rows by their own keys, a URL's captions one by one.

    Roots from before have such views; what is taken out of them later stays of this kind.
    """
    keys = {shard: stored_keys(read_index(shard)).to_pylist() for shard in shards}
    return View.of({shard: [int(key, 16) < share * 2**128 for key in found] for shard, found in keys.items()})


def _place(url: str) -> float:
    """Where a URL's hash lies between 0 and 1."""
    return int.from_bytes(hashlib.blake2b(url.encode(), digest_size=16).digest()) / 2**128
