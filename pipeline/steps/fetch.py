"""fetch: from a source's metadata to the filtered plan, with key, shard and row of every picture fixed for ever."""

import logging
import os
from collections import Counter
from typing import Any

import pyarrow as pa

from datasets import left_out
from datasets.config import DataConfig
from datasets.fetching.rights import OPT_OUTS
from datasets.files import storage
from datasets.files.storage import FileEntry
from datasets.planning import plan, plan_files, preview
from datasets.planning.mixture import Tally
from datasets.source_settings import MIXTURE, Part
from datasets.sources import laion, table
from pipeline.errors import BudgetExceeded
from pipeline.steps.build import Build, Facts

CONSTANTS = ("similarity", "punsafe", "pwatermark", "aesthetic")
NAMED_LICENCES = 50  # of the pictures' licences, the most common ones by name

log = logging.getLogger(__name__)


def fetch(build: Build) -> Facts:
    """sources -> metadata: the plan, counts of what was filtered away and why, licences and opt-outs."""
    data = build.config.data
    files, counts, licences, pid = build.call(_make, data, build.config.seed, build.path)
    about = [_about(tally, licences[tally.part.name], bool(data.captions)) for tally in counts.sources]
    notes: dict[str, object] = {
        "source": data.source,
        "read": counts.read,
        "rejected": counts.rejected,
        "opt_outs": {
            "x_robots_tag": OPT_OUTS,
            "removal_list": data.removed,
            "removed": counts.rejected.get("removed", 0),
        },
    }
    if data.source == MIXTURE:
        notes["sources"] = about
    else:  # what is so of the source is so of all
        notes |= {name: value for name, value in about[0].items() if name not in ("name", "planned")}
    if data.captions:
        notes["captions"] = counts.captions
    if counts.buckets:
        notes["buckets"] = counts.buckets
    for tally, told in zip(counts.sources, about, strict=True):
        if laion.is_other(told.get("columns", {})):
            build.report.warning(f"{tally.part.key}.metadata: {laion.told(told['columns'])}")
    for sentence in preview.told(data, counts):
        build.report.warning(sentence)
    for sentence in preview.as_asked(data, counts):
        log.info("%s", sentence)
    if beyond := preview.beyond_budget(counts):
        raise BudgetExceeded(beyond)
    return Facts(files=files, rows=counts.planned, call="pyarrow.Table.filter", workers=[pid], notes=notes)


def _about(tally: Tally, licences: Counter[str], per_picture: bool) -> dict[str, Any]:
    """What the manifest says of a source: its terms, and what became of its rows."""
    part, config = tally.part, tally.part.config
    told: dict[str, Any] = {
        "name": part.name,
        "source": config.source,
        "licence": table.licence(part),
        "licences": _most_common(licences),
        "read": tally.read,
        "planned": tally.planned,
        "rejected": dict(tally.left_out.counts),
    }
    if part.weight is not None:
        told["weight"] = part.weight
    if per_picture:
        told["captions"] = tally.captions
    if config.openmoji and config.metadata is None:
        told["constants"] = {name: getattr(config.openmoji, name) for name in CONSTANTS}
    if config.metadata:
        told["columns"] = laion.read_as(config.metadata)
    if others := dict(tally.left_out.others):
        told["passed_over"] = others
    return told


def _make(
    data: DataConfig, seed: int, path: str
) -> tuple[dict[str, FileEntry], plan.Counts, dict[str, Counter[str]], int]:
    files: dict[str, FileEntry] = {}
    licences: dict[str, Counter[str]] = {part.name: Counter() for part in data.parts}
    single = data.parts[0].name

    def keep(part: pa.Table) -> None:
        name = f"plan/{len(files):05d}.parquet"
        files[name] = storage.publish(plan_files.parquet_bytes(part, data.shard_rows), storage.join(path, name))
        columns = [column for column in ("licence", plan.SOURCE.name) if column in part.column_names]
        for item in part.select(columns).group_by(columns).aggregate([([], "count_all")]).to_pylist():
            licences[item.get(plan.SOURCE.name, single)][item["licence"] or "not stated"] += item["count_all"]

    counts = plan.make(data, seed, keep)
    lists = {_named(tally.part): tally.left_out for tally in counts.sources}
    files[left_out.FILE] = storage.publish(left_out.table(lists), storage.join(path, left_out.FILE))
    return files, counts, licences, os.getpid()


def _named(part: Part) -> str:
    """A name of where rows came from that does not tell where it lies."""
    return "metadata" if part.config.metadata and not part.apart else part.name


def _most_common(licences: Counter[str]) -> dict[str, int]:
    """Rows by licence, the rarest ones together: on the web there is no end of spellings."""
    named = dict(licences.most_common(NAMED_LICENCES))
    others = licences.total() - sum(named.values())
    return named | ({"others": others} if others else {})
