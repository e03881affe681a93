"""score: an aesthetic score of every stored picture, for tables that come without (Re-LAION does)."""

import math
from collections import Counter
from typing import Any

import numpy as np

from datasets.config import DataError, ScorerConfig
from datasets.files import storage
from datasets.files.fence import Fence
from datasets.formats import shards
from datasets.formats.shard_table import Shard
from datasets.reading import aesthetic
from pipeline.steps.build import Build, Facts

PREPROCESS = "PIL's bicubic to the tower's short side, centre crop, CLIP's mean and standard deviation; fp32"


def score(build: Build) -> Facts:
    """images -> aesthetic: fp32 scores in a table a shard, and how many pictures have about which."""
    scorer, images = build.config.data.scorer, build.inputs["images"]
    assert scorer is not None
    arguments, rows = (scorer, build.device, images.manifest["rows"]), images.manifest["rows"]
    receipts = build.map_shards(ShardScorer, arguments, images.shards(), rows, "images")
    found = sum((Counter(receipt.counts) for receipt in receipts), Counter[str]())
    return Facts(
        files={},
        shards={"": receipts},
        rows=sum(receipt.rows_out for receipt in receipts),
        call="ray.data.Dataset.map_batches",
        workers=sorted({receipt.pid for receipt in receipts}),
        notes={
            "scores": dict(sorted(found.items(), key=lambda item: int(item[0].partition(" ")[0]))),
            "spec": {"model": scorer.model, "preprocess": PREPROCESS},  # the weights' sha256 are among the settings
        },
    )


class ShardScorer:
    """An actor: reads a shard of images, publishes a table of their scores, then its receipt."""

    def __init__(
        self,
        scorer: ScorerConfig,
        device: str,
        total_rows: int,
        path: str,
        fence: Fence,
        board: Any,
    ):
        from pipeline.cluster.board import BoardClient
        from pipeline.models import loading

        self.total_rows, self.path, self.batch = total_rows, path, scorer.batch
        self.fence = fence
        self.board = BoardClient(board)
        self.scorer = loading.scorer(scorer, loading.device(device))

    def __call__(self, images: Shard) -> None:
        if not self.board.stopping():
            clock, shard = shards.Clock(), images.number
            name, rows = shards.tensor_name(shard), images.images()
            parts = [rows[start : start + self.batch] for start in range(0, len(rows), self.batch)]
            scores = [self.scorer.score([row.pixels() for row in part]) for part in parts]
            values = np.concatenate([np.empty(0, np.float32), *scores])
            if not np.isfinite(values).all():
                raise DataError(f"shard {shard}: a score is no finite number; look at the weights of data.scorer")
            entry = storage.publish(aesthetic.table_bytes(rows, values), storage.join(self.path, name))
            shards.publish_receipt(
                self.path,
                shard,
                rows_in=len(rows),
                rows_out=len(rows),
                files={name: entry},
                clock=clock,
                counts=Counter(f"{math.floor(value)} to {math.floor(value) + 1}" for value in values),
                fence=self.fence,
            )
            self.board.post({"kind": "advance", "count": len(rows), "total": self.total_rows, "unit": "images"})
