"""fetch: from a source's metadata to the filtered plan, with key, shard and row of every picture fixed for ever."""

import os
from collections import Counter

import pyarrow as pa

from datasets import left_out
from datasets.config import DataConfig
from datasets.fetching.rights import OPT_OUTS
from datasets.files import storage
from datasets.files.storage import FileEntry
from datasets.planning import plan, preview
from datasets.sources import laion, table
from pipeline.errors import BudgetExceeded
from pipeline.steps.build import Build, Facts

CONSTANTS = ("similarity", "punsafe", "pwatermark", "aesthetic")
NAMED_LICENCES = 50  # of the pictures' licences, the most common ones by name


def fetch(build: Build) -> Facts:
    """source -> metadata: the plan, counts of what was filtered away and why, licences and opt-outs."""
    data = build.config.data
    files, counts, licences, pid = build.call(_make, data, build.config.seed, build.path)
    notes: dict[str, object] = {
        "read": counts.read,
        "rejected": counts.rejected,
        "source": data.source,
        "licence": table.licence(data),
        "licences": licences,
        "opt_outs": {
            "x_robots_tag": OPT_OUTS,
            "removal_list": data.removed,
            "removed": counts.rejected.get("removed", 0),
        },
    }
    if counts.buckets:
        notes["buckets"] = counts.buckets
    if data.source == "openmoji" and data.metadata is None and data.openmoji:
        notes["constants"] = {name: getattr(data.openmoji, name) for name in CONSTANTS}
    if data.metadata:
        notes["columns"] = taken = laion.read_as(data.metadata)
        if laion.is_other(taken):
            build.report.warning(f"data.metadata: {laion.told(taken)}")
    if others := dict(counts.left_out.others):
        notes["passed_over"] = others
    for sentence in preview.told(data, counts):
        build.report.warning(sentence)
    if beyond := preview.beyond_budget(data, counts):
        raise BudgetExceeded(beyond)
    return Facts(files=files, rows=counts.planned, call="pyarrow.Table.filter", workers=[pid], notes=notes)


def _make(data: DataConfig, seed: int, path: str) -> tuple[dict[str, FileEntry], plan.Counts, dict[str, int], int]:
    files: dict[str, FileEntry] = {}
    licences: Counter[str] = Counter()

    def keep(part: pa.Table) -> None:
        name = f"plan/{len(files):05d}.parquet"
        files[name] = storage.publish(plan.parquet_bytes(part, data.shard_rows), storage.join(path, name))
        found = part["licence"].value_counts().to_pylist()
        licences.update({item["values"] or "not stated": item["counts"] for item in found})

    counts = plan.make(data, seed, keep)
    files[left_out.FILE] = storage.publish(counts.left_out.table(_source(data)), storage.join(path, left_out.FILE))
    return files, counts, _most_common(licences), os.getpid()


def _source(data: DataConfig) -> str:
    """A name of where rows came from that does not tell where it lies."""
    return "metadata" if data.metadata else data.source


def _most_common(licences: Counter[str]) -> dict[str, int]:
    """Rows by licence, the rarest ones together: on the web there is no end of spellings."""
    named = dict(licences.most_common(NAMED_LICENCES))
    others = licences.total() - sum(named.values())
    return named | ({"others": others} if others else {})
