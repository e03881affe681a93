"""Tars as people make them: names, links, suffixes, compression; each member used or named."""

import gzip
import io
import json
import tarfile

import pytest
from PIL import Image

from datasets.config import DataError, WebdatasetConfig
from datasets.left_out import LeftOut
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
    assert left_out.examples(1) == ["x.tar/a.seg: it has no caption"]
    assert left_out.others == {".cls": 1, "hidden": 1, "no suffix": 1}


def test_a_hard_link_is_the_member_that_it_names_and_no_other(tmp_path):
    members = [("a.jpg", picture(0)), ("a.txt", b"a cat"), ("b.jpg", "a.jpg"), ("b.txt", b"a kitten")]
    packed(tmp_path / "x.tar", *members, ("c.jpg", "/etc/passwd"), ("c.txt", b"a secret"))
    captions, left_out = read(tmp_path)
    assert captions == ["a cat", "a kitten"]
    assert left_out.counts == {"link": 1}
    with webdataset.hosts(WebdatasetConfig(path=str(tmp_path), max_bytes=10_000)) as hosts:
        assert list(hosts) == [webdataset.HOST]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar"])
def test_compressed_tars_are_named_with_what_to_do(tmp_path, name):
    packed(tmp_path / "plain", ("a.jpg", picture(0)), ("a.txt", b"a cat"))
    (tmp_path / name).write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    (tmp_path / "plain").unlink()
    with pytest.raises(DataError, match=r"data\.webdataset\.path: .*(uncompress)"):
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
