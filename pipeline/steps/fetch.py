"""fetch: from a source's metadata to the filtered plan, with key, shard and row of every picture fixed for ever."""

import os

import pyarrow as pa

from datasets import openmoji, plan, storage
from datasets.config import DataConfig
from datasets.storage import FileEntry
from pipeline.build import Build, Facts

CONSTANTS = ("similarity", "punsafe", "pwatermark", "aesthetic")


def fetch(build: Build) -> Facts:
    """source -> metadata: the plan, and counts of what was filtered away and why."""
    data = build.config.data
    files, counts, pid = build.call(_make, data, build.config.seed, build.path)
    notes: dict[str, object] = {"read": counts.read, "rejected": counts.rejected, "source": data.source}
    if counts.buckets:
        notes["buckets"] = counts.buckets
    if data.source == "openmoji" and data.metadata is None and data.openmoji:
        notes["licence"] = openmoji.LICENCE
        notes["constants"] = {name: getattr(data.openmoji, name) for name in CONSTANTS}
    if data.source == "folder" and data.folder:
        notes["licence"] = {"licence": data.folder.licence, "attribution": data.folder.attribution}
        left_out = ", ".join(f"{reason} {count}" for reason, count in counts.rejected.items() if count)
        if left_out:
            build.report.warning(f"{data.folder.path}: {counts.planned} of {counts.read} used; left out: {left_out}")
    return Facts(files=files, rows=counts.planned, call="pyarrow.Table.filter", workers=[pid], notes=notes)


def _make(data: DataConfig, seed: int, path: str) -> tuple[dict[str, FileEntry], plan.Counts, int]:
    files: dict[str, FileEntry] = {}

    def keep(part: pa.Table) -> None:
        name = f"plan/{len(files):05d}.parquet"
        files[name] = storage.publish(plan.parquet_bytes(part, data.shard_rows), storage.join(path, name))

    counts = plan.make(data, seed, keep)
    return files, counts, os.getpid()
