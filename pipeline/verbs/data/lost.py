"""`data lost`: every row that was left out, with its place and its cause."""

from collections.abc import Iterator
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq

from datasets import left_out
from datasets.fetching.download import losses
from datasets.files import storage
from datasets.formats import shards
from datasets.planning import plan_files
from datasets.sources.table import known_as
from pipeline.plan.dag import order
from pipeline.plan.table import table
from pipeline.plan.wanted import prints_of, wanted
from pipeline.settings.config import Config
from pipeline.store.artifacts import Artifact, Look, Store
from pipeline.terminal import print_json, printable

Row = tuple[str, str, str, str]  # source, place, cause, sentence


def lost(config: Config, root: str, as_json: bool) -> None:
    """Every row that the plan or the download has left out: source, place (a file or URL), cause, and a sentence.

    A download that has lost too much, and so is not finished, is told of too.

    Raises:
        UsageError: nothing is planned yet.
    """
    metadata = wanted(config, root, ["metadata"])["metadata"]
    print_ = prints_of(config, Look(root), order(table(config), ["images"]))["images"]
    rows = chain(_left_out(metadata), _not_stored(metadata, Store(root).path("images", print_.digest)))
    if as_json:
        names = ("source", "place", "cause", "sentence")
        print_json({"root": root, "rows": [dict(zip(names, row, strict=True)) for row in rows]})
        return
    for row in rows:  # as they are found: they may be millions
        print("\t".join(left_out.one_line(printable(field)) for field in row))


def _left_out(metadata: Artifact) -> Iterator[Row]:
    """What the plan has left out: row by row where it has kept a list of them, else how many they are."""
    listed: list[Row] = []
    if left_out.FILE in metadata.files:
        kept = pq.read_table(pa.BufferReader(metadata.read(left_out.FILE)))
        listed = [(row["source"], known_as(row["place"]), row["cause"], row["sentence"]) for row in kept.to_pylist()]
    yield from listed
    known = {cause for _, _, cause, _ in listed}
    for cause, count in metadata.manifest["notes"]["rejected"].items():
        if count and cause not in known:
            yield "plan", "", cause, f"{count:,} rows, of which only the number is kept"


def _not_stored(metadata: Artifact, folder: str) -> Iterator[Row]:
    """What a download has lost, of the shards that are done."""
    done = {shard: receipt for shard, receipt in shards.finished(folder).items() if receipt.dropped}
    for shard, rows in plan_files.all_shards(metadata.read, metadata.files if done else ()):
        if shard in done:
            name = shards.index_name(shard)
            index = storage.read(storage.join(folder, name), expect=done[shard].files[name])
            for source, key, cause, told in losses(rows, index):
                yield f"download of {source}" if source else "download", key, cause, told
