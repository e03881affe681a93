"""Shards: images in tar files, tensors in Parquet files, and the receipt that makes a shard done.

    00000.tar        <key>.png|jpg and <key>.json for each row that survived, in row order, deterministic bytes
    00000.parquet    row int32, key 16 bytes, one tensor column of fixed-size binary; shape and dtype in the metadata
    receipts/00000.json

A shard number and a row mean the same planned picture in every artifact made from `images`, so a join is a merge of
two files of the same number. Tars are read as untrusted: regular files with our own kind of names only.
"""

import io
import json
import os
import re
import socket
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from datasets import storage
from datasets.storage import CorruptFile, FileEntry

KEY = re.compile(r"[0-9a-f]{32}")
ROW_GROUP = 128
MEMBER = re.compile(r"([0-9a-f]{32})\.(png|jpg|json)")
LARGEST_MEMBER = 64 << 20  # bytes; a picture of ours is far below


@dataclass(frozen=True)
class ImageRow:
    """One picture: its row in the plan, its key, its caption, and the encoded picture."""

    row: int
    key: str
    caption: str
    extension: str
    picture: bytes

    def pixels(self) -> np.ndarray:
        """uint8 (H, W, 3), RGB."""
        with Image.open(io.BytesIO(self.picture), formats=["PNG", "JPEG"]) as image:
            return np.asarray(image.convert("RGB"))


@dataclass(frozen=True)
class Receipt:
    """What makes a shard done: rows in and out, losses by cause, its files, and who made it in what time."""

    shard: int
    rows_in: int
    rows_out: int
    files: dict[str, FileEntry]
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    pid: int = 0
    host: str = ""


def image_name(shard: int) -> str:
    """File name of a shard of images."""
    return f"{shard:05d}.tar"


def tensor_name(shard: int) -> str:
    """File name of a shard of tensors, or of the index beside a shard of images."""
    return f"{shard:05d}.parquet"


def write_images(rows: Sequence[ImageRow]) -> bytes:
    """A tar of pictures and their metadata; equal rows give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            assert KEY.fullmatch(row.key)
            about = json.dumps({"row": row.row, "caption": row.caption}, ensure_ascii=False).encode()
            for extension, content in ((row.extension, row.picture), ("json", about)):
                member = tarfile.TarInfo(f"{row.key}.{extension}")  # mtime, uid and gid are 0 by default
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def read_images(data: bytes) -> list[ImageRow]:
    """The rows of a tar written by `write_images`; anything else in it raises `CorruptFile`."""
    parts: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            name = MEMBER.fullmatch(member.name)
            if not name or not member.isreg() or member.size > LARGEST_MEMBER:
                raise CorruptFile(f"an image shard holds {member.name!r}, which is none of its files; it was not made by us")
            content = tar.extractfile(member)
            assert content is not None
            parts.setdefault(name[1], {})[name[2]] = content.read()
    rows = []
    for key, files in parts.items():
        about = json.loads(files.pop("json"))
        ((extension, picture),) = files.items()
        rows.append(ImageRow(about["row"], key, about["caption"], extension, picture))
    return rows


def write_tensors(rows: Sequence[ImageRow], name: str, values: np.ndarray) -> bytes:
    """A Parquet file with one fixed-size binary per row; `values` is (rows, *shape), stored in its own dtype."""
    assert len(rows) == len(values)
    shape, dtype = values.shape[1:], values.dtype
    width = int(np.prod(shape)) * dtype.itemsize
    about = {b"field": name.encode(), b"shape": json.dumps(shape).encode(), b"dtype": dtype.str.encode()}
    flat = pa.py_buffer(np.ascontiguousarray(values).tobytes())
    table = pa.table(
        {
            "row": pa.array([row.row for row in rows], pa.int32()),
            "key": pa.array([bytes.fromhex(row.key) for row in rows], pa.binary(16)),
            name: pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, flat]),
        }
    ).replace_schema_metadata(about)
    return _parquet(table)


def read_tensors(data: bytes, name: str) -> tuple[list[str], np.ndarray]:
    """Keys and values (rows, *shape) of a file written by `write_tensors`."""
    table = pq.read_table(pa.BufferReader(data)).combine_chunks()
    about = table.schema.metadata
    if about.get(b"field") != name.encode():
        raise CorruptFile(f"a tensor shard holds {about.get(b'field')!r} instead of {name}")
    shape = json.loads(about[b"shape"])
    column = table[name].chunk(0) if table.num_rows else table[name]
    values = np.frombuffer(b"".join(column.to_pylist()), dtype=np.dtype(about[b"dtype"].decode()))
    return [key.hex() for key in table["key"].to_pylist()], values.reshape(table.num_rows, *shape)


def table_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A small Parquet table of plain values."""
    return _parquet(pa.Table.from_pylist([dict(row) for row in rows]))


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, row_group_size=ROW_GROUP, compression="none", use_dictionary=False, write_statistics=False
    )
    return sink.getvalue().to_pybytes()


class Clock:
    """Seconds since it was made, by the monotonic clock."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def seconds(self) -> float:
        """Elapsed seconds."""
        return round(time.monotonic() - self._started, 3)


def publish_receipt(
    folder: str,
    shard: int,
    *,
    rows_in: int,
    rows_out: int,
    files: dict[str, FileEntry],
    clock: Clock,
    dropped: Mapping[str, int] | None = None,
) -> Receipt:
    """Declare a shard done; every planned row must be accounted for."""
    losses = dict(sorted((dropped or {}).items()))
    assert rows_in == rows_out + sum(losses.values()), f"shard {shard}: {rows_in} rows in, {rows_out} out, {losses} lost"
    receipt = Receipt(shard, rows_in, rows_out, files, losses, clock.seconds(), os.getpid(), socket.gethostname())
    text = json.dumps(asdict(receipt), indent=1)
    storage.publish(text.encode(), storage.join(folder, "receipts", f"{shard:05d}.json"))
    return receipt


def finished(folder: str) -> dict[int, Receipt]:
    """Receipts of the shards of an artifact that are done, by shard number."""
    receipts = {}
    for name in storage.listing(storage.join(folder, "receipts")):
        fields = json.loads(storage.read(storage.join(folder, "receipts", name)))
        files = {file: FileEntry(**entry) for file, entry in fields.pop("files").items()}
        receipts[fields["shard"]] = Receipt(files=files, **fields)
    return receipts
