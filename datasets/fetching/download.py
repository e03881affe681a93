"""Fetching the pictures of one shard: img2dataset's Downloader with our opener, our resizer and our writer.

Its command line, distributor and writers are left out: they drop failed shards, write in order of arrival,
and take a file that was half written for done. Here every planned row ends in exactly one outcome, and
equal answers of the servers give equal bytes.
"""

import io
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets.buckets import Size
from datasets.config import DownloadConfig, ImageConfig
from datasets.fetching import web
from datasets.fetching.names import Names
from datasets.fetching.pace import HostSlots, Pace, Patience
from datasets.files import storage
from datasets.files.fence import Fence, unfenced
from datasets.formats import ranges, shards
from datasets.formats.shards import INDEX, Clock, ImageRow, Receipt
from datasets.outcomes import PASSING, Lost, Outcome
from datasets.pictures import one_thread_a_picture, stored
from datasets.planning import plan
from datasets.sources.table import known_as

OF = ": "  # between source and cause in counts
BRIEF_S = 1.0  # longest wait for a host in the first pass: others are asked meanwhile


@dataclass(frozen=True)
class Fetched:
    """What became of a row: size (px) and hash of the body as fetched, and the picture as it is stored."""

    outcome: Outcome
    error: str | None = None
    picture: bytes | None = None
    width: int | None = None
    height: int | None = None
    sha256: str | None = None


_TWIN = Fetched(Outcome.FORGOTTEN, f"{Outcome.FORGOTTEN}: it has the bytes of a picture that this root was to forget")


def _unheard(_: int) -> None:
    """Nobody wants to know."""


def download_shard(
    rows: pa.Table,
    *,
    shard: int,
    folder: str,
    image: ImageConfig,
    download: DownloadConfig,
    hosts: web.Hosts,
    pace: Pace | None = None,
    names: Names | None = None,
    forgotten: Set[str] = frozenset(),
    earlier: Mapping[int, Fetched] | None = None,
    replaced: Receipt | None = None,
    settled: Callable[[int], None] = _unheard,
    fence: Fence = unfenced,
) -> Receipt:
    """Fetch the pictures of a shard and publish its tar, its index (`INDEX`) and, last, its receipt.

    Rows that failed for a passing reason are tried again together, up to `download.retries` times. The process's
    `urllib` opener is ours meanwhile: a process downloads one shard at a time.

    Args:
        rows: planned rows of the shard, as in `plan.SCHEMA`, all of one bucket, where they have any.
        folder: the artifact's folder, a local path or URI.
        hosts: addresses of reserved host names, used when connecting: neither keys nor bytes see them.
        pace: turns at each host, shared with other shards; None: `download.per_host` for this shard alone.
        names: looks hosts up, for other shards too; None: for this one alone.
        forgotten: keys, URLs and origins of pictures that are not asked for, and sha256 of bodies that are not kept.
        earlier: what another download made of its rows, of which those lost for a passing reason are fetched.
        replaced: that download's receipt in this folder, which stays where nothing is gained.
        settled: told of so many more rows whose fate is known, at least for now.
        fence: asked right before the receipt.

    Raises:
        RuntimeError: img2dataset did not account for every row.
    """
    clock = Clock()
    opener = web.Opener(download, hosts, pace or HostSlots(download.per_host, download.max_wait_s), names)
    answers, retried = _fetch_all(rows, _known(rows, forgotten, earlier or {}), shard, image, download, opener, settled)
    fetched = {row: _TWIN if answer.sha256 in forgotten else answer for row, answer in answers.items()}
    dropped = Counter(str(result.outcome) for result in fetched.values() if not result.picture)
    if replaced and dropped == replaced.dropped:
        return replaced
    contents = _contents(shard, rows, fetched, image.format)
    if replaced:
        fence()
        storage.remove(shards.receipt_path(folder, shard))  # before it tells of files that are there no more
    return shards.publish_receipt(
        folder,
        shard,
        rows_in=rows.num_rows,
        rows_out=rows.num_rows - dropped.total(),
        files={name: storage.publish(content, storage.join(folder, name)) for name, content in contents.items()},
        clock=clock,
        dropped=dropped,
        retried=retried,
        counts=_lost_of(rows, fetched),
        bucket=_bucket(rows),
        fence=fence,
    )


def _contents(shard: int, rows: pa.Table, fetched: Mapping[int, Fetched], extension: str) -> dict[str, bytes]:
    """The files of a shard by name: its tar, and what became of each planned row."""
    results = [(planned, fetched[planned["row"]]) for planned in rows.sort_by("row").to_pylist()]
    kept = [_image_row(planned, result, extension) for planned, result in results if result.picture]
    tar = shards.write_images(kept)
    places = ranges.of_tar(tar)
    index = [_index_row(*result) | places.get(result[0]["key"], {}) for result in results]
    return {shards.image_name(shard): tar, shards.index_name(shard): shards.table_bytes(index, INDEX)}


def _lost_of(rows: pa.Table, fetched: Mapping[int, Fetched]) -> dict[str, int]:
    """Of a mixture, pictures lost by source and cause (`SOURCE: CAUSE`); nothing of a single source."""
    if plan.SOURCE.name not in rows.column_names:
        return {}
    sources = zip(rows["row"].to_pylist(), rows[plan.SOURCE.name].to_pylist(), strict=True)
    results = ((source, fetched[row]) for row, source in sources)
    return Counter(f"{source}{OF}{result.outcome}" for source, result in results if not result.picture)


def _known(rows: pa.Table, forgotten: Set[str], earlier: Mapping[int, Fetched]) -> dict[int, Fetched]:
    """What became of rows that nobody has to be asked for."""
    known = {row: result for row, result in earlier.items() if result.outcome not in PASSING}
    places = zip(*(rows[name].to_pylist() for name in ("row", *plan.NAMES)), strict=True)
    return known | {row: Fetched(Outcome.FORGOTTEN) for row, *names in places if not forgotten.isdisjoint(names)}


def _bucket(rows: pa.Table) -> str | None:
    """The bucket of a shard's planned rows; None where the plan has none."""
    if "bucket" not in rows.column_names:
        return None
    (bucket,) = set(rows["bucket"].to_pylist())
    return bucket


def results(tar: bytes, index: bytes) -> dict[int, Fetched]:
    """What became of each row of a shard, from its tar and its index."""
    pictures = {row.row: row.picture for row in shards.read_images(tar)}
    rows = pq.read_table(pa.BufferReader(index)).to_pylist()
    return {
        row["row"]: Fetched(
            Outcome(row["status"]),
            row["error"],
            pictures.get(row["row"]),
            row["width"],
            row["height"],
            row["sha256"],
        )
        for row in rows
    }


def losses(rows: pa.Table, index: bytes) -> Iterator[tuple[str | None, str, str, str]]:
    """Of each lost picture of a shard, planned in `rows`: its source in a mixture, its URL or name, the cause, and what
    else is known, in words."""
    planned = {row["row"]: row for row in rows.to_pylist()}
    for row in pq.read_table(pa.BufferReader(index)).to_pylist():
        if row["status"] != Outcome.OK:
            lost = planned[row["row"]]
            told = (row["error"] or "").partition(": ")[2]
            yield lost.get(plan.SOURCE.name), known_as(lost["url"]), row["status"], told


def _image_row(planned: dict[str, Any], result: Fetched, extension: str) -> ImageRow:
    assert result.picture is not None
    texts = {name: planned[name] for name in ("key", "url", "caption")}
    captions = tuple(planned.get(plan.CAPTIONS.name) or ())
    return ImageRow(row=planned["row"], **texts, extension=extension, picture=result.picture, captions=captions)


def _index_row(planned: dict[str, Any], result: Fetched) -> dict[str, Any]:
    return {
        "key": planned["key"],
        "row": planned["row"],
        "status": str(result.outcome),
        "error": result.error,
        "width": result.width,
        "height": result.height,
        "sha256": result.sha256,
    }


def _fetch_all(
    rows: pa.Table,
    known: Mapping[int, Fetched],
    shard: int,
    image: ImageConfig,
    download: DownloadConfig,
    opener: web.Opener,
    settled: Callable[[int], None],
) -> tuple[dict[int, Fetched], int]:
    """Try the rows of which nothing is known, and again those that failed for a passing reason; how often again.

    In the first pass nobody waits for a host that has enough: others are asked meanwhile.
    """
    settled(len(known))
    fetched, retried, passing = dict(known), 0, PASSING
    opener.patience = Patience(min(BRIEF_S, download.max_wait_s), BRIEF_S)
    for _ in range(1 + max(1, download.retries)):
        over = [row for row, result in fetched.items() if result.outcome not in passing]
        wanted = rows.filter(~pc.field("row").isin(over))
        if not wanted.num_rows:
            break
        retried += sum(
            fetched[row].outcome is not Outcome.THROTTLED for row in wanted["row"].to_pylist() if row in fetched
        )
        fetched |= _fetch(wanted, shard, image, download, opener, settled)
        settled = _unheard  # the rows of a further pass have been counted
        opener.patience = Patience(download.max_wait_s)
        passing = PASSING if download.retries else frozenset({Outcome.THROTTLED})
    return fetched, retried + opener.again


def _fetch(
    rows: pa.Table,
    shard: int,
    image: ImageConfig,
    download: DownloadConfig,
    opener: web.Opener,
    settled: Callable[[int], None],
) -> dict[int, Fetched]:
    """Try every row once: what became of it, by row."""
    hosts = list(dict.fromkeys(urlsplit(url).hostname or "" for url in rows["url"].to_pylist()))
    opener.expect(hosts)
    collector = _Collector(settled)
    bucket = _bucket(rows)
    with tempfile.TemporaryDirectory(prefix="download-") as scratch, web.installed(opener), one_thread_a_picture():
        feather = Path(scratch, "rows.feather")
        urls = rows.select(["url", "row"])
        with pa.ipc.new_file(str(feather), urls.schema) as writer:
            writer.write_table(urls)
        downloader = _downloader_class()(
            sample_writer_class=lambda *_: collector,
            resizer=_Resizer(image, Size.parse(bucket) if bucket else None),
            thread_count=min(download.threads, download.per_host * len(hosts)),  # so many may be asked at a time
            save_caption=False,
            extract_exif=False,
            output_folder=scratch,  # for its statistics, which ours replace
            column_list=urls.column_names,
            timeout=download.timeout_s,
            number_sample_per_shard=rows.num_rows,
            oom_shard_count=5,  # digits of its own keys, which ours replace
            compute_hash="sha256",
            verify_hash_type=None,
            encode_format=image.format,
            retries=0,  # its own would be immediate, uncounted, and for dead links too
            user_agent_token=None,  # ours are the opener's, and so is what servers forbid
            disallowed_header_directives=None,
        )
        downloader.download_shard((shard, str(feather)))
    missing = set(rows["row"].to_pylist()) - collector.fetched.keys()
    if missing:
        raise RuntimeError(f"shard {shard}: img2dataset lost the rows {sorted(missing)}; its output names the cause")
    return collector.fetched


def _downloader_class() -> type:
    """img2dataset's Downloader, imported where it is needed: it brings wandb, OpenCV and torch along."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or the import asks the network for a newer release
    os.environ.setdefault("WANDB_MODE", "disabled")
    from img2dataset.downloader import Downloader

    found: type = Downloader
    return found


class _Resizer:
    """img2dataset's resizer interface around `pictures.stored`."""

    def __init__(self, image: ImageConfig, bucket: Size | None):
        self._image, self._bucket = image, bucket

    def __call__(self, body: io.BytesIO, _: object = None) -> tuple[Any, ...]:
        """Picture, its width and height (which nobody reads), the original's width and height, error."""
        try:
            picture = stored(body.getvalue(), self._image, self._bucket)
        except Lost as error:
            return None, None, None, None, None, str(error)
        return picture.content, None, None, picture.width, picture.height, None


class _Collector:
    """img2dataset's writer interface: keeps what became of each row, whatever the order of arrival."""

    def __init__(self, settled: Callable[[int], None]) -> None:
        self.fetched: dict[int, Fetched] = {}
        self._settled = settled

    def write(self, picture: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        """Note one row; `meta` holds its columns and img2dataset's verdict."""
        error = meta["error_message"]
        self.fetched[meta["row"]] = Fetched(
            Outcome.OK if picture is not None else Outcome(error.partition(":")[0]),  # as `Lost` has it
            error,
            picture,
            meta["original_width"],
            meta["original_height"],
            meta["sha256"],
        )
        self._settled(1)

    def close(self) -> None:
        """Nothing to close."""
