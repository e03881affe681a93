"""fetch: from a source's metadata to the filtered plan, with key, shard and row of every picture fixed for ever."""

import os
from collections import Counter

import pyarrow as pa

from datasets.config import DataConfig
from datasets.fetching.rights import OPT_OUTS
from datasets.files import storage
from datasets.files.storage import FileEntry
from datasets.planning import plan
from datasets.sources import table
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
            "removed": counts.rejected["removed"],
        },
    }
    if counts.buckets:
        notes["buckets"] = counts.buckets
    if data.source == "openmoji" and data.metadata is None and data.openmoji:
        notes["constants"] = {name: getattr(data.openmoji, name) for name in CONSTANTS}
    left_out = ", ".join(
        f"{reason} {count:,}" for reason, count in counts.rejected.items() if count and reason != "limit"
    )
    if left_out:
        where = data.metadata or data.source
        build.report.warning(f"{where}: {counts.planned:,} of {counts.read:,} used; left out: {left_out}")
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
    return files, counts, _most_common(licences), os.getpid()


def _most_common(licences: Counter[str]) -> dict[str, int]:
    """Rows by licence, the rarest ones together: on the web there is no end of spellings."""
    named = dict(licences.most_common(NAMED_LICENCES))
    others = licences.total() - sum(named.values())
    return named | ({"others": others} if others else {})
