"""COCO's annotations as others fill them in: captions that are no texts, pictures without a name."""

import json
import unicodedata

import pytest
from PIL import Image

from datasets.config import DataError
from datasets.left_out import LeftOut
from datasets.source_settings import CocoCaptionsConfig
from datasets.sources import coco_captions


def test_captions_that_are_no_texts_and_pictures_without_a_name_are_counted(tmp_path):
    images = [{"id": n, "file_name": None, "coco_url": f"http://a/{n}.jpg"} for n in (1, 2)] + [{"id": 3}]
    texts = [(1, "a cat"), (1, 3), (1, None), (2, ["a dog", "a puppy"]), (3, "no picture"), (4, "not listed")]
    annotations = [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(texts)]
    (tmp_path / "x.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    left_out = LeftOut()
    config = CocoCaptionsConfig(annotations=str(tmp_path / "x.json"))
    found = [row["TEXT"] for table in coco_captions.tables(config, left_out) for row in table.to_pylist()]
    assert found == [b"a cat", b"a dog", b"a puppy"]
    assert left_out.counts == {"no_text": 1, "no_caption": 1, "no_picture": 2}
    assert left_out.examples(1)[0] == "x.json annotation 1: its caption is no text but int 3"


def read(folder, images, texts, pictures=None, **more):
    """The rows of a file of annotations, by their captions."""
    annotations = [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(texts)]
    content = {"images": images, "annotations": annotations, **more}
    (folder / "captions_x.json").write_text(json.dumps(content))
    left_out = LeftOut()
    config = CocoCaptionsConfig(annotations=str(folder), pictures=pictures and str(pictures))
    rows = [row for table in coco_captions.tables(config, left_out) for row in table.to_pylist()]
    return {row["TEXT"].decode(): row for row in rows}, left_out


def test_what_is_missing_of_a_licence_does_not_become_none(tmp_path):
    licences = [
        {"id": 1},
        {"id": 2, "name": "CC BY"},
        {"id": 3, "url": "http://l/"},
        {"id": 4, "name": ["CC"], "url": ""},
    ]
    images = [{"id": n, "coco_url": f"http://a/{n}.jpg", "license": n} for n in (1, 2, 3, 4)]
    found, _ = read(tmp_path, images, [(n, str(n)) for n in (1, 2, 3, 4)], licenses=licences)
    assert [found[str(n)]["LICENSE"] for n in (1, 2, 3, 4)] == [None, "CC BY", "http://l/", None]


def test_other_files_of_coco_may_lie_beside_those_of_captions(tmp_path):
    (tmp_path / "instances_x.json").write_text('{"images": [], "annotations": [{"image_id": 1}]}')
    found, left_out = read(tmp_path, [{"id": 1, "coco_url": "http://a/1.jpg"}], [(1, "a cat")])
    assert list(found) == ["a cat"]
    assert left_out.others == {".json": 1}


def test_a_local_picture_is_told_by_what_both_names_end_in(tmp_path):
    for name in ("train/1.png", "val/1.png", "val/2.png", "x/val/3.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "pictures" / name)
    names = {
        1: "1.png",
        2: "train/1.png",
        3: "2.png",
        4: "val/3.png",
        5: "elsewhere/2.png",
        6: None,
        7: "all/val/2.png",
    }
    images = [{"id": number, "file_name": name} for number, name in names.items()]
    found, left_out = read(tmp_path, images, [(n, str(n)) for n in names], tmp_path / "pictures")
    places = {text: row["URL"].decode().removeprefix("http://folder.invalid/") for text, row in found.items()}
    assert places == {"2": "train/1.png", "3": "val/2.png", "4": "x/val/3.png", "7": "val/2.png"}
    assert left_out.counts == {"no_picture": 3}  # one of two, one in another folder, one without a name


def test_json_of_another_kind_is_refused_in_words(tmp_path):
    (tmp_path / "captions_x.json").write_text("[]")
    with pytest.raises(DataError, match="no JSON of COCO captions \\(it is no object\\)"):
        list(coco_captions.tables(CocoCaptionsConfig(annotations=str(tmp_path)), LeftOut()))


def test_a_name_is_found_in_either_spelling_by_unicode_and_an_id_of_two_pictures_names_neither(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("café.png", "b.png", "c.png"):
        Image.new("L", (8, 8)).save(tmp_path / "pictures" / unicodedata.normalize("NFD", name))
    names = [(1, unicodedata.normalize("NFD", "café.png")), (2, "b.png"), (2, "c.png"), (3, "b.png"), (3, "b.png")]
    images = [{"id": number, "file_name": name, "license": place} for place, (number, name) in enumerate(names)]
    found, left_out = read(tmp_path, images, [(1, "one"), (2, "whose?"), (3, "three")], tmp_path / "pictures")
    assert set(found) == {"one", "three"}
    assert left_out.counts == {"duplicate": 1, "no_picture": 1}
