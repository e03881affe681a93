"""Training batches: which pictures come when is arithmetic, so any step can be read by any rank at any time.

Samples form one endless stream: epoch after epoch, each a fresh permutation in which every row occurs once. Shards are
permuted, then rows are shuffled within windows of a few shards, so that reading stays local. The permutation is a pure
function of (seed, epoch); neither the world size nor the batch size enters.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from datasets import shards, storage
from datasets.config import DataError
from datasets.storage import FileEntry

WINDOW = 8  # shards whose rows are mixed
CACHE = 2 * WINDOW  # decoded shards kept in memory


@dataclass(frozen=True)
class Source:
    """One field of the batches and the artifact that holds it.

    `field` is `image` (tar shards) or the name of a tensor column; `files` are the artifact's files with their hashes.
    """

    field: str
    folder: str
    files: dict[str, FileEntry]


class Batches:
    """Rows of several artifacts made from the same images, joined shard by shard and checked by key."""

    def __init__(self, sources: Sequence[Source], seed: int, window: int = WINDOW):
        self.sources = tuple(sources)
        self.seed = seed
        self.window = window
        receipts = shards.finished(sources[0].folder)
        self.counts = {shard: receipt.rows_out for shard, receipt in sorted(receipts.items()) if receipt.rows_out}
        self.rows = sum(self.counts.values())
        self._cache: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        self._epoch = lru_cache(maxsize=2)(self._order_of)

    def require(self, batch_size: int, key: str) -> None:
        """Refuse a batch larger than the data."""
        if batch_size > self.rows:
            raise DataError(f"{key}={batch_size}: the data has only {self.rows} rows; take a smaller batch or more data")

    def read(self, position: int, rows: int) -> dict[str, np.ndarray]:
        """The stream's samples `position` to `position + rows`, each field stacked.

        image: uint8 (rows, 3, H, W); tensors: float16 (rows, *shape); key: str (rows,).
        """
        places = [self._place(position + i) for i in range(rows)]
        samples = [(self._shard(shard), row) for shard, row in places]
        fields = [*(source.field for source in self.sources), "key"]
        return {field: np.stack([shard[field][row] for shard, row in samples]) for field in fields}

    def _place(self, position: int) -> tuple[int, int]:
        epoch, index = divmod(position, self.rows)
        shard, row = self._epoch(epoch)[index]
        return int(shard), int(row)

    def _order_of(self, epoch: int) -> np.ndarray:
        return order(self.counts, self.seed, epoch, self.window)

    def _shard(self, shard: int) -> dict[str, np.ndarray]:
        if shard not in self._cache:
            self._cache[shard] = self._load(shard)
            while len(self._cache) > max(CACHE, 2 * self.window):
                self._cache.popitem(last=False)
        self._cache.move_to_end(shard)
        return self._cache[shard]

    def _load(self, shard: int) -> dict[str, np.ndarray]:
        """All fields of one shard, the files verified and the keys of all sources compared."""
        fields: dict[str, np.ndarray] = {}
        for source in self.sources:
            name = shards.image_name(shard) if source.field == "image" else shards.tensor_name(shard)
            data = storage.read(storage.join(source.folder, name), expect=source.files[name])
            if source.field == "image":
                rows = shards.read_images(data)
                keys = [row.key for row in rows]
                values = np.stack([row.pixels() for row in rows]).transpose(0, 3, 1, 2)
            else:
                keys, values = shards.read_tensors(data, source.field)
            known = fields.setdefault("key", np.array(keys))
            if list(known) != keys:
                raise storage.CorruptFile(f"{source.folder} and {self.sources[0].folder} differ in the keys of shard {shard}")
            fields[source.field] = values
        return fields


def order(counts: dict[int, int], seed: int, epoch: int, window: int) -> np.ndarray:
    """One epoch's order: int64 (rows, 2) of shard and row, every row once."""
    generator = np.random.default_rng((seed, epoch))
    numbers = generator.permutation(sorted(counts))
    parts = []
    for start in range(0, len(numbers), window):
        pairs = np.array(
            [(shard, row) for shard in numbers[start : start + window] for row in range(counts[int(shard)])], np.int64
        )
        parts.append(generator.permutation(pairs))
    return np.concatenate(parts)
