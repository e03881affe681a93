"""Tars that strangers have made to do harm, through both readers: ours refuses them, the source leaves them out."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datasets.files.storage import CorruptFile
from datasets.formats import shards
from datasets.left_out import LeftOut
from datasets.source_settings import WebdatasetConfig
from datasets.sources import webdataset

KEY = "0" * 32
BLOCK = tarfile.BLOCKSIZE


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), shade).save(buffer, "PNG")
    return buffer.getvalue()


class Payload:
    """Once unpickled, it has written to a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (self.canary, "unpickled"))


def member(name: str, content: bytes = b"", /, **about: Any) -> bytes:
    """A header and its content, whatever the header says of it."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in about.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % BLOCK)


def with_pax(name: str, content: bytes, **records: str) -> bytes:
    """A member whose extended header says something else than its own."""
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = len(content), records
    return info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % BLOCK)


def spoilt(name: str, fields: dict[int, bytes], **about: Any) -> bytes:
    """A header with other bytes at some places, and the right checksum."""
    header = bytearray(member(name, b"x", **about)[:BLOCK])
    for place, value in fields.items():
        header[place : place + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + b"x".ljust(BLOCK, b"\0")


def sample(name: str, shade: int) -> bytes:
    about = json.dumps({"row": shade, "url": "http://x.invalid/", "caption": f"shade {shade}"}).encode()
    return member(f"{name}.png", picture(shade)) + member(f"{name}.json", about)


def cases(canary: Path) -> dict[str, bytes]:
    """What lies between two good samples; each names the canary, or a picture of its own."""
    place, harm, mine = str(canary), pickle.dumps(Payload(canary)), "9" * 32
    link = {"linkname": place}
    return {
        "climbs": member(f"../../../../../..{place}", b"x"),
        "climbs in the middle": member(f"a/../../../../../..{place}", b"x"),
        "climbs with backslashes": member(f"..\\..\\{canary.name}", b"x"),
        "is absolute": member(place, b"x"),
        "is absolute by its extended header": with_pax(f"{mine}.png", b"x", path=place),
        "is a symlink": member(f"{mine}.png", type=tarfile.SYMTYPE, **link),
        "goes through a symlink": member("way", type=tarfile.SYMTYPE, linkname=str(canary.parent))
        + member(f"way/{canary.name}", b"x"),
        "is a hard link": member(f"{mine}.png", type=tarfile.LNKTYPE, **link),
        "is a character device": member(f"{mine}.png", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        "is a block device": member(f"{mine}.png", type=tarfile.BLKTYPE, devmajor=7),
        "is a pipe": member(f"{mine}.png", type=tarfile.FIFOTYPE),
        "is a folder": member(f"{mine}.png", type=tarfile.DIRTYPE),
        "is of no known type": member(f"{mine}.png", type=b"Z", linkname=place),
        "is sparse": member(f"{mine}.png", type=tarfile.GNUTYPE_SPARSE),
        "grows": spoilt(
            f"{mine}.png",
            {386: b"0\0", 398: b"1\0", 483: b"4000000\0"},
            type=tarfile.GNUTYPE_SPARSE,
        )
        + sample(mine, 3)[2 * BLOCK :],
        "is sparse by its extended header": with_pax(
            f"{mine}.png",
            b"1\n0\n1\n",
            **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"},
        ),
        "is huge": member(f"{mine}.png", size=1 << 50),
        "is huge by its extended header": with_pax(f"{mine}.png", b"x", size=str(1 << 50)),
        "is negative": member(f"{mine}.cls", size=-BLOCK),
        "has a size of letters": spoilt(f"{mine}.png", {124: b"many"}),
        "has a long name": member(f"{'x' * 5000}/{mine}.png", b"x"),
        "has a long name beyond memory": member("x", type=tarfile.GNUTYPE_LONGNAME, size=1 << 33),
        "has a NUL in its name": spoilt("x", {0: mine.encode() + b"\0.png"}),
        "has a line break in its name": member(f"{mine}\n.png", b"x"),
        "has no name": member("", b"x"),
        "has no caption": member(f"{mine}.png", picture(6)),
        "has no picture": member(f"{mine}.json", b'{"row": 1, "url": "", "caption": "c"}'),
        "has a picture twice": member(f"{mine}.png", picture(7)) + member(f"{mine}.png", picture(8)),
        "comes again later": member(f"{KEY}.png", picture(9)),
        "is a library": member(f"{mine}.pyd", harm),
        "is a pickle": member(f"{mine}.pickle", harm) + member(f"{mine}.pkl", harm),
        "is a checkpoint": member(f"{mine}.pth", harm) + member(f"{mine}.pt", harm),
        "is a program": member(f"{mine}.sh", b"touch " + place.encode(), mode=0o7777),
        "is another tar": member(f"{mine}.tar", sample(mine, 5)),
        "is noise": bytes(range(256)) * 2,
    }


NAMES = list(cases(Path("/x")))


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "canary"


def packed(name: str, canary: Path) -> bytes:
    return sample(KEY, 0) + cases(canary)[name] + sample("f" * 32, 15) + bytes(2 * BLOCK)


@pytest.mark.parametrize("name", NAMES)
def test_our_reader_refuses_it(canary, name):
    good = sample(KEY, 0) + sample("f" * 32, 15) + bytes(2 * BLOCK)
    assert [row.caption for row in shards.read_images(good)] == ["shade 0", "shade 15"]
    with pytest.raises(CorruptFile):
        shards.read_images(packed(name, canary))
    assert not canary.exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_source_takes_the_good_ones_alone(canary, name):
    Path("x.tar").write_bytes(packed(name, canary))
    left_out = LeftOut()
    tables = list(webdataset.tables(WebdatasetConfig(path="x.tar", max_bytes=10_000), left_out))
    found = [caption.decode() for table in tables for caption in table["TEXT"].to_pylist()]
    lost = left_out.counts["damaged_tar"]  # the rest of it, from there on
    assert found == ["shade 0", "shade 15"][: 1 if lost else 2] or name == "comes again later"
    assert not canary.exists()
    assert [path.name for path in Path().iterdir()] == ["x.tar"]
