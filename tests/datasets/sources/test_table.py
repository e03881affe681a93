"""Every source from five rows in its published format to a batch; what is left out and why; what a stranger is told.

What lies on the web is asked for by its real host name, which a server on loopback answers.
"""

import json
from typing import Any, get_args

import numpy as np
import pytest
import yaml

from datasets.config import DataConfig
from datasets.files.inputs import Input
from datasets.left_out import LeftOut
from datasets.sources import loopback, table
from pipeline.settings import compose
from pipeline.steps import export
from pipeline.store import identity
from tests.datasets.sources.published import (
    CAPTIONS,
    COLOURS,
    CONF,
    NAMES,
    batch,
    coco,
    laion,
    narratives,
    own_folder,
    picture,
    planned,
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
