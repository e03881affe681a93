"""Tars as people make them: names, links, suffixes, compression; each member used or named."""

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
import urllib.request
from functools import partial

import pyarrow as pa
import pytest
from PIL import Image

from datasets.config import DataError
from datasets.files import compressed
from datasets.left_out import LeftOut
from datasets.source_settings import WebdatasetConfig
from datasets.sources import webdataset


def picture(shade, kind="JPEG"):
    buffer = io.BytesIO()
    Image.new("L", (20, 16), shade).save(buffer, kind)
    return buffer.getvalue()


def packed(path, *members):
    """A tar of names with their bytes, or with what they are hard links to (a text)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.LNKTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def read(path):
    left_out = LeftOut()
    tables = webdataset.tables(WebdatasetConfig(path=str(path), max_bytes=10_000), left_out)
    return [row["TEXT"].decode() for table in tables for row in table.to_pylist()], left_out


def test_dots_in_names_are_of_the_names(tmp_path):
    names = [f"IMG_2024.05.{day:02d}" for day in range(1, 5)]
    pairs = [((f"{n}.jpg", picture(i)), (f"{n}.txt", n.encode())) for i, n in enumerate(names)]
    packed(tmp_path / "x.tar", *(member for pair in pairs for member in pair))
    assert read(tmp_path)[0] == names


def test_every_member_is_used_or_named(tmp_path):
    packed(
        tmp_path / "x.tar",
        ("a.img", picture(0)),
        ("a.cap", b"a cat"),
        ("a.seg.png", picture(1, "PNG")),
        ("a.cls", b"7"),
        ("b.JFIF", picture(2)),
        ("b.caption", b"a dog"),
        ("._b.jpg", b"of a Mac"),
        ("README", b""),
    )
    captions, left_out = read(tmp_path)
    assert captions == ["a cat", "a dog"]
    assert left_out.counts == {"no_caption": 1}
    assert left_out.examples(1) == ["x.tar/a.seg.png: there is no caption beside it"]
    assert left_out.others == {".cls": 1, "hidden": 1, "no suffix": 1}


def test_a_hard_link_is_the_member_that_it_names_and_no_other(tmp_path):
    members = [("a.jpg", picture(0)), ("a.txt", b"a cat"), ("b.jpg", "a.jpg"), ("b.txt", b"a kitten")]
    packed(tmp_path / "x.tar", *members, ("c.jpg", "/etc/passwd"), ("c.txt", b"a secret"))
    captions, left_out = read(tmp_path)
    assert captions == ["a cat", "a kitten"]
    assert left_out.counts == {"link": 1}
    with webdataset.hosts(WebdatasetConfig(path=str(tmp_path), max_bytes=10_000)) as hosts:
        assert list(hosts) == [webdataset.HOST]


def test_names_are_the_same_with_and_without_a_dot_before_them(tmp_path):
    packed(
        tmp_path / "x.tar",
        ("./a.jpg", picture(0)),
        ("a.txt", b"a cat"),
        ("b/../b.jpg", "a.jpg"),
        ("./b.txt", b"a kitten"),
    )
    captions, left_out = read(tmp_path)
    assert captions == ["a cat", "a kitten"]
    assert not left_out.counts


def test_each_picture_of_a_sample_is_a_row_as_in_a_folder(tmp_path):
    packed(
        tmp_path / "x.tar",
        ("s.png", picture(0, "PNG")),
        ("s.jpg", picture(1)),
        ("s.txt", b"a cat"),
        ("t.png", b"none"),
        ("t.jpg", picture(2)),
        ("t.webp", bytes(20_000)),
        ("t.txt", b"a dog"),
        ("u.png", picture(3, "PNG")),
        ("u.jpg", picture(4)),
    )
    captions, left_out = read(tmp_path)
    assert captions == ["a cat", "a cat", "a dog"]
    assert left_out.counts == {"unreadable": 1, "too_big": 1, "no_caption": 2}
    places = {place for _, place, _, _ in left_out.rows("")}
    assert places == {"x.tar/t.png", "x.tar/t.webp", "x.tar/u.png", "x.tar/u.jpg"}


def test_of_one_name_the_last_counts_as_where_a_tar_is_unpacked(tmp_path):
    packed(
        tmp_path / "x.tar",
        ("./p/y.jpg", picture(0)),
        ("p/y.txt", b"a cat"),
        ("p/y.jpg", picture(1)),
        ("p/./y.txt", b"a kitten"),
    )
    captions, left_out = read(tmp_path)
    assert captions == ["a kitten"]
    assert left_out.counts == {"duplicate": 1}
    assert left_out.others == {"captions": 1}
    with webdataset.hosts(WebdatasetConfig(path=str(tmp_path), max_bytes=10_000)) as hosts:
        (table,) = webdataset.tables(WebdatasetConfig(path=str(tmp_path), max_bytes=10_000), LeftOut())
        url = table["URL"][0].as_py().replace(webdataset.HOST, "{}:{}".format(*hosts[webdataset.HOST]))
        assert urllib.request.urlopen(url).read() == picture(1)


def test_a_tar_that_was_copied_gives_no_picture_twice(tmp_path):
    members = [("a.jpg", picture(0)), ("a.txt", b"a cat"), ("b.jpg", picture(1)), ("b.txt", b"a dog")]
    packed(tmp_path / "0.tar", *members)
    (tmp_path / "1.tar.gz").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    packed(tmp_path / "2.tar", ("c.jpg", picture(0)), ("c.txt", b"another caption"))
    captions, left_out = read(tmp_path)
    assert captions == ["a cat", "a dog", "another caption"]
    assert left_out.counts == {"duplicate": 2}
    assert left_out.examples(1) == ["1.tar.gz/a.jpg: another picture of the same bytes has the same caption"]


PACKERS = {
    "gzip": gzip.compress,
    "two members": lambda content: gzip.compress(content[:700]) + gzip.compress(content[700:]),
    "bzip2": bz2.compress,
    "xz": partial(lzma.compress, preset=0),
    "two streams": lambda content: lzma.compress(content[:700]) + bytes(8) + lzma.compress(content[700:]),
    "zstd": lambda content: arrow_packed(content, "zstd"),
    "lz4": lambda content: arrow_packed(content, "lz4"),
}


def arrow_packed(content, codec):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def plain_tar(tmp_path):
    pairs = [((f"{n}.jpg", picture(n)), (f"{n}.txt", f"number {n}".encode())) for n in range(20)]
    packed(
        tmp_path / "plain", *(member for pair in pairs for member in pair), ("21.jpg", "3.jpg"), ("21.txt", b"again")
    )
    content = (tmp_path / "plain").read_bytes()
    (tmp_path / "plain").unlink()
    return content


def fetched(path, urls):
    """What the source serves under its URLs."""
    with webdataset.hosts(WebdatasetConfig(path=str(path), max_bytes=10_000)) as hosts:
        host, port = hosts[webdataset.HOST]
        places = [url.replace(webdataset.HOST, f"{host}:{port}") for url in urls]
        return [urllib.request.urlopen(place).read() for place in places]


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar", "x.tar.zst", "x"])
def test_compressed_tars_are_read_whatever_their_name_is(tmp_path, packer, name):
    (tmp_path / name).write_bytes(PACKERS[packer](plain_tar(tmp_path)))
    left_out = LeftOut()
    path = tmp_path / name
    tables = webdataset.tables(WebdatasetConfig(path=str(path), max_bytes=10_000), left_out)
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["TEXT"].decode() for row in rows] == [*(f"number {n}" for n in range(20)), "again"]
    assert not left_out.counts
    bodies = fetched(path, [row["URL"] for row in reversed(rows)])
    assert bodies == [picture(3), *(picture(n) for n in reversed(range(20)))]


@pytest.mark.parametrize("packer", [name for name in PACKERS if not name.startswith("two")])
def test_of_a_compressed_tar_that_is_cut_short_the_beginning_is_read(tmp_path, packer):
    pairs = [((f"{n}.jpg", picture(n)), (f"{n}.txt", f"number {n}".encode())) for n in range(20)]
    rest = ("z.bin", random.Random(0).randbytes(2 << 20))
    packed(tmp_path / "plain", *(member for pair in pairs for member in pair), rest)
    content = PACKERS[packer]((tmp_path / "plain").read_bytes())
    (tmp_path / "plain").unlink()
    (tmp_path / "x.tar.gz").write_bytes(content[: -(len(content) // 3)])
    captions, left_out = read(tmp_path)
    assert captions == [f"number {n}" for n in range(20)]
    assert left_out.counts == {"damaged_tar": 1}


@pytest.mark.parametrize("packer", PACKERS)
def test_a_bomb_is_named_and_what_stands_beside_it_is_read(tmp_path, packer, monkeypatch):
    monkeypatch.setattr(compressed, "FREE", 1 << 20)
    monkeypatch.setattr(compressed, "RATIO", 2)
    packed(tmp_path / "plain", ("a.jpg", bytes(8 << 20)), ("a.txt", b"a bomb"))
    (tmp_path / "bomb.tgz").write_bytes(PACKERS[packer]((tmp_path / "plain").read_bytes()))
    (tmp_path / "plain").unlink()
    packed(tmp_path / "x.tar", ("a.jpg", picture(0)), ("a.txt", b"a cat"))
    captions, left_out = read(tmp_path)
    assert captions == ["a cat"]
    assert left_out.counts == {"compressed_tar": 1}


def test_an_xz_that_wants_much_memory_is_damaged(tmp_path):
    wide = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 29}]
    (tmp_path / "y.tar.xz").write_bytes(lzma.compress(plain_tar(tmp_path), filters=wide))
    packed(tmp_path / "x.tar", ("a.jpg", picture(0)), ("a.txt", b"a cat"))
    captions, left_out = read(tmp_path)
    assert captions == ["a cat"]
    assert left_out.counts == {"damaged_tar": 1}


@pytest.mark.parametrize("start", [b"7z\xbc\xaf", b"PK\x03\x04", b"\x1f\x9d"])
def test_what_is_not_unpacked_is_named(tmp_path, start):
    (tmp_path / "x.tar.Z").write_bytes(start + bytes(2000))
    with pytest.raises(DataError, match=r"data\.webdataset\.path: .*compressed_tar 1.*is not read; uncompress it"):
        read(tmp_path)


def test_captions_in_json_that_are_no_texts(tmp_path):
    texts = {"a": ["a cat", "a kitten"], "b": 3, "c": None, "d": {"en": "a dog"}, "e": "a fox"}
    pairs = [
        ((f"{name}.jpg", picture(shade)), (f"{name}.json", json.dumps({"caption": text}).encode()))
        for shade, (name, text) in enumerate(texts.items())
    ]
    packed(tmp_path / "x.tar", *(member for pair in pairs for member in pair))
    captions, left_out = read(tmp_path)
    assert captions == ["a cat", "a kitten", "a fox"]
    assert left_out.counts == {"no_text": 2, "no_caption": 1}


def test_a_json_that_is_none_is_told_as_such(tmp_path):
    whole = (("a.jpg", picture(1)), ("a.json", b'{"caption": "a cat'), ("a.txt", b"a cat"))
    packed(tmp_path / "x.tar", *whole, ("b.jpg", picture(2)), ("b.json", b'{"caption": "a dog'), ("c.jpg", picture(3)))
    captions, left_out = read(tmp_path)
    assert captions == ["a cat"]
    assert left_out.counts == {"no_text": 1, "no_caption": 1}
    assert "x.tar/b.json: it is no JSON object" in left_out.examples(1)[0]


def test_the_first_text_that_says_something_is_the_caption(tmp_path):
    texts = [("txt", b"\xef\xbb\xbfa cat"), ("json", b'{"caption": " ", "text": "a dog"}')]
    texts.append(("json", b'{"caption": NaN, "captions": ["a fox"], "license": ["cc0"]}'))
    members = [[(f"{n}.jpg", picture(n)), (f"{n}.{suffix}", text)] for n, (suffix, text) in enumerate(texts)]
    packed(tmp_path / "x.TAR", *(member for pair in members for member in pair))
    found, left_out = read(tmp_path)
    assert found == ["a cat", "a dog", "a fox"]
    assert not left_out.counts
