"""Tars from their members to a batch: what is read of them, trusted and served."""

import io
import json
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from datasets.config import DataError
from datasets.files import storage
from datasets.sources import table
from datasets.sources import webdataset as tars
from tests.datasets.sources.published import (
    CAPTIONS,
    Planned,
    batch,
    packed,
    picture,
    planned,
    sample,
    settings,
    webdataset,
)


def from_tar(folder: Path, *members: tuple[str, bytes], **changes: Any) -> Planned:
    packed(folder / "x.tar", list(members))
    return planned(settings("webdataset", webdataset__path=str(folder / "x.tar"), **changes))


def test_a_removal_list_names_the_pages_from_which_the_pictures_of_a_tar_came(tmp_path):
    (tmp_path / "removed.txt").write_text("HTTPS://example.org/3.jpg\n")
    rows, rejected = planned(webdataset(tmp_path, removed=str(tmp_path / "removed.txt")))
    assert rejected == {"removed": 1}
    assert set(rows["origin"].to_pylist()) == {f"https://example.org/{number}.jpg" for number in (0, 1, 2, 4)}


def test_captions_come_from_text_or_json_and_scores_from_json(tmp_path):
    members = [
        ("a.JPG", picture(0)),
        ("a.txt", b"from the text"),
        (
            "a.json",
            b'{"caption": "not this", "AESTHETIC_SCORE": 6.5, "pwatermark": "high", "similarity": 1'
            + b"0" * 400
            + b"}",
        ),
        ("b.png", picture(1, "PNG")),
        ("b.json", json.dumps({"TEXT": "aus dem Jäson", "punsafe": 0}).encode()),
        ("c.webp", picture(2, "WEBP")),
        ("c.txt", b"caption"),
        ("c.json", b"{broken"),
        ("c.cls", b"7"),
        ("d.jpeg", picture(3)),
        ("d.json", b'{"caption": "half a character \\ud800"}'),
        ("._c.jpg", b"of a Mac"),
    ]
    rows, rejected = from_tar(tmp_path, *members)
    found = {row["caption"]: (row["aesthetic"], row["punsafe"], row["pwatermark"]) for row in rows.to_pylist()}
    assert found == {
        "from the text": (6.5, None, None),
        "aus dem Jäson": (None, 0, None),
        "caption": (None,) * 3,
    }
    assert rejected == {"encoding": 1}


def test_what_a_tar_holds_is_never_trusted(tmp_path):
    good, deep = sample(0), b"[" * 100_000
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in [
            *good,
            *sample(1, "../../etc/passwd"),
            ("/abs.jpg", picture(2)),
            ("/abs.txt", b"an absolute name"),
            ("huge.jpg", bytes(30_000)),
            ("huge.txt", b"its caption"),
            ("long.jpg", picture(3)),
            ("long.txt", bytes(1 << 19)),
            ("text.png", b"<html>"),
            ("text.txt", b"a page"),
            ("bare.jpg", picture(3)),
            ("empty.jpg", picture(3)),
            ("empty.txt", b" \n"),
            ("lonely.txt", b"a caption"),
            ("copy.jpg", picture(0)),
            ("copy.txt", CAPTIONS[0].encode()),
            ("twice.jpg", picture(3)),
            ("twice.jpg", picture(4)),
            ("deep.jpg", picture(4)),
            ("deep.json", deep),
        ]:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
        for kind, name in (
            (tarfile.SYMTYPE, "soft.jpg"),
            (tarfile.LNKTYPE, "hard.png"),
            (tarfile.FIFOTYPE, "pipe.txt"),
        ):
            about = tarfile.TarInfo(name)
            about.type, about.linkname = kind, "/etc/passwd"
            tar.addfile(about)
    data = settings("webdataset", webdataset__path=str(tmp_path / "x.tar"), webdataset__max_bytes=20_000)
    rows, rejected = planned(data)
    assert set(rows["caption"].to_pylist()) == {CAPTIONS[0], CAPTIONS[1], "an absolute name"}
    assert rejected == {
        "too_big": 2,
        "unreadable": 1,
        "no_caption": 3,
        "no_text": 1,
        "no_picture": 2,
        "duplicate": 2,
        "link": 2,
    }
    assert len(batch(data, rows, tmp_path / "out", {})) == 3


def damaged(content: bytes, how: str) -> bytes:
    """A tar of three samples, spoilt after its first one, or all of it."""
    header = content.index(b"000000001.jpg")
    match how:
        case "cut in a picture":
            return content[: header + 600]
        case "cut in a header":
            return content[: header + 100]
        case "cut between members":
            return content[:header]
        case "a header of noise":
            return content[:header] + bytes(range(256)) * 2 + content[header + 512 :]
        case "a length beyond the end":
            about = tarfile.TarInfo("000000001.jpg")
            about.size = 1 << 40
            return content[:header] + about.tobuf() + content[header + 512 :]
        case "a negative length":
            about = tarfile.TarInfo("000000001.cls")
            about.size = -512  # back to this header
            return content[:header] + about.tobuf(tarfile.GNU_FORMAT) + content[header + 512 :]
        case "a header beyond memory":
            about = tarfile.TarInfo("x")
            about.type, about.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
            return content[:header] + about.tobuf(tarfile.GNU_FORMAT) + content[header + 512 :]
        case _:
            return {"empty": b"", "text": b"not a tar at all " * 100, "zeros": bytes(10240)}[how]


@pytest.mark.parametrize(
    ("how", "more"),
    [
        ("cut in a picture", {}),
        ("cut in a header", {}),
        ("cut between members", {}),
        ("a header of noise", {}),
        ("a length beyond the end", {"too_big": 1}),
        ("a negative length", {}),
        ("a header beyond memory", {}),
    ],
)
def test_a_damaged_tar_gives_what_comes_before_the_damage_and_is_counted(tmp_path, how, more):
    path = packed(tmp_path / "x.tar", [*sample(0), *sample(1), *sample(2)])
    path.write_bytes(damaged(path.read_bytes(), how))
    rows, rejected = planned(settings("webdataset", webdataset__path=str(tmp_path)))
    assert rows["caption"].to_pylist() == [CAPTIONS[0]]
    assert rejected == {"damaged_tar": 1, **more}


@pytest.mark.parametrize(
    ("how", "told"), [("empty", "damaged_tar 1"), ("text", "damaged_tar 1"), ("zeros", "they are")]
)
def test_tars_without_a_picture_are_refused(tmp_path, how, told):
    (tmp_path / "x.tar").write_bytes(damaged(packed(tmp_path / "y", sample(1)).read_bytes(), how))
    with pytest.raises(DataError, match=rf"data\.webdataset\.path: no picture of the tars at .* \({told}"):
        planned(settings("webdataset", webdataset__path=str(tmp_path)))
    with pytest.raises(DataError, match=r"data\.webdataset\.path: there is no \.tar file at .*/none"):
        planned(settings("webdataset", webdataset__path=str(tmp_path / "none")))


def test_only_planned_pictures_of_unchanged_tars_are_served(tmp_path):
    data = webdataset(tmp_path)
    packed(tmp_path / "secret.tar", sample(4))
    urls = [url.removeprefix(f"http://{tars.HOST}/") for url in planned(data).rows["url"].to_pylist()]
    first = next(url for url in urls if "member=000000000.jpg" in url)

    def status(address: tuple[str, int], path: str) -> int:
        try:
            return int(urllib.request.urlopen(f"http://{address[0]}:{address[1]}/{path}").status)
        except urllib.error.HTTPError as error:
            return error.code

    with table.hosts(data) as hosts:
        address = hosts[tars.HOST]
        assert [status(address, url) for url in urls] == [200] * 5
        for wrong in (
            "",
            "00000.tar",
            first.replace("00000.tar", "../secret.tar"),
            first.replace("offset=512", "offset=1024"),
            first.replace("offset=512", "offset=-1"),
            first.replace("&size=", "&size=9999999999"),
            first.partition("&sha256")[0],
        ):
            assert wrong != first
            assert status(address, wrong) == 404
        content = (tmp_path / "in" / "00000.tar").read_bytes()
        (tmp_path / "in" / "00000.tar").write_bytes(content.replace(picture(0), picture(0)[::-1]))
        assert status(address, first) == 404


def test_tars_on_an_object_store_are_read_in_place(tmp_path):
    for name, content in (("00000.tar", [*sample(0), *sample(1)]), ("sub/00001.tar", sample(2))):
        packed(tmp_path / "x.tar", content)
        storage.publish((tmp_path / "x.tar").read_bytes(), f"memory://tars-{tmp_path.name}/{name}")
    data = settings("webdataset", webdataset__path=f"memory://tars-{tmp_path.name}")
    rows = planned(data).rows
    assert batch(data, rows, tmp_path / "out", {}).keys() == set(CAPTIONS[:3])
