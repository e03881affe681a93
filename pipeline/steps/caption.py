"""Captions beside the source's own: recap joins them from a table, caption has a model write them.

Both make `captions_<name>`, a table a shard of images, which `encode_text` reads with the pictures' own. So captions
that are added later take no new download and no new latents.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets.caption_settings import CaptionerConfig, RecapConfig, clean_caption
from datasets.config import DataError
from datasets.files import storage
from datasets.files.fence import Fence
from datasets.formats import shards
from datasets.formats.shard_table import Shard
from datasets.formats.shards import Receipt
from datasets.outcomes import Outcome
from datasets.planning import plan, plan_files, recaps
from datasets.reading import captions
from pipeline.cluster.mapping import Made, chunked
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
    read, stored = Counter[str](), inputs[1].shards()

    def publish(number: int, found: recaps.Captions) -> None:
        clock, pictures = shards.Clock(), _stored(stored[number])
        made = _made(number, pictures, [found.get(place, []) for place in range(len(pictures))])
        made.publish(path, number, clock, fence)

    joined = recaps.joined(_names(*inputs), config, f"data.recaps.{name}", read)
    for _ in storage.ahead(partial(publish, *one) for one in joined):
        pass
    return read


def _names(metadata: Artifact, images: Artifact) -> Iterator[tuple[int, list[recaps.Names]]]:
    """Number of each shard, and what its stored pictures are called, in their order."""
    stored = images.shards()

    def names_of(number: int, planned: pa.Table) -> tuple[int, list[recaps.Names]]:
        rows = zip(*(planned[name].to_pylist() for name in plan.NAMES), strict=True)
        called = {names[0]: names for names in rows}
        return number, [called[key] for _, key in _stored(stored[number])]

    return storage.ahead(partial(names_of, *one) for one in plan_files.all_shards(metadata.read, metadata.files))


def _stored(images: Shard) -> list[tuple[int, str]]:
    """Rows and keys of the pictures that a shard holds, in their order."""
    table = pq.read_table(pa.BufferReader(images.read(shards.index_name(images.number))))
    kept = table.filter(pc.field("status") == str(Outcome.OK))
    return list(zip(kept["row"].to_pylist(), kept["key"].to_pylist(), strict=True))


def caption(build: Build) -> Facts:
    """images -> captions_<name>: a caption of every stored picture by a model."""
    name, images = build.step.output.removeprefix("captions_"), build.inputs["images"]
    config, rows = build.config.data.captioners[name], images.manifest["rows"]
    arguments = (config, f"data.captioners.{name}", build.device)
    receipts = build.map_shards(ShardCaptioner, arguments, images.shards(), rows, "images")
    facts = _facts(build, receipts, "ray.data.Dataset.map_batches")
    if not facts.rows:
        raise DataError(f"data.captioners.{name}: the model has nothing to say of any of {rows} pictures")
    return facts


class ShardCaptioner:
    """Makes of a shard of images a table of captions of them."""

    def __init__(self, config: CaptionerConfig, key: str, device: str):
        from pipeline.models import loading
        from pipeline.models.foreign import captioners

        self.batch, self.captioner = config.batch, captioners.load(config, loading.device(device), key)

    def __call__(self, number: int, images: Shard) -> Made:
        rows = images.images()
        parts = chunked(rows, self.batch).values()
        texts = [text for part in parts for text in self.captioner.captions([row.pixels() for row in part])]
        found = [[clean] if (clean := clean_caption(text)) else [] for text in texts]
        return _made(number, [(row.row, row.key) for row in rows], found)


def _made(number: int, pictures: list[tuple[int, str]], found: list[list[str]]) -> Made:
    """A shard's table; its receipt counts pictures: those without a caption are dropped."""
    without = len(pictures) - sum(map(bool, found))
    return Made(
        rows=len(pictures),
        files={shards.tensor_name(number): captions.table_bytes(pictures, found)},
        dropped={NO_CAPTION: without} if without else {},
        counts={CAPTIONS: sum(map(len, found))},
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
