"""COCO's and Localized Narratives' annotations as people have them: to rows, or told in a sentence."""

import json

import pytest
from pydantic import ValidationError

from datasets.config import DataError
from datasets.sources import table
from tests.datasets.sources.published import (
    CAPTIONS,
    NAMES,
    batch,
    coco,
    narratives,
    picture,
    planned,
    settings,
)

COCO_KEY, NARRATIVES_KEY = (
    r"data\.coco_captions\.annotations: .*x\.json",
    r"data\.localized_narratives\.annotations: .*",
)


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
