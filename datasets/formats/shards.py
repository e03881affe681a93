"""Shards: pictures in tar files, tensors in Parquet files, and receipts, which alone make a shard done.

    00000.tar            <key>.png (or jpg) and <key>.json of every picture that was kept, in row order
    00000.parquet        row, key and one tensor a row; beside a tar, what became of each planned row
    receipts/00000.json  published last: rows in and out, losses by cause, the files with their sha256

Equal content gives equal bytes: no timestamps, no owners, a fixed order. A tar is read as if a stranger had
made it, because the usual readers take a damaged one for a shorter one.
"""

import io
import json
import os
import re
import socket
import tarfile
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datasets import pictures
from datasets.buckets import Size
from datasets.files import json_files, storage
from datasets.files.fence import Fence, unfenced
from datasets.files.storage import CorruptFile, FileEntry
from datasets.formats.rounding import Int8, Rounding

RECEIPTS = "receipts"
RECEIPT = r"\d{5,}\.json"
KEY = re.compile(r"[0-9a-f]{32}")
BODY = re.compile(r"[0-9a-f]{64}")  # the sha256 of a body as fetched
INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("row", pa.int32()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("width", pa.int32()),  # px, as fetched and seen upright
        ("height", pa.int32()),
        ("sha256", pa.string()),  # of the body as fetched
        *(("offset", pa.int64()), ("bytes", pa.int32()), ("stored", pa.string())),  # as in `ranges`
    ]
)
ROW_GROUP = 128  # rows: 20 MB of CLIP-H states, a good size for a ranged read

_MEMBER = re.compile(r"([0-9a-f]{32})\.(png|jpg|json)")
_END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)
_KEY_BYTES = pa.binary(16)
_DTYPES = ("float16", "float32", "uint8", "uint16")
NAME = "name"  # the column that says which of a picture's captions a tensor is of
_SCALES = "scales"  # the column beside values in 8 bits
_PAGE_OVERHEAD = 22  # bytes at least: a header of 16 with its sizes, counts and encodings, 6 of definition levels


@dataclass(frozen=True)
class ImageRow:
    """A stored picture: its row in the plan's shard, key, URL, caption, file extension and encoded bytes.

    Where rows are pictures with all their captions, `captions` are the source's, `caption` the first of them.
    """

    row: int
    key: str
    url: str
    caption: str
    extension: str
    picture: bytes
    captions: tuple[str, ...] = ()

    def pixels(self, size: Size | None = None) -> np.ndarray:
        """uint8 (H, W, 3), RGB: the picture as stored, or cropped and resized to a size."""
        return pictures.pixels(self.picture, size)


@dataclass(frozen=True)
class Receipt:
    """What a finished shard says of itself; only `seconds`, `pid` and `host` belong to the run."""

    shard: int
    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    files: dict[str, FileEntry]
    seconds: float
    pid: int
    host: str
    retried: int = 0
    counts: dict[str, int] = field(default_factory=dict)  # of what was noticed about rows that came out
    bucket: str | None = None  # aspect of its pictures, such as 896x1152; None: all pictures are squares
    rounding: Rounding | None = None


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def seconds(self) -> float:
        """Elapsed time, rounded to milliseconds."""
        return round(time.monotonic() - self._started, 3)


def image_name(shard: int) -> str:
    """File name of a shard of pictures."""
    return f"{shard:05d}.tar"


def tensor_name(shard: int) -> str:
    """File name of a shard of tensors."""
    return f"{shard:05d}.parquet"


def index_name(shard: int) -> str:
    """File name of the table that says, beside a shard of pictures, what became of each planned row."""
    return f"{shard:05d}.parquet"


def write_images(rows: Iterable[ImageRow]) -> bytes:
    """A tar of pictures with their captions, in the layout that webdataset reads."""
    from webdataset import TarWriter  # imports torch: only where pictures are written

    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, mtime=0, user="", group="") as tar:
        for row in rows:
            assert KEY.fullmatch(row.key), row.key
            about: dict[str, Any] = {"row": row.row, "url": row.url, "caption": row.caption}
            if row.captions:
                about["captions"] = row.captions
            text = json.dumps(about, ensure_ascii=False).encode()
            tar.write({"__key__": row.key, row.extension: row.picture, "json": text})
    return buffer.getvalue()


def read_images(content: bytes, count: int | None = None) -> list[ImageRow]:
    """The pictures of a tar, in its order; with `count`, there must be that many.

    Raises:
        CorruptFile: the tar is cut short, or holds anything but whole pictures of ours.
    """
    if not content.endswith(_END_OF_TAR):
        raise CorruptFile("an image shard is cut short: the end mark of its tar is missing")
    try:
        parts = _members(content)
        rows = [_image_row(key, files) for key, files in parts.items()]
    except (tarfile.TarError, KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"an image shard cannot be read: {error}") from error
    if count is not None and len(rows) != count:
        raise CorruptFile(f"an image shard holds {len(rows)} pictures instead of {count}")
    return rows


def _members(content: bytes) -> dict[str, dict[str, bytes]]:
    """Contents by key and extension."""
    parts: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            name = _MEMBER.fullmatch(member.name)
            file = tar.extractfile(member) if member.isreg() and not member.issparse() else None
            if name is None or file is None:
                raise ValueError(f"{member.name!r} is none of our files")
            files = parts.setdefault(name[1], {})
            if name[2] in files:
                raise ValueError(f"{member.name} occurs twice")
            files[name[2]] = file.read()
        if content[tar.offset : tar.offset + len(_END_OF_TAR)] != _END_OF_TAR:
            raise ValueError("tarfile takes a damaged header for the end")
    return parts


def _image_row(key: str, files: dict[str, bytes]) -> ImageRow:
    about = json.loads(files.pop("json"))
    ((extension, picture),) = files.items()
    row = ImageRow(about["row"], key, about["url"], about["caption"], extension, picture)
    return replace(row, captions=tuple(about.get("captions", ())))


def write_tensors(
    rows: Sequence[ImageRow], field: str, values: np.ndarray | Int8, names: Sequence[str] | None = None
) -> bytes:
    """A Parquet file with one tensor a row, for the same rows and keys as `rows`.

    With `names`, of the captions that the tensors are of, a picture may have several rows, which follow each other.

    `values` is (rows, *shape). Tensors are stored as fixed-size binary, uncompressed; dtype and shape stand
    in the schema's metadata. Arrow's own tensor type would be stored as a list of numbers and read thirty
    times slower. Those in 8 bits have a column of scales beside them.
    """
    assert len(rows) == len(values)
    columns: dict[str, pa.Array] = {
        "row": pa.array([row.row for row in rows], pa.int32()),
        "key": pa.array([bytes.fromhex(row.key) for row in rows], _KEY_BYTES),
    }
    if names is not None:
        columns[NAME] = pa.array(names, pa.string())
    about = {}
    if isinstance(values, Int8):
        columns |= {field: _fixed(values.values), _SCALES: _fixed(values.scales)}
        about[_SCALES] = json.dumps(values.scales.shape[1:])
        values = values.values
    else:
        assert str(values.dtype) in _DTYPES, values.dtype
        columns[field] = _fixed(values)
    about |= {"dtype": str(values.dtype), "shape": json.dumps(values.shape[1:])}
    return parquet_bytes(pa.table(columns).replace_schema_metadata(about))


def read_tensors(content: bytes | memoryview, field: str) -> tuple[list[str], Sequence[np.ndarray] | Int8]:
    """Keys and values (rows of *shape) of a file that `write_tensors` made; values other than int8 still lie in it.

    Raises:
        CorruptFile: the file is not Parquet, or holds something else than the tensors `field`.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        schema = file.schema_arrow
        about = {name.decode(): text.decode() for name, text in (schema.metadata or {}).items()}
        dtype, shape = about["dtype"], json.loads(about["shape"])
        scales = json.loads(about[_SCALES]) if dtype == "int8" else None
        names = [(NAME, pa.string())] if NAME in schema.names else []
        wanted = [("row", pa.int32()), ("key", _KEY_BYTES), *names, (field, _width(dtype, shape))]
        if scales is not None:
            wanted.append((_SCALES, _width("float32", scales)))
        if not schema.equals(pa.schema(wanted)):
            raise ValueError(f"it has {', '.join(schema.names)} of other types")
        keys = [key.hex() for key in file.read(["key"])["key"].to_pylist()]
        values = _row_groups(file, content, field, dtype, shape)
        if scales is not None:
            scaling = _row_groups(file, content, _SCALES, "float32", scales)
            return keys, Int8(np.concatenate(values), np.concatenate(scaling))
    except (OSError, KeyError, ValueError) as error:
        raise CorruptFile(f"a shard of {field} cannot be read: {error}") from error
    return keys, [row for group in values for row in group]


def _row_groups(
    file: pq.ParquetFile, content: bytes | memoryview, column: str, dtype: str, shape: Sequence[int]
) -> list[np.ndarray]:
    """The tensors (rows, *shape) of each row group, not copied from `content` where they lie in one piece there.

    So they do, as `parquet_bytes` writes: Parquet's plain values of a fixed size are their bytes, and end the page that
    they are in. A chunk whose other bytes are too few for two pages is one page.
    """
    place = file.schema_arrow.get_field_index(column)
    width = file.schema_arrow.field(place).type.byte_width
    groups = []
    for number in range(file.num_row_groups):
        chunk = file.metadata.row_group(number).column(place)
        size = chunk.num_values * width
        plain = chunk.compression == "UNCOMPRESSED" and set(chunk.encodings) <= {"PLAIN", "RLE"}  # RLE: of the levels
        if plain and 0 <= chunk.total_compressed_size - size < 2 * _PAGE_OVERHEAD:
            end = chunk.data_page_offset + chunk.total_compressed_size
            values = np.frombuffer(content, np.uint8, size, end - size)
        else:
            values = _decoded(file.read_row_group(number, [column])[column])
        groups.append(values.view(dtype).reshape(-1, *shape))
    return groups


def _width(dtype: str, shape: Sequence[int]) -> pa.DataType:
    """Arrow's type of one tensor; of none where the dtype is not ours."""
    size = np.dtype(dtype).itemsize if dtype in (*_DTYPES, "int8") else 0
    return pa.binary(int(np.prod(shape)) * size)


def _fixed(values: np.ndarray) -> pa.Array:
    """Tensors (rows, *shape) as fixed-size binary."""
    kind = _width(str(values.dtype), values.shape[1:])
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _decoded(column: pa.ChunkedArray) -> np.ndarray:
    """The bytes of a column that `_fixed` made."""
    width, values = column.type.byte_width, column.combine_chunks()
    return np.frombuffer(values.buffers()[1], np.uint8, len(values) * width, values.offset * width)


def table_bytes(rows: Sequence[Mapping[str, Any]], schema: pa.Schema | None = None) -> bytes:
    """A Parquet table of plain values; without a schema, types follow from the values."""
    return parquet_bytes(pa.Table.from_pylist([dict(row) for row in rows], schema=schema))


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as the Parquet file of a shard; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP,
        compression="none",
        use_dictionary=False,
        write_statistics=["row", "key"],
    )
    content: bytes = sink.getvalue().to_pybytes()
    return content


def publish_receipt(
    folder: str,
    shard: int,
    *,
    rows_in: int,
    rows_out: int,
    files: dict[str, FileEntry],
    clock: Clock,
    dropped: Mapping[str, int] | None = None,
    retried: int = 0,
    counts: Mapping[str, int] | None = None,
    bucket: str | None = None,
    rounding: Rounding | None = None,
    fence: Fence = unfenced,
) -> Receipt:
    """Declare a shard done. Every row that went in has come out or was dropped for a counted reason."""
    losses = dict(sorted((dropped or {}).items()))
    assert rows_in == rows_out + sum(losses.values()), f"{rows_in} rows in, {rows_out} out, {losses} dropped"
    made = Receipt(
        shard=shard,
        rows_in=rows_in,
        rows_out=rows_out,
        dropped=losses,
        files=files,
        seconds=clock.seconds(),
        pid=os.getpid(),
        host=socket.gethostname(),
        retried=retried,
        counts=dict(sorted((counts or {}).items())),
        bucket=bucket,
        rounding=rounding,
    )
    put_receipt(folder, made, fence)
    return made


def put_receipt(folder: str, receipt: Receipt, fence: Fence) -> None:
    """Write a receipt, in place of the shard's old one if there is one."""
    text = json.dumps(asdict(receipt), indent=1)
    fence()
    storage.publish(text.encode(), receipt_path(folder, receipt.shard))


def receipt_path(folder: str, shard: int) -> str:
    """Where a shard's receipt lies."""
    return storage.join(folder, RECEIPTS, f"{shard:05d}.json")


def finished(folder: str, among: Container[int] | None = None) -> dict[int, Receipt]:
    """Receipts of the shards of an unfinished artifact that are done, by shard number; a damaged one's shard is not.

    All of them, or those of some shards.
    """

    def wanted(name: str) -> bool:
        return among is None or int(name.removesuffix(".json")) in among

    found = json_files.read_each(storage.join(folder, RECEIPTS), RECEIPT, _receipt, wanted=wanted)
    return {receipt.shard: receipt for receipt in found.values()}


def receipts(folder: str) -> dict[int, Receipt]:
    """Receipts of all shards of a finished artifact, by shard number.

    Raises:
        CorruptFile: one cannot be read.
    """
    found = json_files.read_every(storage.join(folder, RECEIPTS), RECEIPT, _receipt)
    return {receipt.shard: receipt for receipt in found.values()}


def lacking(folder: str, receipts: Iterable[Receipt]) -> list[Receipt]:
    """Of some receipts in a folder those whose files are not all there with their sizes."""
    sizes = storage.sizes(folder)
    return [
        receipt for receipt in receipts if any(sizes.get(name) != entry.bytes for name, entry in receipt.files.items())
    ]


def receipt(folder: str, shard: int) -> Receipt:
    """The receipt of a shard that is done.

    Raises:
        CorruptFile: it cannot be read.
    """
    path = receipt_path(folder, shard)
    return json_files.parse(path, storage.read(path), _receipt)


def _receipt(facts: dict[str, Any]) -> Receipt:
    files = {file: FileEntry(**entry) for file, entry in json_files.of(Receipt, facts).pop("files").items()}
    rounding = Rounding(**found) if (found := facts.pop("rounding", None)) else None
    return Receipt(files=files, rounding=rounding, **facts)
