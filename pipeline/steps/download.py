"""download: fetch the planned pictures, one Ray task a shard, img2dataset's Downloader inside."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Set
from functools import cache
from typing import Any

import pyarrow as pa

from datasets.config import DataConfig
from datasets.fetching.download import OF, Fetched, download_shard, losses, results
from datasets.fetching.names import Names
from datasets.files import notices, storage
from datasets.files.fence import Fence
from datasets.files.notices import PassedOver
from datasets.files.storage import CorruptFile
from datasets.formats import shards
from datasets.formats.shard_table import Shard
from datasets.formats.shards import Receipt
from datasets.outcomes import PASSING, Outcome
from datasets.planning import plan, plan_files, urls
from datasets.source_settings import MIXTURE
from datasets.sources import table
from pipeline.cluster.messages import Advanced
from pipeline.errors import BudgetExceeded
from pipeline.steps.build import Build, Facts
from pipeline.store import deleting

NAMED = 3  # lost pictures of a cause, on the screen
AWAY = 0.5  # share of a shard's pictures; of links that are dead one by one, fewer fail in ways that may pass
POST_EVERY_S = 1.0  # of a worker, that pictures are done
Lost = dict[str, list[tuple[int, str]]]  # by cause: shards and URLs with sentences, some of them


def download(build: Build) -> Facts:
    """metadata -> images: tar shards in plan order; every planned row is kept or lost for a counted cause.

    A later attempt takes over what the one before it has kept, byte for byte, where that one stands. A build that an
    earlier run gave up for its losses asks again for those that may pass.
    """
    metadata = build.inputs["metadata"]
    data, planned = build.config.data, metadata.manifest["rows"]
    finished = build.finished_shards(build.path)
    buckets = metadata.manifest["notes"].get("buckets", {"": planned})
    count = sum(-(-rows // data.shard_rows) for rows in buckets.values())
    again = {shard for shard, receipt in finished.items() if not PASSING.isdisjoint(receipt.dropped)}
    lost: Lost = defaultdict(list)
    causes = {str(cause): 0 for cause in Outcome if cause != Outcome.OK}  # a counter begins with none
    build.report.lost(causes | _dropped(finished))
    earlier = _earlier(build)
    _ask(build, finished, set(range(count)) - finished.keys(), earlier, lost)
    poor = set(_away(finished, data.download.max_lost))  # at once, for the network may be back
    if _budget(_dropped(finished), planned, data.download.max_lost, lost):
        poor |= again
    if poor:
        asked = sum(finished[shard].dropped.get(cause, 0) for shard in poor for cause in PASSING)
        build.report.warning(f"download: {asked:,} pictures that were lost for a passing cause are asked for again")
        for cause, named in lost.items():
            lost[cause] = [(shard, told) for shard, told in named if shard not in poor]
        _ask(build, finished, poor, earlier, lost)
    assert sorted(finished) == list(range(count)), "a shard of the plan has no receipt"
    dropped = _dropped(finished)
    if told := _budget(dropped, planned, data.download.max_lost, lost):
        raise told
    if away := _away(finished, data.download.max_lost):
        raise BudgetExceeded(
            f"most pictures of {len(away)} of {count} shards are lost for a cause that may pass, the network or a "
            f"server being away: shards {', '.join(map(str, away[:NAMED]))}{', ...' * (len(away) > NAMED)}",
            [
                ("to ask again for these, and keep all others", None),
                ("to go on without them", "data.download.max_lost=1.0"),
            ],
        )
    _tell(build, dropped, lost)
    lost_of = _lost_of(finished.values(), [part.name for part in data.parts]) if data.source == MIXTURE else {}
    receipts = [finished[shard] for shard in range(count)]
    return Facts(
        files={},
        shards={"": receipts},
        rows=sum(receipt.rows_out for receipt in receipts),
        call="img2dataset.downloader.Downloader.download_shard",
        workers=sorted({receipt.pid for receipt in receipts}),
        notes={"planned": planned, "lost": dict(dropped)} | ({"lost_of": lost_of} if lost_of else {}),
    )


def _among(forgotten: frozenset[str]) -> Callable[[pa.Table], Set[str]]:
    """Of what is forgotten the names of some planned rows, for a task is sent no more than it needs; and all hashes:
    whose bytes they are, nobody knows before they are there."""
    unwanted, bodies = urls.with_equals(forgotten), {name for name in forgotten if shards.BODY.fullmatch(name)}

    def among(rows: pa.Table) -> Set[str]:
        if not unwanted:
            return unwanted
        names = (name for key in plan.NAMES for name in rows[key].to_pylist() if name)
        return {name for name in names if urls.equal(name) in unwanted} | bodies

    return among


def _ask(
    build: Build, finished: dict[int, Receipt], wanted: Set[int], earlier: Mapping[int, Shard], lost: Lost
) -> None:
    """Download the wanted shards; those that are finished are asked again for what may pass."""
    metadata, data = build.inputs["metadata"], build.config.data
    limit, total = data.download, metadata.manifest["rows"]
    done = sum(receipt.rows_in for shard, receipt in finished.items() if shard not in wanted)
    build.report.progress(done, total, "pictures")
    held_s = 2 * limit.max_seconds  # twice as long as the longest picture
    slots = build.cluster.slots(limit.per_host, limit.max_wait_s, held_s)
    among = _among(build.forgotten)
    todo = (
        (
            rows,
            shard,
            finished.get(shard),
            build.path,
            data,
            slots,
            among(rows),
            earlier.get(shard),
            build.claim.fence,
            build.cluster.board,
            total,
        )
        for shard, rows in plan_files.all_shards(metadata.read, metadata.files)
        if shard in wanted
    )
    dropped = _dropped(finished)
    for receipt, found in build.call_each(_download, todo, len(wanted)):
        if (before := finished.get(receipt.shard)) is not None:
            dropped.subtract(before.dropped)
        dropped.update(receipt.dropped)
        finished[receipt.shard] = receipt
        build.report.lost(+dropped)
        for cause, examples in found.items():
            lost[cause] += examples[: NAMED - len(lost[cause])]


def _earlier(build: Build) -> Mapping[int, Shard]:
    """The shards of the attempt before this one; none where there was none."""
    attempt = build.config.data.attempt
    if attempt == 1:
        return {}
    data = build.config.data.model_copy(update={"attempt": attempt - 1})
    found = build.made_with(build.config.model_copy(update={"data": data}))
    if found is None:
        build.report.warning(f"download: there is no attempt {attempt - 1} to take over from; everything is fetched")
        return {}
    return found.shards()


def _download(
    rows: pa.Table,
    shard: int,
    before: Receipt | None,
    path: str,
    data: DataConfig,
    slots: Any,
    forgotten: Set[str],
    earlier: Shard | None,
    fence: Fence,
    board: Any,
    total: int,
) -> tuple[Receipt, Lost]:
    from pipeline.cluster.board import BoardClient
    from pipeline.cluster.slots import SlotsClient

    def post(count: int) -> None:
        client.post(Advanced(count, total, "pictures"))

    client = BoardClient(board)
    known = _known(path, before, fence) if before else None
    if earlier and not before:
        known = results(*map(earlier.read, _files(shard)))
    with table.hosts(data) as hosts:
        receipt = download_shard(
            rows,
            shard=shard,
            folder=path,
            image=data.image,
            download=data.download,
            hosts=hosts,
            pace=SlotsClient(slots),
            names=_names(data.download.lookup_s, data.download.lookups),
            forgotten=forgotten,
            earlier=known,
            replaced=before if known else None,
            settled=_Told(post, rows.num_rows),
            fence=fence,
        )
    return receipt, _examples(rows, path, receipt) if receipt.dropped else {}


@cache
def _names(deadline_s: float, at_once: int) -> Names:
    """What is known of names is known to every shard of a process."""
    return Names(deadline_s, at_once)


class _Told:
    """Passes counts on that add up to `total`, not more often than every second."""

    def __init__(self, tell: Callable[[int], None], total: int):
        self._tell, self._left = tell, total
        self._count, self._told = 0, time.monotonic()

    def __call__(self, count: int) -> None:
        self._count += count
        if self._count and (time.monotonic() - self._told > POST_EVERY_S or self._count == self._left):
            self._tell(self._count)
            self._left -= self._count
            self._count, self._told = 0, time.monotonic()


def _files(shard: int) -> tuple[str, str]:
    return shards.image_name(shard), shards.index_name(shard)


def _known(path: str, before: Receipt, fence: Fence) -> dict[int, Fetched] | None:
    """What an earlier run has made of a shard in this folder; None where its files are damaged: they are deleted."""
    files = {name: storage.join(path, name) for name in _files(before.shard)}
    try:
        return results(*(storage.read(file, expect=before.files[name]) for name, file in files.items()))
    except CorruptFile as error:
        notices.tell(PassedOver(path, str(error)))
        deleting.drop_shard(path, before, fence)
        return None


def _examples(rows: pa.Table, path: str, receipt: Receipt) -> Lost:
    """The first lost pictures of each cause."""
    index = storage.read(storage.join(path, shards.index_name(receipt.shard)))
    found: Lost = defaultdict(list)
    for _, url, cause, sentence in losses(rows, index):
        if len(found[cause]) < NAMED:
            found[cause].append((receipt.shard, f"{url} ({sentence})" if sentence else url))
    return dict(found)


def _dropped(finished: dict[int, Receipt]) -> Counter[str]:
    dropped: Counter[str] = Counter()
    for shard in sorted(finished):
        dropped.update(finished[shard].dropped)
    return dropped


def _lost_of(finished: Iterable[Receipt], sources: Iterable[str]) -> dict[str, dict[str, int]]:
    """Lost pictures by source and cause."""
    found: dict[str, dict[str, int]] = {source: {} for source in sources}
    for what, count in sum((Counter(receipt.counts) for receipt in finished), Counter()).items():
        source, _, cause = what.partition(OF)
        found[source][cause] = count
    return found


def _away(finished: Mapping[int, Receipt], max_lost: float) -> list[int]:
    """The shards that were fetched while the network or a server was away: a receipt would make that final."""
    full = max((receipt.rows_in for receipt in finished.values()), default=0)  # of a small shard a few links are most
    lost = {shard: sum(receipt.dropped.get(cause, 0) for cause in PASSING) for shard, receipt in finished.items()}
    return [shard for shard in sorted(lost) if lost[shard] > max(AWAY, max_lost) * full]


def _tell(build: Build, dropped: Counter[str], lost: Lost) -> None:
    """What was lost, with the first pictures of each cause."""
    if not dropped:
        return
    causes = ", ".join(f"{cause} {count:,}" for cause, count in dropped.most_common())
    build.report.warning(f"download: {dropped.total():,} pictures are lost ({causes}); `data lost` lists them")
    for cause, examples in sorted(lost.items()):
        if examples:
            build.report.warning(f"download: {cause}: {', '.join(told for _, told in examples)}")


def _budget(dropped: Counter[str], planned: int, max_lost: float, named: Lost) -> BudgetExceeded | None:
    """The refusal of a download that has lost too much, with the ways to go on; None where it has not."""
    lost = dropped.total() - dropped["forgotten"]
    none = dropped.total() == planned
    if not none and lost <= max_lost * planned:
        return None
    causes = ", ".join(f"{cause} {count}" for cause, count in dropped.most_common())
    if first := ", ".join(f"{cause}: {found[0][1]}" for cause, found in sorted(named.items()) if found):
        causes += f" (the first: {first}; `data lost` lists all)"
    passing = sum(dropped[cause] for cause in PASSING)
    ways: list[tuple[str, str | None]] = []
    if passing:
        ways.append(
            (f"to ask again for the {passing} that were lost for a cause that may pass, and keep all others", None)
        )
    if not none:
        ways.append(("to go on without them", f"data.download.max_lost={math.ceil(100 * lost / planned) / 100}"))
    told = (
        f"{lost} of {planned} planned pictures are lost, more than data.download.max_lost={max_lost} allows: {causes}"
    )
    return BudgetExceeded(f"none of {planned} planned pictures could be kept: {causes}" if none else told, ways)
