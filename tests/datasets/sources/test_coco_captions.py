"""COCO's annotations as others fill them in: captions that are no texts, pictures without a name."""

import json

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
