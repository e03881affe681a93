"""deduplicate: which of the stored pictures are duplicates of others, with a contact sheet of some to look at."""

import os
from collections import defaultdict
from functools import partial

import pyarrow.compute as pc

from datasets.files import storage
from datasets.files.fence import Fence
from datasets.files.storage import FileEntry
from datasets.formats import removal, shards
from datasets.formats.shard_table import Shard
from datasets.formats.shards import Clock, Receipt
from datasets.reading import duplicates
from pipeline.steps.build import Build, Facts
from pipeline.store.artifacts import Artifact

HASHES = "hashes"
SHEET = "groups.png"
SHEET_GROUPS, SHEET_PICTURES = 32, 4


def deduplicate(build: Build) -> Facts:
    """images -> duplicates: hashes of every picture, the table of duplicates, and a contact sheet of some."""
    images = build.inputs["images"]
    folder = storage.join(build.path, HASHES)
    stored = images.shards()
    done = build.finished_shards(folder)
    todo = [number for number in stored if number not in done]
    items = ((stored[number], folder, build.claim.fence) for number in todo)
    for receipt in build.call_each(_hash, items, len(todo)):
        done[receipt.shard] = receipt
        build.report.progress(len(done), len(stored), "shards")
    hashed = {f"{HASHES}/{name}": entry for receipt in done.values() for name, entry in receipt.files.items()}
    files, counts, crowded, pid = build.call(_find, images, build.path, hashed)
    if crowded:
        build.report.warning(
            f"{crowded:,} pictures, such as nearly flat ones, have something of more than {duplicates.CROWD} others "
            "and were compared with the nearest of these alone: duplicates among them may be left"
        )
    if SHEET in files:
        build.report.image(build.step.output, storage.read(storage.join(build.path, SHEET)), 0)
    return Facts(
        files=files,
        shards={HASHES: list(done.values())},
        rows=sum(counts.values()),
        call="numpy.bitwise_count",
        workers=sorted({pid, *(receipt.pid for receipt in done.values())}),
        notes={"duplicates": counts, "crowded": crowded},
    )


def _hash(images: Shard, folder: str, fence: Fence) -> Receipt:
    clock, shard, rows = Clock(), images.number, images.images()
    name = shards.tensor_name(shard)
    files = {name: storage.publish(duplicates.hashes(rows), storage.join(folder, name))}
    count = len(rows)
    return shards.publish_receipt(folder, shard, rows_in=count, rows_out=count, files=files, clock=clock, fence=fence)


def _find(
    images: Artifact, path: str, hashed: dict[str, FileEntry]
) -> tuple[dict[str, FileEntry], dict[str, int], int, int]:
    """The table, the sheet where there is something to show, counts by kind, and of pictures not compared with all."""
    from stages.sampling.grid import grid

    numbers = {int(name.removeprefix(f"{HASHES}/").removesuffix(".parquet")): name for name in hashed}
    read = storage.ahead(partial(storage.read, storage.join(path, name), hashed[name]) for name in numbers.values())
    tables = dict(zip(numbers, read, strict=True))
    stored, outcome = images.shards(), duplicates.find(tables)
    found = outcome.table
    contents = {duplicates.FILE: shards.parquet_bytes(found)}
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for row in found.to_pylist():
        if row["of"] in groups or len(groups) < SHEET_GROUPS:
            groups[row["of"]].append(row["key"])
    shown = {kept: [kept, *others[: SHEET_PICTURES - 1]] for kept, others in groups.items()}
    if shown:
        wanted = {key for keys in shown.values() for key in keys}
        rows = {
            row.key: row
            for shard, content in tables.items()
            if removal.holds(content, wanted)
            for row in stored[shard].images()
            if row.key in wanted
        }
        sheet = [(rows[kept].caption, [rows[key].pixels() for key in keys]) for kept, keys in shown.items()]
        contents[SHEET] = grid(("kept", *["duplicate"] * (SHEET_PICTURES - 1)), sheet)
    counts = {kind: pc.sum(pc.equal(found["kind"], kind)).as_py() or 0 for kind in ("exact", "perceptual")}
    files = {name: storage.publish(content, storage.join(path, name)) for name, content in contents.items()}
    return files, counts, outcome.crowded, os.getpid()
