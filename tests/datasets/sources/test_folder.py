"""The folder source: captions beside pictures or in a table, what is left out and why, and what is served."""

import json
import os
import unicodedata
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from PIL import Image

from datasets.config import DataConfig, DataError
from datasets.fetching.download import download_shard
from datasets.files import storage
from datasets.formats import shards
from datasets.left_out import LeftOut
from datasets.planning import plan, plan_files
from datasets.source_settings import FolderConfig
from datasets.sources import folder
from pipeline.errors import UsageError
from pipeline.settings import compose

CONF = Path(__file__).parents[3] / "conf" / "data"
ODD = ("a b.png", "Übung 100%.jpg", "sub/x#1?.png", "sub/y;z&=+~.jpeg", "sub/a..b/p.webp", "%41.png")


def picture(path: Path, size: tuple[int, int] = (160, 128), **options: Any) -> Path:
    """A picture of its own colours, made from its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(sum(path.name.encode()) * factor % 256 for factor in (1, 7, 31))
    Image.new("RGB", size, colour).save(path, **options)
    return path


def captioned(path: Path, caption: str = "", **options: Any) -> Path:
    picture(path, **options).with_suffix(".txt").write_text(caption or f"a picture, {path.name}")
    return path


def settings(path: Path, **changes: Any) -> DataConfig:
    """The committed source with a folder and pictures of 128 px."""
    tree = OmegaConf.create({"data": OmegaConf.load(CONF / "folder.yaml")})
    for key, value in {"folder.path": str(path), "image.size": 128, "shard_rows": 4, **changes}.items():
        OmegaConf.update(tree, f"data.{key}", value)
    return DataConfig.model_validate(OmegaConf.to_container(tree, resolve=True)["data"])


def read(path: Path, **changes: Any) -> tuple[dict[str, str], dict[str, int]]:
    """Captions by URL, and the counts of what is left out."""
    left_out = LeftOut()
    table = pa.concat_tables(folder.tables(FolderConfig(path=str(path), **changes), left_out))
    captions = [text.decode() for text in table["TEXT"].to_pylist()]
    return dict(zip(table["URL"].to_pylist(), captions, strict=True)), dict(left_out.counts)


def made(path: Path) -> tuple[pa.Table, plan.Counts]:
    """The plan's rows by URL, and its counts."""
    parts: list[pa.Table] = []
    counts = plan.make(settings(path), 0, parts.append)
    return pa.concat_tables(parts), counts


def download(path: Path, out: Path) -> list[shards.Receipt]:
    data = settings(path)
    assert data.folder is not None
    rows, _ = made(path)
    with folder.hosts(data.folder) as hosts:
        return [
            download_shard(
                rows,
                shard=shard,
                folder=str(out),
                image=data.image,
                download=data.download,
                hosts=hosts,
            )
            for shard, rows in plan_files.shards(plan_files.parquet_bytes(rows, data.shard_rows))
        ]


# -------------------------------------------------------------------------------------------------- captions


def test_captions_beside_pictures(tmp_path):
    captioned(tmp_path / "x.jpg", "a dog\non a sofa")
    (captioned(tmp_path / "sub" / "y.PNG").with_suffix(".txt")).write_bytes(b"\xef\xbb\xbfein B\xc3\xa4r")
    rows, _ = made(tmp_path)
    assert dict(zip(rows["url"].to_pylist(), rows["caption"].to_pylist(), strict=True)) == {
        "http://folder.invalid/sub/y.PNG": "ein Bär",
        "http://folder.invalid/x.jpg": "a dog on a sofa",
    }


def test_the_suffix_of_a_caption_may_be_in_capitals(tmp_path):
    for name in ("a.JPG", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "a.TXT").write_text("a cat")
    (tmp_path / "b.TXT").write_text("another dog")
    (tmp_path / "b.txt").write_text("a dog")
    (tmp_path / "lonely.Txt").write_text("nobody's")
    captions, rejected = read(tmp_path)
    assert sorted(captions.values()) == ["a cat", "a dog"]
    assert rejected == {"no_picture": 1}
    assert "a.TXT" in folder.content(str(tmp_path), "data.folder.path").files


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables_in_the_form_of_imagefolder(tmp_path, kind):
    rows = [("x.jpg", 'a "quoted", long caption'), ("deep/y.png", "zwei Bären"), ("x.jpg", "the same one again")]
    for name in ("train/x.jpg", "train/deep/y.png"):
        picture(tmp_path / name)
    (tmp_path / "train" / "x.txt").write_text("not this one: the table counts")
    table = tmp_path / "train" / f"metadata.{kind}"
    if kind == "csv":
        quoted = [f'{name},"{text.replace(chr(34), chr(34) * 2)}"\n' for name, text in rows]
        table.write_text("\ufefffile_name,text\n" + "".join(quoted))
    else:
        table.write_text("".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows))
    found, _ = made(tmp_path)
    assert sorted(found["caption"].to_pylist()) == sorted(text for _, text in rows)
    assert set(found["url"].to_pylist()) == {
        "http://folder.invalid/train/x.jpg",
        "http://folder.invalid/train/deep/y.png",
    }


def test_a_table_finds_names_in_another_unicode_form(tmp_path):
    picture(tmp_path / unicodedata.normalize("NFD", "Bär.png"))
    rows = f"{unicodedata.normalize('NFC', 'Bär.png')},a bear\nmetadata.csv,not a picture\n"
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{rows}")
    captions, rejected = read(tmp_path)
    assert captions == {"http://folder.invalid/B%C3%A4r.png": "a bear"}
    assert rejected == {"no_picture": 1}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "metadata.csv",
            "file,caption\nx.png,words\n",
            r"metadata\.csv is no table.*no column file_name, only file, caption",
        ),
        ("metadata.jsonl", '{"file_name": "x.png"}\n', r"metadata\.jsonl is no table.*no column text or caption"),
        ("metadata.jsonl", '{"file_name": \n', r"metadata\.jsonl is no table"),
        ("metadata.jsonl", '["x.png", "words"]\n', r"metadata\.jsonl is no table"),
        ("metadata.csv", b"file_name,text\nx.png,B\xe4r\n", r"metadata\.csv line 2: .* no text in utf-8; give data\.f"),
        ("metadata.csv", b"file_name,Wort f\xfcr Wort\nx.png,B\n", r"metadata\.csv is no table.*encoding, such as cp"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, name, content, told):
    picture(tmp_path / "x.png")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=told):
        read(tmp_path)


# -------------------------------------------------------------------------------------------------- left out


def test_what_is_left_out_is_counted_by_reason(tmp_path):
    captioned(tmp_path / "good.png", "a cat")
    (tmp_path / "copy.png").write_bytes((tmp_path / "good.png").read_bytes())
    (tmp_path / "copy.txt").write_text("a cat")
    (tmp_path / "other.png").write_bytes((tmp_path / "good.png").read_bytes())
    (tmp_path / "other.txt").write_text("the same cat in other words")
    picture(tmp_path / "bare.png")
    captioned(tmp_path / "empty.png").with_suffix(".txt").write_text(" \n")
    (tmp_path / "lonely.txt").write_text("a caption without its picture")
    for name, content in (("broken.jpg", b"\xff\xd8"), ("text.png", b"hello"), ("phone.heic", b"ftypheic")):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).with_suffix(".txt").write_text("a caption")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.pdf").write_bytes(b"")
    captions, rejected = read(tmp_path)
    assert sorted(captions.values()) == ["a cat", "the same cat in other words"]
    assert rejected == {"no_picture": 1, "no_caption": 2, "unreadable": 3, "duplicate": 1}
    _, counts = made(tmp_path)
    assert (counts.planned, counts.read) == (2, 9)


def test_sizes_come_from_the_header_seen_upright(tmp_path):
    captioned(tmp_path / "wide.jpg", size=(300, 200))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    captioned(tmp_path / "turned.jpg", size=(300, 200), exif=exif)
    captioned(tmp_path / "small.png", size=(300, 100))
    rows, counts = made(tmp_path)
    sizes = {row["url"].rpartition("/")[2]: (row["width"], row["height"]) for row in rows.to_pylist()}
    assert sizes == {"turned.jpg": (200, 300), "wide.jpg": (300, 200)}
    assert counts.rejected["min_side"] == 1


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, r"data\.folder\.path: .*cannot be read \(No such file"),
        (lambda path: path.write_text("x"), r"data\.folder\.path: .*cannot be read \(Not a directory"),
        (lambda path: path.mkdir(), r"data\.folder\.path: there are no pictures in"),
        (lambda path: picture(path / "x.png"), r"no picture.*\(no_caption 1\); the first: x.png: .*; put the caption"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, make, told):
    make(tmp_path / "mine")
    with pytest.raises(DataError, match=told):
        made(tmp_path / "mine")


def test_the_path_is_required_and_local(tmp_path):
    with pytest.raises(UsageError, match=r"data\.folder\.path: a value is needed"):
        compose.load("stage_c", ["data=folder"])
    with pytest.raises(DataError, match=r"data\.folder\.path: s3://mine is a URI; give a local folder"):
        folder.identity(FolderConfig(path="s3://mine"))


# ------------------------------------------------------------------------------------------------- the server


def test_names_of_all_kinds_come_through_the_download(tmp_path):
    for name in ODD:
        captioned(tmp_path / "mine" / name, lossless=True)
    receipts = download(tmp_path / "mine", tmp_path / "out")
    assert [receipt.dropped for receipt in receipts] == [{}, {}]
    rows = [row for n in range(2) for row in shards.read_images(storage.read(f"{tmp_path}/out/{n:05d}.tar"))]
    assert {row.caption for row in rows} == {f"a picture, {Path(name).name}" for name in ODD}
    for row in rows:
        source = next(tmp_path / "mine" / name for name in ODD if row.caption.endswith(f" {Path(name).name}"))
        with Image.open(source) as original:
            assert row.pixels()[64, 64].tolist() == list(original.convert("RGB").getpixel((80, 64)))


def test_keys_and_bytes_do_not_tell_where_the_folder_lies(tmp_path):
    contents = []
    for place in ("here", "there/deeper"):
        for name in ODD:
            captioned(tmp_path / place / name)
        receipts = download(tmp_path / place, tmp_path / "out" / place)
        contents.append([receipt.files for receipt in receipts])
    assert contents[0] == contents[1]
    index = pq.read_table(tmp_path / "out" / "here" / "00000.parquet")
    assert (
        index["key"].to_pylist()
        == pq.read_table(tmp_path / "out" / "there/deeper" / "00000.parquet")["key"].to_pylist()
    )


def test_nothing_outside_the_folder_is_ever_served(tmp_path):
    secret, mine = captioned(tmp_path / "secret.png", "a secret"), tmp_path / "mine"
    captioned(mine / "x.png", "a fox")
    (mine / "private.key").write_text("not a picture")
    (mine / ".hidden.png").write_bytes(secret.read_bytes())
    (mine / "link.png").symlink_to(secret)
    (mine / "folder").symlink_to(tmp_path, target_is_directory=True)
    (mine / "metadata.csv").write_text(
        "file_name,text\nx.png,a fox\n../secret.png,no\nlink.png,no\nfolder/secret.png,no\n"
    )
    captions, rejected = read(mine, follow_links=False)
    assert list(captions.values()) == ["a fox"]
    assert rejected == {"no_picture": 3, "link": 2}
    outside = ("../secret.png", "%2e%2e/secret.png", "..%2fsecret.png", "link.png", "folder/secret.png", str(secret))
    within = ("private.key", ".hidden.png", "x.txt", "metadata.csv", "", "x.png?", "x.png/")
    with folder.serve(str(mine), folder.KEY, follow=False) as (host, port):
        assert urllib.request.urlopen(f"http://{host}:{port}/x.png").read() == (mine / "x.png").read_bytes()
        for path in (*outside, *within):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"http://{host}:{port}/{path}")
        (mine / "x.png").unlink()
        (mine / "x.png").symlink_to(secret)  # after the listing
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://{host}:{port}/x.png")


def test_a_download_looks_at_its_own_pictures_and_lists_no_folder(tmp_path, monkeypatch):
    for number in range(8):
        captioned(tmp_path / "mine" / f"sub/{number}.png")
    looks: list[object] = []
    for name in ("walk", "scandir", "listdir"):
        monkeypatch.setattr(folder.os, name, lambda place, *_, **__: looks.append(place))
    with folder.serve(str(tmp_path / "mine"), folder.KEY) as (host, port):
        for number in range(8):
            urllib.request.urlopen(f"http://{host}:{port}/sub/{number}.png").read()
    assert looks == []


def test_a_name_that_came_from_a_mac_is_served_by_the_one_that_listing_gives(tmp_path):
    spelt = unicodedata.normalize("NFD", "Übung/Größe.png")
    made = captioned(tmp_path / spelt)
    (name,) = (url for url in read(tmp_path)[0])
    with folder.serve(str(tmp_path), folder.KEY) as (host, port):
        path = name.removeprefix(f"http://{folder.HOST}/")
        assert urllib.request.urlopen(f"http://{host}:{port}/{path}").read() == made.read_bytes()


def test_links_into_a_cache_are_followed_unless_one_asks_not_to(tmp_path):
    cache, mine = tmp_path / "blobs", tmp_path / "snapshot"
    picture(cache / "a.png").rename(cache / "c0ffee")  # as a hub's cache and DVC keep them
    (cache / "beef").write_text("a fox")
    captioned(cache / "more" / "y.png", "a dog")
    mine.mkdir()
    for name, target in (("x.png", "c0ffee"), ("x.txt", "beef"), ("more", "more"), ("gone.png", "nothing")):
        (mine / name).symlink_to(Path("..") / "blobs" / target)
    (mine / "round").symlink_to(mine, target_is_directory=True)
    assert read(mine)[0] == {"http://folder.invalid/x.png": "a fox", "http://folder.invalid/more/y.png": "a dog"}
    assert read(mine)[1] == {"link": 2}
    with folder.serve(str(mine), folder.KEY) as (host, port):
        assert urllib.request.urlopen(f"http://{host}:{port}/x.png").read() == (cache / "c0ffee").read_bytes()
    with folder.serve(str(mine), folder.KEY, follow=False) as (host, port):
        for name in ("x.png", "more/y.png"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"http://{host}:{port}/{name}")
    with pytest.raises(DataError, match="there are no pictures"):
        read(mine, follow_links=False)


# ----------------------------------------------------------------------------------------------- fingerprints


def test_the_content_of_the_folder_stands_in_the_fingerprint_and_its_place_does_not(tmp_path):
    def seen(path: Path) -> Any:
        words = ["data=folder", f"data.folder.path={path}", "scale=micro", "data.image.size=128"]
        return compose.load("stage_c", words).lookup("data.folder")

    captioned(tmp_path / "one" / "x.png", "a dog")
    captioned(tmp_path / "two" / "x.png", "a dog")
    (tmp_path / "two" / "notes.pdf").write_text("of no interest")
    before = seen(tmp_path / "one")
    assert seen(tmp_path / "two") == before
    (tmp_path / "two" / "x.txt").write_text("a cat")
    assert seen(tmp_path / "two") != before
    captioned(tmp_path / "one" / "y.png")
    assert seen(tmp_path / "one") != before
    os.remove(tmp_path / "one" / "y.png")
    os.remove(tmp_path / "one" / "y.txt")
    assert seen(tmp_path / "one") == before


# ----------------------------------------------------------------------------------------------- the pipeline


@pytest.mark.ray
def test_a_folder_walks_the_road_of_every_source_into_an_object_store(s3_root, tmp_path, pipeline, answer):
    for name in ODD:
        captioned(tmp_path / "mine" / name)
    picture(tmp_path / "mine" / "bare.png")
    words = (
        "conf=stage_c",
        "scale=micro",
        "data=folder",
        f"data.folder.path={tmp_path}/mine",
        "data.folder.licence=cc0-1.0",
        "data.folder.attribution='Photographs of my own'",
        "data.image.size=128",
        f"root={s3_root}",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
    )
    done = pipeline("run", *words, "--until", "download", "--json")
    assert json.loads(done.stdout)["outcome"] == "done"
    assert "left out: no_caption 1" in done.stderr
    again = answer("run", *words, "--until", "download", "--json")
    assert json.loads(again.stdout)["outcome"] == "nothing to do"
    manifest = json.loads(answer("show", *words, "artifact=metadata", "--json").stdout)
    assert manifest["rows"] == len(ODD)
    assert manifest["notes"]["licence"] == {"licence": "cc0-1.0", "attribution": "Photographs of my own"}
    assert json.loads(answer("show", *words, "artifact=images", "--json").stdout)["rows"] == len(ODD)


def test_of_two_spellings_of_a_name_one_is_used_and_the_other_named(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "Bär.png") for form in ("NFC", "NFD"))
    captioned(tmp_path / nfc, size=(8, 8))
    picture(tmp_path / nfd, size=(9, 9))
    left_out = LeftOut()
    (rows,) = folder.tables(FolderConfig(path=str(tmp_path)), left_out)
    assert rows["WIDTH"].to_pylist() == [8]
    assert left_out.counts == {"duplicate": 1}
    with folder.serve(str(tmp_path), "path") as address:
        url = f"http://{address[0]}:{address[1]}/{urllib.request.quote(nfc)}"
        assert urllib.request.urlopen(url).read() == (tmp_path / nfc).read_bytes()
