"""Fetching one shard: img2dataset's Downloader does the fetching, our resizer and writer do the rest.

Every planned row ends in exactly one status: kept, or lost for a cause that is counted. The tar is in row order whatever
the order of arrival.
"""

import http.client
import io
import re
import socket
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from datasets import images, shards, storage
from datasets.config import DownloadConfig, ImageConfig
from datasets.shards import Clock, ImageRow, Receipt

Hosts = Mapping[str, tuple[str, int]]
OPT_OUT = ("noai", "noimageai", "noindex", "noimageindex")


def download_shard(
    rows: pa.Table, *, shard: int, folder: str, image: ImageConfig, download: DownloadConfig, hosts: Hosts
) -> Receipt:
    """Fetch the pictures of a shard's planned rows and publish `<shard>.tar`, an index, and the receipt.

    Args:
        rows: columns key, url, caption, row.
        folder: the artifact's folder, a local path or URI.
        hosts: reserved host names and the addresses that they stand for at connection time.
    """
    clock = Clock()
    fetched = _fetch(rows, shard, image, download, hosts)
    assert len(fetched) == rows.num_rows, f"shard {shard}: {rows.num_rows} rows planned, {len(fetched)} accounted for"
    kept = [entry["kept"] for entry in fetched if entry["kept"] is not None]
    index = [{name: entry[name] for name in ("row", "key", "status", "width", "height")} for entry in fetched]
    contents = {shards.image_name(shard): shards.write_images(kept), shards.tensor_name(shard): shards.table_bytes(index)}
    files = {name: storage.publish(data, storage.join(folder, name)) for name, data in contents.items()}
    return shards.publish_receipt(
        folder,
        shard,
        rows_in=rows.num_rows,
        rows_out=len(kept),
        files=files,
        clock=clock,
        dropped=Counter(entry["status"] for entry in fetched if entry["kept"] is None),
    )


def _fetch(
    rows: pa.Table, shard: int, image: ImageConfig, download: DownloadConfig, hosts: Hosts
) -> list[dict[str, Any]]:
    """What became of every row, in row order."""
    from img2dataset.downloader import Downloader  # pulls in wandb and OpenCV: only where pictures are fetched

    urllib.request.install_opener(urllib.request.build_opener(_MappedHTTPHandler(hosts)))
    arrived: dict[int, dict[str, Any]] = {}

    def resize(stream: io.BytesIO, _: object) -> tuple[bytes | None, int | None, int | None, None, None, str | None]:
        try:
            picture, width, height = images.stored(stream.getvalue(), image)
        except images.Unusable as cause:
            return None, None, None, None, None, str(cause)
        return picture, width, height, None, None, None

    class Collector:
        """img2dataset's writer interface; keeps the rows in memory until all of them have arrived."""

        def __init__(self, *_: object) -> None:
            pass

        def write(self, picture: bytes | None, _: str, caption: str, meta: dict[str, Any]) -> None:
            status = "kept" if picture is not None else cause_of(meta["error_message"], meta["status"])
            row, key = meta["row"], meta["plan_key"]
            kept = ImageRow(row, key, caption, image.format, picture) if picture is not None else None
            size = {"width": meta["width"], "height": meta["height"]}
            arrived[row] = {"row": row, "key": key, "status": status, **size, "kept": kept}

        def close(self) -> None:
            pass

    with tempfile.TemporaryDirectory() as scratch:
        feather = Path(scratch, "shard.feather")
        table = rows.select(["url", "caption", "row", "key"]).rename_columns(["url", "caption", "row", "plan_key"])
        with pa.ipc.new_file(str(feather), table.schema) as writer:
            writer.write_table(table)
        Downloader(
            sample_writer_class=Collector,
            resizer=resize,
            thread_count=download.threads,
            save_caption=True,
            extract_exif=False,
            output_folder=scratch,
            column_list=table.column_names,
            timeout=download.timeout_s,
            number_sample_per_shard=max(2, rows.num_rows),
            oom_shard_count=5,
            compute_hash=None,
            verify_hash_type=None,
            encode_format=image.format,
            retries=download.retries,
            user_agent_token=None,
            disallowed_header_directives=list(OPT_OUT),
        ).download_shard((shard, str(feather)))
    return [arrived[row] for row in sorted(arrived)]


def cause_of(message: str, stage: str) -> str:
    """A short cause for counting, from img2dataset's message."""
    if stage == "failed_to_resize":
        return message
    if "X-Robots-Tag" in message:
        return "opted_out"
    status = re.search(r"HTTP Error (\d{3})", message)
    if status:
        return f"http_{status[1]}"
    if "timed out" in message:
        return "timeout"
    if "Name or service" in message or "name resolution" in message:
        return "dns"
    return "connection"


class _MappedHTTPHandler(urllib.request.HTTPHandler):
    """Plain HTTP whose reserved hosts are looked up in a table instead of the DNS, at connection time only."""

    def __init__(self, hosts: Hosts):
        super().__init__()
        self._hosts = hosts

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, request)

    def _connection(self, host: str, timeout: float | None = None, **_: Any) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(host, timeout=timeout)
        address = self._hosts.get(connection.host)
        if address is not None:
            connection._create_connection = lambda _, *rest: socket.create_connection(address, *rest)  # type: ignore[attr-defined]
        return connection
