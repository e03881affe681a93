"""download: fetch the planned pictures, one Ray task a shard, img2dataset's Downloader inside."""

from collections import Counter
from collections.abc import Set
from typing import Any

import pyarrow as pa

from datasets.config import DataConfig
from datasets.fetching.download import download_shard, results
from datasets.files.fence import Fence
from datasets.formats import shards
from datasets.formats.shards import Receipt
from datasets.planning import plan
from datasets.sources import table
from pipeline.errors import BudgetExceeded
from pipeline.steps.build import Build, Facts
from pipeline.store.artifacts import Artifact


def download(build: Build) -> Facts:
    """metadata -> images: tar shards in plan order; every planned row is kept or lost for a counted cause.

    A later attempt takes over what the one before it has kept, byte for byte, where that one stands.
    """
    metadata = build.inputs["metadata"]
    data = build.config.data
    limit = data.download
    slots = build.cluster.slots(limit.per_host, held_s=2 * limit.max_seconds)  # twice as long as the longest picture
    finished = build.finished_shards(build.path)
    done = sum(receipt.rows_in for receipt in finished.values())
    buckets = metadata.manifest["notes"].get("buckets", {"": metadata.manifest["rows"]})
    count = sum(-(-rows // data.shard_rows) for rows in buckets.values())
    earlier = _earlier(build)
    todo = (
        (rows, shard, build.path, data, slots, build.forgotten, earlier, build.claim.fence)
        for part in plan.parts(metadata.files)
        for shard, rows in plan.shards(metadata.read(part))
        if shard not in finished
    )
    for receipt in build.call_each(_download, todo, count - len(finished)):
        finished[receipt.shard] = receipt
        done += receipt.rows_in
        build.report.progress(done, metadata.manifest["rows"], "pictures")
    assert sorted(finished) == list(range(count)), "a shard of the plan has no receipt"
    receipts = [finished[shard] for shard in range(count)]
    dropped: Counter[str] = Counter()
    for receipt in receipts:
        dropped.update(receipt.dropped)
    _check_losses(dropped, metadata.manifest["rows"], data.download.max_lost)
    return Facts(
        files={name: entry for receipt in receipts for name, entry in receipt.files.items()},
        rows=sum(receipt.rows_out for receipt in receipts),
        call="img2dataset.downloader.Downloader.download_shard",
        workers=sorted({receipt.pid for receipt in receipts}),
        notes={"planned": metadata.manifest["rows"], "lost": dict(dropped)},
    )


def _earlier(build: Build) -> Artifact | None:
    """The images of the attempt before this one."""
    attempt = build.config.data.attempt
    if attempt == 1:
        return None
    data = build.config.data.model_copy(update={"attempt": attempt - 1})
    found = build.made_with(build.config.model_copy(update={"data": data}))
    if found is None:
        build.report.warning(f"download: there is no attempt {attempt - 1} to take over from; everything is fetched")
    return found


def _download(
    rows: pa.Table,
    shard: int,
    path: str,
    data: DataConfig,
    slots: Any,
    forgotten: Set[str],
    earlier: Artifact | None,
    fence: Fence,
) -> Receipt:
    from pipeline.cluster.slots import SlotsClient

    files = (shards.image_name(shard), shards.index_name(shard))
    known = results(*map(earlier.read, files)) if earlier else None
    with table.hosts(data) as hosts:
        return download_shard(
            rows,
            shard=shard,
            folder=path,
            image=data.image,
            download=data.download,
            hosts=hosts,
            gate=SlotsClient(slots),
            forgotten=forgotten,
            earlier=known,
            fence=fence,
        )


def _check_losses(dropped: Counter[str], planned: int, max_lost: float) -> None:
    lost = dropped.total() - dropped["forgotten"]
    causes = ", ".join(f"{cause} {count}" for cause, count in dropped.most_common())
    if dropped.total() == planned:
        raise BudgetExceeded(f"none of {planned} planned pictures could be kept: {causes}")
    if lost > max_lost * planned:
        raise BudgetExceeded(
            f"{lost} of {planned} planned pictures are lost, more than data.download.max_lost={max_lost} allows: "
            f"{causes}; to try again: --force download"
        )
