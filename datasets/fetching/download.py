"""Fetching the pictures of one shard: img2dataset's Downloader with our opener, our resizer and our writer.

Its command line, distributor and writers are left out: they drop failed shards, write in order of arrival,
and take a file that was half written for done. Here every planned row ends in exactly one outcome, and
equal answers of the servers give equal bytes.
"""

import io
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets.buckets import Size
from datasets.config import DownloadConfig, ImageConfig
from datasets.fetching import web
from datasets.files import storage
from datasets.files.fence import Fence, unfenced
from datasets.formats import shards
from datasets.formats.shards import INDEX, Clock, ImageRow, Receipt
from datasets.outcomes import PASSING, Lost, Outcome
from datasets.pictures import one_thread_a_picture, stored
from datasets.planning import plan

OPT_OUTS = ["noai", "noimageai", "noindex", "noimageindex"]  # directives of X-Robots-Tag that we obey


@dataclass(frozen=True)
class Fetched:
    """What became of a row: size (px) and hash of the body as fetched, and the picture as it is stored."""

    outcome: Outcome
    error: str | None = None
    picture: bytes | None = None
    width: int | None = None
    height: int | None = None
    sha256: str | None = None


def download_shard(
    rows: pa.Table,
    *,
    shard: int,
    folder: str,
    image: ImageConfig,
    download: DownloadConfig,
    hosts: web.Hosts,
    gate: web.Gate | None = None,
    forgotten: Set[str] = frozenset(),
    earlier: Mapping[int, Fetched] | None = None,
    fence: Fence = unfenced,
) -> Receipt:
    """Fetch the pictures of a shard and publish its tar, its index (`INDEX`) and, last, its receipt.

    Rows that failed for a passing reason are tried again, all together, up to `download.retries` times. The
    process's `urllib` opener is ours meanwhile, so a process downloads one shard at a time.

    Args:
        rows: planned rows of the shard, as in `plan.SCHEMA`, all of one bucket, where they have any.
        folder: the artifact's folder, a local path or URI.
        hosts: addresses of reserved host names, used when connecting: neither keys nor bytes see them.
        gate: slots of each host, shared with other shards; None: `download.per_host` for this shard alone.
        forgotten: keys, URLs and origins of pictures that are not asked for.
        earlier: what another download has made of its rows; those that it lost for a passing reason are fetched.
        fence: asked right before the receipt.

    Raises:
        RuntimeError: img2dataset did not account for every row.
    """
    clock = Clock()
    opener = web.Opener(download, hosts, gate or web.HostSlots(download.per_host))
    known = _known(rows, forgotten, earlier or {})
    fetched, retried = _fetch_all(rows, known, shard, image, download, opener)
    results = [(planned, fetched[planned["row"]]) for planned in rows.sort_by("row").to_pylist()]
    kept = [_image_row(planned, result, image.format) for planned, result in results if result.picture]
    contents = {
        shards.image_name(shard): shards.write_images(kept),
        shards.index_name(shard): shards.table_bytes([_index_row(*result) for result in results], INDEX),
    }
    return shards.publish_receipt(
        folder,
        shard,
        rows_in=rows.num_rows,
        rows_out=len(kept),
        files={name: storage.publish(content, storage.join(folder, name)) for name, content in contents.items()},
        clock=clock,
        dropped=Counter(str(result.outcome) for _, result in results if not result.picture),
        retried=retried,
        bucket=_bucket(rows),
        fence=fence,
    )


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


def _image_row(planned: dict[str, Any], result: Fetched, extension: str) -> ImageRow:
    assert result.picture is not None
    texts = {name: planned[name] for name in ("key", "url", "caption")}
    return ImageRow(row=planned["row"], **texts, extension=extension, picture=result.picture)


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
) -> tuple[dict[int, Fetched], int]:
    """Try the rows of which nothing is known, and again those that failed for a passing reason; how often again."""
    fetched, retried = dict(known), 0
    for attempt in range(1 + download.retries):
        settled = [row for row, result in fetched.items() if result.outcome not in PASSING]
        wanted = rows.filter(~pc.field("row").isin(settled))
        if not wanted.num_rows:
            break
        if attempt:
            retried += wanted.num_rows
            opener.wait()
        fetched |= _fetch(wanted, shard, image, download, opener)
    return fetched, retried


def _fetch(
    rows: pa.Table, shard: int, image: ImageConfig, download: DownloadConfig, opener: web.Opener
) -> dict[int, Fetched]:
    """Try every row once: what became of it, by row."""
    collector = _Collector()
    bucket = _bucket(rows)
    with tempfile.TemporaryDirectory(prefix="download-") as scratch, web.installed(opener), one_thread_a_picture():
        feather = Path(scratch, "rows.feather")
        urls = rows.select(["url", "row"])
        with pa.ipc.new_file(str(feather), urls.schema) as writer:
            writer.write_table(urls)
        downloader = _downloader_class()(
            sample_writer_class=lambda *_: collector,
            resizer=_Resizer(image, Size.parse(bucket) if bucket else None),
            thread_count=download.threads,
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
            user_agent_token=download.user_agent.partition("/")[0],
            disallowed_header_directives=OPT_OUTS,
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

    def __init__(self) -> None:
        self.fetched: dict[int, Fetched] = {}

    def write(self, picture: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        """Note one row; `meta` holds its columns and img2dataset's verdict."""
        error = meta["error_message"]
        self.fetched[meta["row"]] = Fetched(
            Outcome.OK if picture is not None else _outcome(error),
            error,
            picture,
            meta["original_width"],
            meta["original_height"],
            meta["sha256"],
        )

    def close(self) -> None:
        """Nothing to close."""


def _outcome(error: str) -> Outcome:
    """The outcome in a message of `Lost`, or in img2dataset's own about a header that forbids the use."""
    if "X-Robots-Tag" in error:
        return Outcome.OPTED_OUT
    return Outcome(error.partition(":")[0])
