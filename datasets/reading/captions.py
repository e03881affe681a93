"""Captions of the stored pictures: those that were written beside the source's own, and the one that is drawn of all.

A picture's captions have names, such as `alt` and `dense`, and it may have several of one. What is made of them, text
states or tokens, lies in the order of the pictures, and of a picture in that of `named`. In each pass a training draws
one of them by (seed, key, pass) alone: neither the number of ranks nor what was read before enters.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datasets.caption_settings import ALT
from datasets.files.storage import CorruptFile
from datasets.formats.rounding import Int8
from datasets.formats.shards import NAME, ImageRow, parquet_bytes

SCHEMA = pa.schema([("row", pa.int32()), ("key", pa.string()), ("caption", pa.string())])


def table_bytes(pictures: Sequence[tuple[int, str]], captions: Sequence[Sequence[str]]) -> bytes:
    """The table of a shard: rows and keys of its pictures, and of each the captions, none or several."""
    found = [(*picture, text) for picture, texts in zip(pictures, captions, strict=True) for text in texts]
    columns = [[line[place] for line in found] for place in range(len(SCHEMA))]
    return parquet_bytes(
        pa.table([pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
    )


def by_key(content: bytes) -> dict[str, list[str]]:
    """Captions by the keys of their pictures, from the bytes of a shard's table."""
    found: dict[str, list[str]] = {}
    for row in pq.read_table(pa.BufferReader(content), schema=SCHEMA).to_pylist():
        found.setdefault(row["key"], []).append(row["caption"])
    return found


def named(row: ImageRow, others: Mapping[str, Mapping[str, Sequence[str]]]) -> Iterator[tuple[str, str]]:
    """Names and texts of a picture's captions: the source's own, then `others` (by name and key), names ascending."""
    yield from ((ALT, caption) for caption in row.captions)
    for name in sorted(others):
        yield from ((name, caption) for caption in others[name].get(row.key, ()))


class Drawn:
    """What was made of a shard's captions, by their pictures: of these one is drawn in each pass.

    Args:
        keys: of each caption's picture; those of a picture follow each other.
        names: what each caption is called.
        values: what was made of each.
        weights: how often captions of a name are drawn, relative to the others that a picture has; of one that has none
            of a weight above 0, any is.
    """

    def __init__(
        self,
        keys: Sequence[str],
        names: Sequence[str],
        values: Sequence[np.ndarray] | Int8,
        weights: Mapping[str, float],
        seed: int,
    ):
        self.keys: list[str] = []
        self._values, self._weights, self._seed = values, weights, seed
        self._places: list[dict[str, list[int]]] = []  # of each picture's captions, by name
        for place, (key, name) in enumerate(zip(keys, names, strict=True)):
            if not self.keys or key != self.keys[-1]:
                self.keys.append(key)
                self._places.append({})
            self._places[-1].setdefault(name, []).append(place)

    def first(self, row: int) -> np.ndarray:
        """What was made of a picture's first caption: the source's own, as it was planned."""
        found: np.ndarray = self._values[min(place for places in self._places[row].values() for place in places)]
        return found

    def of(self, row: int, epoch: int) -> np.ndarray:
        """What was made of the caption that is drawn of a picture in a pass."""
        places, (first, second) = self._places[row], _uniform(self._seed, self.keys[row], epoch)
        weights = {name: weight for name in sorted(places) if (weight := self._weights.get(name, 0.0)) > 0}
        if not weights:
            among = [place for found in places.values() for place in found]
        else:
            ends = np.cumsum(list(weights.values()))
            number = int(np.searchsorted(ends, first * ends[-1], side="right"))
            among = places[list(weights)[min(number, len(weights) - 1)]]  # the product may be rounded up to the end
        found: np.ndarray = self._values[among[int(second * len(among))]]
        return found


def names(content: bytes | memoryview) -> list[str]:
    """Of what captions the tensors of a file are, from its bytes.

    Raises:
        CorruptFile: it does not say.
    """
    try:
        found: list[str] = pq.read_table(pa.BufferReader(content), columns=[NAME])[NAME].to_pylist()
    except (OSError, KeyError, ValueError) as error:
        raise CorruptFile(f"a shard of captions does not name them: {error}") from error
    return found


def _uniform(seed: int, key: str, epoch: int) -> tuple[float, float]:
    """Two numbers from 0 to below 1."""
    digest = hashlib.blake2b(f"{seed} {key} {epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4]) / 2**32, int.from_bytes(digest[4:]) / 2**32
