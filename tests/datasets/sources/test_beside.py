"""Which texts caption which pictures: a folder and a tar of the same files give the same rows, and lose the same."""

import io
import json
import random
import tarfile
import unicodedata

import pytest
from PIL import Image

from datasets.left_out import LeftOut
from datasets.source_settings import FolderConfig, WebdatasetConfig
from datasets.sources import beside, folder, webdataset
from datasets.sources.table import known_as

STEMS = ["a", "b.1", "sub/c", "sub/.hidden/d", ".e", "Mu\u0308ller", "f.jpg", "g.png"]
TEXTS = [b"a cat", b"a dog", b"\xef\xbb\xbfa fox", b" ", b"", b"\xff\xfe"]
ABOUT = {"url": "http://a.example/1.jpg", "license": "cc0", "AESTHETIC_SCORE": 5.5}
JSONS = [
    *(
        json.dumps(said).encode()
        for said in (
            {"caption": "a fish"},
            {"caption": " ", "text": ["a bird", "two birds", 3]},
            {"captions": 3},
            ABOUT,
            ["no object"],
            {"caption": "long " * 60_000},
        )
    ),
    *('{"caption": "ein B\u00e4r"}'.encode(encoding) for encoding in ("utf-8-sig", "utf-16", "cp1252")),
    b'{"caption": "cut',
]


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (9 + number, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def some_files(chance: random.Random) -> dict[str, bytes]:
    """Pictures and texts by names that are people's."""
    files = {}
    for stem in chance.sample(STEMS, 4):
        for suffix in chance.sample([".jpg", ".PNG", ".webp"], chance.randrange(3)):
            files[stem + suffix] = picture(len(files))
            if chance.random() < 0.3:
                files[f"{stem}{suffix}.txt"] = chance.choice(TEXTS)
        kinds = [".txt", ".cap", ".caption", ".text", ".json", ".TXT", ".md"]
        for suffix in chance.sample(kinds, chance.randrange(3)):
            files[stem + suffix] = chance.choice(JSONS if suffix == ".json" else TEXTS)
    return files


def read(source, config):
    """Rows by names in NFC, and counts by cause."""
    left_out = LeftOut()
    rows = [row for table in source.tables(config, left_out) for row in table.to_pylist()]
    for row in rows:
        row["URL"] = unicodedata.normalize("NFC", known_as(row["URL"])).removeprefix("x.tar/")
        row.update({name: row[name] or b"" for name in ("LICENSE", "ORIGINAL_URL")})
    return sorted(rows, key=lambda row: (row["URL"], row["TEXT"])), left_out.counts


@pytest.mark.parametrize("seed", range(40))
def test_a_tar_gives_what_a_folder_of_the_same_files_gives(tmp_path, seed):
    chance = random.Random(seed)
    files = {**some_files(chance), "z.png": picture(100), "z.txt": b"one that is whole"}
    for name, content in files.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in chance.sample(sorted(files), len(files)):
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            tar.addfile(member, io.BytesIO(files[name]))
    of_folder = read(folder, FolderConfig(path=str(tmp_path / "folder")))
    assert of_folder == read(webdataset, WebdatasetConfig(path=str(tmp_path / "x.tar"), max_bytes=10_000))


def test_a_text_called_as_the_picture_is_its_own_and_others_are_of_all_of_that_name():
    pictures = ["x.jpg", "x.png", "y.jpg", "y.jpg.png"]
    texts = ["x.caption", "x.txt", "x.png.txt", "x.json", "y.jpg.txt", "y.TXT", "z.txt"]
    assert beside.texts_of(pictures, texts) == {
        "x.jpg": ["x.txt", "x.caption", "x.json"],
        "x.png": ["x.png.txt", "x.txt", "x.caption", "x.json"],
        "y.jpg": ["y.jpg.txt", "y.TXT"],
    }


def test_a_json_beside_a_picture_tells_its_origin_and_licence(tmp_path):
    (tmp_path / "x.png").write_bytes(picture(1))
    (tmp_path / "x.txt").write_text("a cat")
    (tmp_path / "x.json").write_text(json.dumps(ABOUT))
    (tmp_path / "info.json").write_text("{}")
    rows, left_out = read(folder, FolderConfig(path=str(tmp_path)))
    assert [(row["TEXT"], row["ORIGINAL_URL"], row["LICENSE"], row["AESTHETIC_SCORE"]) for row in rows] == [
        (b"a cat", b"http://a.example/1.jpg", b"cc0", 5.5)
    ]
    assert not left_out


def test_json_tells_its_encoding_and_others_are_declared(tmp_path):
    for number, said in enumerate(JSONS[-4:-1]):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
        (tmp_path / f"{number}.json").write_bytes(said)
    rows, left_out = read(folder, FolderConfig(path=str(tmp_path)))
    assert ([row["URL"] for row in rows], left_out) == (["0.png", "1.png"], {"encoding": 1})
    rows, left_out = read(folder, FolderConfig(path=str(tmp_path), encoding="cp1252"))
    assert ([row["TEXT"].decode() for row in rows], left_out) == (3 * ["ein B\u00e4r"], {})
