"""The pictures that no training is to see, with every caption, copy and duplicate of them."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Set

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets.outcomes import Outcome
from datasets.reading.views import View, stored_keys

Rows = list[tuple[str, str, str | None]]  # key, URL, and sha256 of the body, of the pictures that a shard stores


def hold_out(
    stored: Iterable[tuple[int, Rows]],
    share: float,
    named: Set[str] = frozenset(),
    alike: Mapping[str, str] | None = None,
) -> View:
    """About that share of the pictures, those whose keys are named, and all that shows one of them.

    A picture is drawn by the hash of its URL alone: it is held out in every data set, at every limit and seed, and at
    every larger share. With it go the rows of the same URL under other captions, those of which the body has the same
    bytes, and those that look alike; with these go theirs, until nothing is added.

    Args:
        stored: number and rows of each shard, in the order in which they are stored; 24 bytes of a row are kept.
        share: of all pictures, from 0 to below 1.
        named: keys.
        alike: for keys of pictures that look like others, the key of the one that stands for them; None: not known.
    """
    alike = alike or {}
    names, held = dict[int, np.ndarray](), dict[int, np.ndarray]()
    for shard, rows in stored:
        found = [[_number(name) for name in (url, alike.get(key, key), sha256 or url)] for key, url, sha256 in rows]
        names[shard] = np.array(found, np.uint64).reshape(-1, 3)
        held[shard] = np.array([_place(url) < share or key in named for key, url, _ in rows], bool)
    shown = np.empty(0, np.uint64)  # names of held-out rows: URLs, bodies, and what stands for what looks alike
    while True:
        more = np.unique(np.concatenate([shown, *(names[shard][bits].ravel() for shard, bits in held.items())]))
        if len(more) == len(shown):
            return View.of(held)
        shown = more
        held = {shard: bits | _among(names[shard], shown).any(axis=1) for shard, bits in held.items()}


def _among(names: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which of some names are among the known ones, sorted: `np.isin` would sort all of these for each shard."""
    if not len(known):
        return np.zeros(names.shape, bool)
    found: np.ndarray = known[np.searchsorted(known, names).clip(max=len(known) - 1)] == names
    return found


def rows_of(planned: pa.Table, index: bytes) -> Rows:
    """The stored rows of a shard, from its planned ones (`plan.SCHEMA`) and the table of what became of them."""
    urls = dict(zip(planned["key"].to_pylist(), planned["url"].to_pylist(), strict=True))
    table = pq.read_table(pa.BufferReader(index), columns=["key", "status", "sha256"])
    kept = table.filter(pc.field("status") == str(Outcome.OK))
    keys = kept["key"].to_pylist()
    return list(zip(keys, map(urls.__getitem__, keys), kept["sha256"].to_pylist(), strict=True))


def by_keys(shards: Iterable[int], read_index: Callable[[int], bytes], share: float) -> View:
    """What was held out before pictures were told from rows: rows by their own keys, a URL's captions one by one.

    Roots from before have such views; what is taken out of them later stays of this kind.
    """
    keys = {shard: stored_keys(read_index(shard)).to_pylist() for shard in shards}
    return View.of({shard: [int(key, 16) < share * 2**128 for key in found] for shard, found in keys.items()})


def _number(name: str) -> int:
    """64 bits for a name: of two by chance the same, one picture more would be held out."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def _place(url: str) -> float:
    """Where a URL's hash lies between 0 and 1."""
    return int.from_bytes(hashlib.blake2b(url.encode(), digest_size=16).digest()) / 2**128
