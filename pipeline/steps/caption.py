"""Captions beside the source's own: recap joins them from a table, caption has a model write them.

Both make `captions_<name>`, a table a shard of images, which `encode_text` reads with the pictures' own. So captions
that are added later take no new download and no new latents.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets.caption_settings import CaptionerConfig, RecapConfig
from datasets.config import DataError
from datasets.files import storage
from datasets.files.fence import Fence
from datasets.formats import shards
from datasets.formats.shard_table import Shard
from datasets.formats.shards import Receipt
from datasets.outcomes import Outcome
from datasets.planning import plan, recaps
from datasets.reading import captions
from pipeline.steps.build import Build, Facts
from pipeline.store.artifacts import Artifact

NO_CAPTION = "no_caption"  # why a picture has none of this name
CAPTIONS = "captions"  # counted: a picture may have several


def recap(build: Build) -> Facts:
    """metadata, images -> captions_<name>: the captions that a table has of the stored pictures."""
    name = build.step.output.removeprefix("captions_")
    inputs = (build.inputs["metadata"], build.inputs["images"])
    read = build.call(_recap, build.config.data.recaps[name], name, inputs, build.path, build.claim.fence)
    finished = build.finished_shards(build.path)
    facts = _facts(build, [finished[number] for number in sorted(finished)], "pyarrow.parquet.ParquetFile.iter_batches")
    if not facts.rows:
        told = ", ".join(f"{cause} {count:,}" for cause, count in read.items()) or "it is empty"
        raise DataError(
            f"data.recaps.{name}.path: {build.config.data.recaps[name].path} has a caption of no stored picture "
            f"({told}); give a table of the same urls or keys"
        )
    return replace(facts, notes=facts.notes | {"table": dict(read)})


def _recap(config: RecapConfig, name: str, inputs: tuple[Artifact, Artifact], path: str, fence: Fence) -> Counter[str]:
    """Publish a table and a receipt for every shard of images; what became of the rows of the config's table."""
    read = Counter[str]()
    for number, found in recaps.joined(_names(*inputs), config, f"data.recaps.{name}", read):
        clock, pictures = shards.Clock(), _stored(inputs[1].shards()[number])
        _publish(path, number, pictures, [found.get(place, []) for place in range(len(pictures))], clock, fence)
    return read


def _names(metadata: Artifact, images: Artifact) -> Iterator[tuple[int, list[recaps.Names]]]:
    """Number of each shard, and what its stored pictures are called, in their order."""
    stored = images.shards()
    for part in plan.parts(metadata.files):
        for number, planned in plan.shards(metadata.read(part)):
            rows = zip(*(planned[name].to_pylist() for name in plan.NAMES), strict=True)
            called = {names[0]: names for names in rows}
            yield number, [called[key] for _, key in _stored(stored[number])]


def _stored(images: Shard) -> list[tuple[int, str]]:
    """Rows and keys of the pictures that a shard holds, in their order."""
    table = pq.read_table(pa.BufferReader(images.read(shards.index_name(images.number))))
    kept = table.filter(pc.field("status") == str(Outcome.OK))
    return list(zip(kept["row"].to_pylist(), kept["key"].to_pylist(), strict=True))


def caption(build: Build) -> Facts:
    """images -> captions_<name>: a caption of every stored picture by a model."""
    name, images = build.step.output.removeprefix("captions_"), build.inputs["images"]
    config, rows = build.config.data.captioners[name], images.manifest["rows"]
    arguments = (config, f"data.captioners.{name}", build.device, rows)
    receipts = build.map_shards(ShardCaptioner, arguments, images.shards(), rows, "images")
    facts = _facts(build, receipts, "ray.data.Dataset.map_batches")
    if not facts.rows:
        raise DataError(f"data.captioners.{name}: the model has nothing to say of any of {rows} pictures")
    return facts


class ShardCaptioner:
    """An actor: reads a shard of images, publishes a table of captions of them, then its receipt."""

    def __init__(
        self, config: CaptionerConfig, key: str, device: str, total_rows: int, path: str, fence: Fence, board: Any
    ):
        from pipeline.cluster.board import BoardClient
        from pipeline.models import loading
        from pipeline.models.foreign import captioners

        self.total_rows, self.path, self.batch, self.fence = total_rows, path, config.batch, fence
        self.board = BoardClient(board)
        self.captioner = captioners.load(config, loading.device(device), key)

    def __call__(self, images: Shard) -> None:
        if not self.board.stopping():
            clock, rows = shards.Clock(), images.images()
            parts = [rows[start : start + self.batch] for start in range(0, len(rows), self.batch)]
            texts = [text for part in parts for text in self.captioner.captions([row.pixels() for row in part])]
            found = [[clean] if (clean := plan.clean_caption(text)) else [] for text in texts]
            _publish(self.path, images.number, [(row.row, row.key) for row in rows], found, clock, self.fence)
            self.board.post({"kind": "advance", "count": len(rows), "total": self.total_rows, "unit": "images"})


def _publish(
    path: str,
    number: int,
    pictures: list[tuple[int, str]],
    found: list[list[str]],
    clock: shards.Clock,
    fence: Fence,
) -> None:
    """A shard's table, and its receipt, which counts pictures: those without a caption are dropped."""
    name, captioned = shards.tensor_name(number), sum(map(bool, found))
    without = len(pictures) - captioned
    shards.publish_receipt(
        path,
        number,
        rows_in=len(pictures),
        rows_out=captioned,
        files={name: storage.publish(captions.table_bytes(pictures, found), storage.join(path, name))},
        clock=clock,
        dropped={NO_CAPTION: without} if without else {},
        counts={CAPTIONS: sum(map(len, found))},
        fence=fence,
    )


def _facts(build: Build, receipts: list[Receipt], call: str) -> Facts:
    """The manifest's facts of all shards' receipts; pictures without a caption are told of."""
    facts = Facts(
        files={},
        shards={"": receipts},
        rows=sum(receipt.rows_out for receipt in receipts),
        call=call,
        workers=sorted({receipt.pid for receipt in receipts}),
        notes={CAPTIONS: sum(receipt.counts.get(CAPTIONS, 0) for receipt in receipts)},
    )
    if without := sum(receipt.rows_in for receipt in receipts) - facts.rows:
        build.report.warning(f"{build.step.output}: {without:,} of {without + facts.rows:,} pictures have none")
    return facts
