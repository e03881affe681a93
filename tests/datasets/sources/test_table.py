"""Every source from five rows in its published format to a batch; what is left out and why; what a stranger is told.

What lies on the web is asked for by its real host name, which a server on loopback answers.
"""

import io
import json
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from datasets.config import DataConfig, DataError
from datasets.files import storage
from datasets.files.inputs import Input
from datasets.left_out import LeftOut
from datasets.sources import loopback, table
from datasets.sources import webdataset as tars
from pipeline.settings import compose
from pipeline.steps import export
from pipeline.store import identity
from tests.datasets.sources.published import (
    CAPTIONS,
    COLOURS,
    CONF,
    NAMES,
    Planned,
    batch,
    coco,
    laion,
    narratives,
    own_folder,
    packed,
    picture,
    planned,
    sample,
    settings,
    webdataset,
)

# ------------------------------------------------------------------------------- five rows in published formats


@pytest.mark.parametrize("make", [laion, coco, narratives, webdataset, own_folder])
def test_five_rows_in_the_published_format_come_to_a_batch(tmp_path, make):
    data = make(tmp_path)
    rows, rejected = planned(data)
    assert rejected == {}
    contents = {f"{name}.jpg": picture(number) for number, name in enumerate(NAMES)}
    with loopback.serve(contents.get) as address:
        found = batch(data, rows, tmp_path / "out", {"images.cocodataset.org": address})
    assert found.keys() == set(CAPTIONS)
    for caption, colour in zip(CAPTIONS, COLOURS, strict=True):
        assert np.abs(np.subtract(found[caption], colour)).max() <= 12  # JPEG, twice


def test_every_source_is_a_choice_of_the_config_with_settings_and_a_conf_of_its_own():
    names = set(get_args(DataConfig.model_fields["source"].annotation))
    confs = {path.stem: yaml.safe_load(path.read_text()) for path in CONF.glob("*.yaml")}
    based = {name for name, conf in confs.items() if conf.get("defaults")}  # on another one's source
    assert names == {*table.SOURCES, "laion_aesthetic", "mixture"} == confs.keys() - based
    assert based == {"compositions"}
    assert set(table.SOURCES) < set(DataConfig.model_fields)


# ------------------------------------------------------------------------------------- licences and identities


def test_the_licence_of_each_picture_stands_in_its_row(tmp_path):
    by, non_commercial = (
        "Attribution License (http://creativecommons.org/licenses/by/2.0/)",
        "Attribution-NonCommercial (http://creativecommons.org/licenses/by-nc/2.0/)",
    )
    rows = planned(coco(tmp_path)).rows
    found = dict(zip(rows["caption"].to_pylist(), rows["licence"].to_pylist(), strict=True))
    assert [found[caption] for caption in CAPTIONS] == [non_commercial, by, by, by, by]
    assert sorted(str(licence) for licence in planned(laion(tmp_path)).rows["licence"].to_pylist()) == [
        "?",
        "None",
        "cc-by-4.0",
        "cc0-1.0",
        "cc0-1.0",
    ]
    assert set(planned(webdataset(tmp_path)).rows["licence"].to_pylist()) == {None, "cc0-1.0"}


def test_the_card_tells_licences_and_opt_outs():
    notes = {
        "source": "coco_captions",
        "licence": table.SOURCES["coco_captions"].licence(None),
        "licences": {"Attribution License": 1200, "not stated": 34},
        "opt_outs": {"x_robots_tag": ["noai", "noindex"], "removal_list": "removed.txt", "removed": 12},
    }
    found = export.terms({"rows": 1234, "notes": notes})
    assert found["identifier"] == "other"
    for said in (
        "1,234 pictures planned of the source coco_captions. Captions by the COCO Consortium, CC BY 4.0",
        "Pictures by the licence that the source names: Attribution License: 1,200, not stated: 34.",
        "forbids (X-Robots-Tag: noai, noindex; TDM-Reservation: 1), and 12 rows on a removal list.",
    ):
        assert said in found["notice"]


@pytest.mark.parametrize("make", [coco, narratives, webdataset])
def test_moved_files_are_the_same_and_other_files_are_not(tmp_path, monkeypatch, make):
    def seen(place: str) -> dict[str, Any]:
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        return identified(make(tmp_path / place))

    before = seen("here")
    assert seen("there/deeper") == before
    assert str(tmp_path) not in json.dumps(before)
    other = [CAPTIONS[0].upper(), *CAPTIONS[1:]]  # names and sizes stay the same
    monkeypatch.setitem(make.__globals__, "CAPTIONS", other)
    assert seen("here") != before


def identified(data: DataConfig) -> dict[str, Any]:
    """A source's settings as fingerprints have them."""
    found = table.identity(data.parts[0])
    return {key: identity.of(value) if isinstance(value, Input) else value for key, value in found.items()}


def test_the_fingerprint_holds_the_settings_of_the_chosen_source(tmp_path):
    path = str(webdataset(tmp_path).webdataset.path)
    config = compose.load("stage_c", ["scale=micro", "data=webdataset", f"data.webdataset.path={path}"])
    assert config.lookup("data.webdataset")["licence"] is None
    other = ["data.webdataset.licence=cc0-1.0"]
    licensed = compose.load("stage_c", ["scale=micro", "data=webdataset", f"data.webdataset.path={path}", *other])
    assert licensed.lookup("data.webdataset") != config.lookup("data.webdataset")


# ------------------------------------------------------------------------------------------ annotation files


def test_a_picture_with_several_captions_has_one_of_them_or_all(tmp_path):
    data = coco(tmp_path)
    path = tmp_path / "captions_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"] += [{"image_id": 139, "id": 9, "caption": "the same bear in other words"}]
    content["annotations"] += [{"image_id": 1, "id": 10, "caption": "a picture that is not listed"}]
    content["images"].append(content["images"][0] | {"id": 2})
    path.write_text(json.dumps(content))
    rows, rejected = planned(data)
    assert (rows.num_rows, rejected) == (5, {"max_same_url": 1, "no_picture": 1, "no_caption": 1})
    every = settings("coco_captions", coco_captions__annotations=str(path), filters__max_same_url=None)
    assert planned(every).rows.num_rows == 6


def test_flickrs_urls_are_a_choice(tmp_path):
    urls = planned(coco(tmp_path, coco_captions__url="flickr_url")).rows["url"].to_pylist()
    assert all(url.startswith("http://farm.invalid/") for url in urls)


@pytest.mark.parametrize("make", [coco, narratives])
def test_pictures_that_lie_in_a_local_folder_are_served_from_there(tmp_path, make):
    (tmp_path / "pictures" / "val2017").mkdir(parents=True)
    for number, name in list(enumerate(NAMES))[:4]:
        (tmp_path / "pictures" / "val2017" / f"{name}.jpg").write_bytes(picture(number))
    section = "coco_captions" if make is coco else "localized_narratives"
    changes = {f"{section}__pictures": str(tmp_path / "pictures")}
    if make is narratives:
        changes["localized_narratives__images__mscoco_val2017"] = "val2017/{image_id:0>12}.jpg"
    data = make(tmp_path, **changes)
    rows, rejected = planned(data)
    assert rejected == {"no_picture": 1}
    assert set(rows["width"].to_pylist()) == {48.0}
    first = "http://images.cocodataset.org/000000000139.jpg" if make is coco else None
    assert first in rows["origin"].to_pylist()
    assert batch(data, rows, tmp_path / "out", {}).keys() == set(CAPTIONS[:4])


def test_narratives_of_a_dataset_without_a_template_are_counted(tmp_path):
    data = narratives(tmp_path)
    with (tmp_path / "coco_val.jsonl").open("a") as file:
        file.write('\n{"dataset_id": "ADE20k_train", "image_id": "ADE_train_1", "caption": "a street"}\n')
    assert planned(data).rejected == {"no_template": 1}


def test_a_broken_line_of_narratives_is_a_row_that_is_lost(tmp_path):
    data = narratives(tmp_path)
    with (tmp_path / "coco_val.jsonl").open("ab") as file:
        file.write(b'{"dataset_id": "mscoco_val2017", \n\xff\xfe\n[]\n{"image_id": "1", "caption": "x"}\n')
        file.write(b'{"dataset_id": "mscoco_val2017", "image_id": "1"}\n')
        file.write(b'{"dataset_id": "mscoco_val2017", "image_id": null, "caption": "of none"}\n')
        file.write(b'{"dataset_id": ["mscoco_val2017"], "image_id": 1, "caption": "of which"}\n')
    assert planned(data).rejected == {"no_row": 6, "no_caption": 1}


def test_what_is_no_annotation_or_image_of_coco_is_a_row_that_is_lost(tmp_path):
    data = coco(tmp_path)
    path = tmp_path / "captions_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"] += [3, {"caption": "of nothing"}, {"image_id": [1], "caption": "x"}, {"image_id": 139}]
    content["images"] += [None, {"file_name": "x.jpg"}]
    content["licenses"] += [{"name": "without a number"}]
    path.write_text(json.dumps(content))
    assert planned(data).rejected == {"no_row": 5, "no_caption": 1}


COCO_KEY, NARRATIVES_KEY = (
    r"data\.coco_captions\.annotations: .*x\.json",
    r"data\.localized_narratives\.annotations: .*",
)


@pytest.mark.parametrize(
    ("source", "file", "content", "told"),
    [
        ("coco_captions", "x.json", "", COCO_KEY + " is empty; give captions_"),
        ("coco_captions", "x.json", '{"images": [' + "1," * 1000, COCO_KEY + ".* cut short; give .* or fetch it again"),
        ("coco_captions", "x.json", "[1]", COCO_KEY + " is no JSON object"),
        ("localized_narratives", "x.jsonl", "", NARRATIVES_KEY + r"there is no narrative in .*x\.jsonl; give"),
        (
            "localized_narratives",
            "x.jsonl",
            "<html>",
            NARRATIVES_KEY + r".*x\.jsonl line 1: it is no narrative",
        ),
    ],
)
def test_annotations_broken_at_an_end_have_no_identity(tmp_path, source, file, content, told):
    """So that a plan refuses them, before a run creates anything."""
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=told):
        table.identity(settings(source, **{f"{source}__annotations": str(tmp_path / file)}).parts[0])


@pytest.mark.parametrize(
    ("source", "file", "content", "told"),
    [
        ("coco_captions", "x.json", "", COCO_KEY + " is no JSON of COCO captions"),
        ("coco_captions", "x.json", "[1]", COCO_KEY + " is no JSON of COCO captions"),
        ("coco_captions", "x.json", '{"images": []}', COCO_KEY + ".*no 'annotations'"),
        ("coco_captions", "x.json", '{"images": [], "annotations": []}', COCO_KEY + " holds no caption"),
        (
            "coco_captions",
            "x.json",
            '{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}',
            COCO_KEY + " holds no caption",
        ),
        ("coco_captions", "x.txt", "", r"x\.txt is (no JSON|empty).*; give captions_"),
        ("localized_narratives", "x.jsonl", "\n", NARRATIVES_KEY + r"there is no narrative in .*x\.jsonl; give"),
        ("localized_narratives", "x.jsonl", '\n{"image_id": "1"}\n', NARRATIVES_KEY + ".*line 2: .*no 'dataset_id'"),
        ("localized_narratives", "x.jsonl", "{\n", NARRATIVES_KEY + ".*line 1: it is no narrative"),
        ("localized_narratives", "x.jsonl", "[1]\n", NARRATIVES_KEY + ".*line 1: it is no narrative"),
        (
            "localized_narratives",
            "x.jsonl",
            '{"dataset_id": "mine", "image_id": "1", "caption": "x"}',
            r"data\.localized_narratives\.images: .*no_template 1\); their dataset_id mine has no template",
        ),
        ("localized_narratives", "x.txt", "", r"there is no narrative in .*x\.txt"),
    ],
)
def test_annotations_that_cannot_be_used_are_refused_in_a_sentence(tmp_path, source, file, content, told):
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=told) as caught:
        planned(settings(source, **{f"{source}__annotations": str(tmp_path / file)}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", ["https://x.invalid/a.jpg", "{image}.jpg", "{image_id", "{0}.jpg", "{image_id.x}"])
def test_a_template_must_hold_the_image_id(template):
    with pytest.raises(ValidationError, match=r"the template of mine is .* it must hold \{image_id\}"):
        settings(
            "localized_narratives", localized_narratives__annotations="x", localized_narratives__images__mine=template
        )


# ------------------------------------------------------------------------------------------------------- tars


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


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("http://folder.invalid/my%20cats/%C3%BC.jpg", "my cats/\u00fc.jpg"),
        ("http://mine.folder.invalid/x.jpg", "x.jpg"),
        ("http://webdataset.invalid/x.tar?member=a%2F%C3%BC.jpg&offset=512&size=3&sha256=0", "x.tar/a/\u00fc.jpg"),
        ("http://openmoji.invalid/red heart.png", "red heart.png"),
        ("http://folder.invalid/B%E4r.jpg", "B\ufffdr.jpg"),
        ("https://example.org/x.jpg?member=y", "https://example.org/x.jpg?member=y"),
        ("https://folder.invalid.example.org/x.jpg", "https://folder.invalid.example.org/x.jpg"),
        ("http://[", "http://["),
        ("metadata.csv line 3", "metadata.csv line 3"),
    ],
)
def test_a_picture_is_called_as_a_person_knows_it(place, name):
    assert table.known_as(place) == name
    left_out = LeftOut(known_as=table.known_as)
    left_out.add("min_side", place, "it is small")
    assert left_out.examples(1) == [f"{name}: it is small"]
    assert left_out.rows("folder") == [("folder", place, "min_side", "it is small")]
