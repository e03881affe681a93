"""score: an aesthetic score of every stored picture, for tables that come without (Re-LAION does)."""

import math
from collections import Counter

import numpy as np

from datasets.config import DataError, ScorerConfig
from datasets.formats import shards
from datasets.formats.shard_table import Shard
from datasets.reading import aesthetic
from pipeline.cluster.mapping import Made, chunked
from pipeline.steps.build import Build, Facts

PREPROCESS = "PIL's bicubic to the tower's short side, centre crop, CLIP's mean and standard deviation; fp32"


def score(build: Build) -> Facts:
    """images -> aesthetic: fp32 scores in a table a shard, and how many pictures have about which."""
    scorer, images = build.config.data.scorer, build.inputs["images"]
    assert scorer is not None
    arguments = (scorer, build.device)
    receipts = build.map_shards(ShardScorer, arguments, images.shards(), images.manifest["rows"], "images")
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
    """Makes of a shard of images a table of their scores."""

    def __init__(self, scorer: ScorerConfig, device: str):
        from pipeline.models import loading, scorers

        self.batch, self.scorer = scorer.batch, scorers.of_pictures(scorer, str(loading.device(device)))

    def __call__(self, number: int, images: Shard) -> Made:
        rows = images.images()
        parts = chunked(rows, self.batch).values()
        scores = [self.scorer.score([row.pixels() for row in part]) for part in parts]
        values = np.concatenate([np.empty(0, np.float32), *scores])
        if not np.isfinite(values).all():
            raise DataError(f"shard {number}: a score is no finite number; look at the weights of data.scorer")
        return Made(
            rows=len(rows),
            files={shards.tensor_name(number): aesthetic.table_bytes(rows, values)},
            counts=Counter(f"{math.floor(value)} to {math.floor(value) + 1}" for value in values),
        )
