"""Shards of pictures and tensors: what goes in comes out, equal content gives equal bytes, damage is seen."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datasets.files import storage
from datasets.files.storage import CorruptFile, FileEntry
from datasets.formats import shards
from datasets.formats.rounding import Int8, Rounding
from datasets.formats.shards import Clock, ImageRow


def image_row(row: int, caption: str = "red heart") -> ImageRow:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (row, 0, 255 - row)).save(buffer, "PNG")
    return ImageRow(row, f"{row:032x}", f"http://x.invalid/{row}.png", caption, "png", buffer.getvalue())


ROWS = [image_row(row, caption) for row, caption in enumerate(["red heart", "Würstchen & Köter", "日本"])]


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_images_come_back_in_order_with_their_captions():
    assert shards.read_images(shards.write_images(ROWS), count=3) == ROWS
    assert ROWS[2].pixels().shape == (8, 8, 3)
    assert ROWS[2].pixels()[0, 0].tolist() == [2, 0, 253]


def test_webdataset_reads_our_tars(tmp_path):
    import webdataset

    (tmp_path / "00000.tar").write_bytes(shards.write_images(ROWS))
    samples = list(webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [row.key for row in ROWS]
    assert json.loads(samples[1]["json"])["caption"] == "Würstchen & Köter"
    assert samples[1]["png"] == ROWS[1].picture


def test_equal_rows_give_equal_bytes():
    assert shards.write_images(ROWS) == shards.write_images(list(ROWS))
    values = np.arange(18, dtype=np.float16).reshape(3, 2, 3)
    assert shards.write_tensors(ROWS, "text", values) == shards.write_tensors(ROWS, "text", values.copy())


def test_a_shortened_tar_is_refused_wherever_it_is_cut():
    content = shards.write_images(ROWS)
    end = len(content.rstrip(b"\0"))
    for cut in range(0, end + tarfile.BLOCKSIZE, tarfile.BLOCKSIZE // 2):
        with pytest.raises(CorruptFile):
            shards.read_images(content[:cut], count=3)


def test_a_tar_with_too_few_pictures_is_refused():
    with pytest.raises(CorruptFile, match="2 pictures instead of 3"):
        shards.read_images(shards.write_images(ROWS[:2]), count=3)


@pytest.mark.parametrize("about", [b"{}", b"[]", b"\xff"], ids=["no row", "a list", "no text"])
def test_a_picture_that_says_nothing_of_itself_is_refused(about):
    names = [tarfile.TarInfo(f"{ROWS[0].key}.{kind}") for kind in ("json", "png")]
    with pytest.raises(CorruptFile):
        shards.read_images(tar_of((names[0], about), (names[1], b"a")))


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
@pytest.mark.parametrize("shape", [(3, 77, 4), (3, 1), (3, 2, 2, 2)])
def test_tensors_come_back_with_shape_and_dtype(dtype, shape):
    values = np.random.default_rng(0).normal(scale=50, size=shape).astype(dtype)
    keys, found = shards.read_tensors(shards.write_tensors(ROWS, "text", values), "text")
    assert keys == [row.key for row in ROWS]
    assert {value.dtype for value in found} == {values.dtype}
    np.testing.assert_array_equal(found, values)


def test_tensors_in_8_bits_come_back_with_their_scales():
    values = Int8.of(np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32), channel=2)
    content = shards.write_tensors(ROWS, "text", values)
    _, found = shards.read_tensors(content, "text")
    assert isinstance(found, Int8)
    np.testing.assert_array_equal(found.values, values.values)
    np.testing.assert_array_equal(found.scales, values.scales)
    with pytest.raises(CorruptFile):
        shards.read_tensors(content, "latents_c")


def test_tensors_of_many_row_groups_come_back_in_order():
    rows = [image_row(0)] * 300
    values = np.arange(600, dtype=np.float32).reshape(300, 2)
    content = shards.write_tensors(rows, "latents_c", values)
    assert pq.ParquetFile(pa.BufferReader(content)).num_row_groups == 3
    np.testing.assert_array_equal(shards.read_tensors(content, "latents_c")[1], values)


def test_tensors_are_read_where_they_lie():
    content = np.frombuffer(
        shards.write_tensors([image_row(0)] * 300, "text", np.ones((300, 8, 8), np.float16)), np.uint8
    )
    assert all(np.shares_memory(row, content) for row in shards.read_tensors(content.data, "text")[1])


@pytest.mark.parametrize(
    "layout",
    [{"data_page_size": 1, "write_batch_size": 2}, {"compression": "zstd"}, {"use_dictionary": True}],
    ids=["several pages", "compressed", "a dictionary"],
)
def test_tensors_that_lie_otherwise_are_decoded(layout):
    values = np.arange(20, dtype=np.uint8).reshape(10, 2) % 3
    table = pq.read_table(pa.BufferReader(shards.write_tensors([image_row(0)] * 10, "text", values)))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **{"use_dictionary": False, "compression": "none"} | layout)
    np.testing.assert_array_equal(shards.read_tensors(sink.getvalue().to_pybytes(), "text")[1], values)


def test_a_shard_without_rows_is_a_shard():
    content = shards.write_tensors([], "text", np.empty((0, 77, 4), np.float16))
    assert shards.read_tensors(content, "text") == ([], [])
    assert shards.read_images(shards.write_images([]), count=0) == []


def test_other_files_are_no_tensor_shards():
    text = shards.write_tensors(ROWS, "text", np.zeros((3, 2), np.float16))
    with pytest.raises(CorruptFile):
        shards.read_tensors(text, "latents_c")
    with pytest.raises(CorruptFile):
        shards.read_tensors(shards.table_bytes([{"text": "x"}]), "text")
    with pytest.raises(CorruptFile):
        shards.read_tensors(text[:-20], "text")


def test_a_receipt_makes_a_shard_done(tmp_path):
    folder = str(tmp_path)
    storage.publish(b"tar", storage.join(folder, shards.image_name(3)))
    assert shards.finished(folder) == {}
    files = {"00003.tar": FileEntry(3, "ab")}
    receipt = shards.publish_receipt(
        folder,
        3,
        rows_in=5,
        rows_out=3,
        files=files,
        clock=Clock(),
        dropped={"gone": 1, "dns": 1},
        retried=2,
        rounding=Rounding(0.5, 1.0, 9.0),
    )
    assert shards.finished(folder) == {3: receipt}
    assert receipt.dropped == {"dns": 1, "gone": 1}


def test_a_receipt_must_account_for_every_row(tmp_path):
    with pytest.raises(AssertionError, match="5 rows in, 3 out"):
        shards.publish_receipt(str(tmp_path), 0, rows_in=5, rows_out=3, files={}, clock=Clock(), dropped={"gone": 1})
    assert shards.finished(str(tmp_path)) == {}
