"""fetch: from a source's metadata to the filtered plan, with key, shard and row of every picture fixed for ever."""

import os

from datasets import openmoji, plan, storage
from datasets.config import DataConfig
from datasets.storage import FileEntry
from pipeline.build import Build, Facts

PLAN = "plan.parquet"
CONSTANTS = ("similarity", "punsafe", "pwatermark", "aesthetic")


def fetch(build: Build) -> Facts:
    """source -> metadata: the plan, and counts of what was filtered away and why."""
    data = build.config.data
    entry, rows, read, rejected, pid = build.call(_make, data, build.config.seed, build.path)
    notes: dict[str, object] = {"read": read, "rejected": rejected, "source": data.source}
    if data.source == "openmoji" and data.metadata is None and data.openmoji:
        notes["licence"] = openmoji.LICENCE
        notes["constants"] = {name: getattr(data.openmoji, name) for name in CONSTANTS}
    return Facts(files={PLAN: entry}, rows=rows, call="pyarrow.Table.filter", workers=[pid], notes=notes)


def _make(data: DataConfig, seed: int, path: str) -> tuple[FileEntry, int, int, dict[str, int], int]:
    made = plan.make(data, seed)
    entry = storage.publish(plan.parquet_bytes(made.rows), storage.join(path, PLAN))
    return entry, made.rows.num_rows, made.read, made.rejected, os.getpid()
