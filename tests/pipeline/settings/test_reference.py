"""docs/reference/config.md is what the typed config says, and whole."""

import re
from pathlib import Path

import pytest

from pipeline.settings import compose, reference
from pipeline.settings.keys import flatten
from tests.pipeline.settings.loading import load

PAGE = Path(__file__).parents[3] / "docs/reference/config.md"


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text()


def rows(page: str) -> dict[str, list[str]]:
    """The cells of each key's row: type, default, range, meaning."""
    cells = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in page.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): [cell.strip() for cell in row[1:]] for row in cells}


def test_the_page_is_made_from_the_typed_config(page):
    """If this fails: python -m pipeline config reference > docs/reference/config.md."""
    assert page == reference.markdown()


def test_all_links_lead_to_a_heading_of_the_page(page):
    headings = re.findall(r"^##? (.*)", page, re.MULTILINE)
    anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(set(anchors)) == len(anchors)
    links = set(re.findall(r"\]\(#(.*?)\)", page))
    assert links - set(anchors) == set()
    assert set(anchors) - links == {"every-key-of-the-config"}


@pytest.mark.parametrize(
    "words",
    [
        ("scale=paper", "data=laion_aesthetic", "data.metadata=x", "data.scorer={clip_weights: a, head_weights: b}"),
        ("scale=local", "data=openmoji", "eval=pickscore", "eval.scorers.pickscore=w", "eval.rivals.other=p"),
        ("data=coco_captions", "data.coco_captions.annotations=x", "eval=baseline"),
        ("eval=speed", "eval.distances={inception: i, alterations: {soft: {blur: 1}}, references: {held_out: d}}"),
        ("data=localized_narratives", "data.localized_narratives.annotations=x"),
        ("data=webdataset", "data.webdataset.path=x"),
        ("data=folder", "data.folder.path=x", "stage_c.train.ema={decay: 0.9, every: 1, start: 0}"),
    ],
)
def test_every_key_of_a_config_has_a_row(words, page):
    dump = compose.load("stage_c", list(words)).model_dump(mode="json")
    known = rows(page)
    for key, value in flatten(dump).items():
        holds_sections = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
        inside = [f"{key}.0.{name}" for name in value[0]] if holds_sections else []
        for name in (key, *inside):
            assert row_of(name) in known, name


def row_of(key: str) -> str:
    """The key as the page has it: names of one's own, and trainings together."""
    key = re.sub(r"^(text|data\.views|eval\.distances\.alterations)\.\w+", r"\1.NAME", key)
    named = r"rates|data\.localized_narratives\.images|eval\.prompts|eval\.rivals|eval\.distances\.references"
    key = re.sub(rf"^({named})\..*", r"\1", key)
    return re.sub(r"^.*\.(train\.)", r"\1", key)


def test_a_row_says_type_default_range_and_meaning(page):
    known = rows(page)
    assert known["cluster.stall_s"][:3] == ["number", "`600.0`", "1 to 604,800"]
    assert known["train.learning_rate"][:3] == ["number", "", "above 0 to 100"]
    assert known["data.holdout"][:3] == ["number", "`0.0`", "0 to below 1"]
    assert known["sample.width"][:3] == ["integer", "`1024`", "128 to 8,192, a multiple of 128"]
    assert known["stage_b.model.widths"][:3] == [
        "list of integers",
        "`[320, 640, 1280, 1280]`",
        "1 to 6 of them; 1 to 65,536",
    ]
    assert known["train.betas"][:3] == ["2 numbers", "`[0.9, 0.999]`", "0 to below 1"]
    assert known["train.micro_batch"][:3] == ["integer or null", "`null`", "1 to 1,000,000"]
    assert known["sample.sampler"][0] == "`ddpm` or `ddim`"
    assert known["train.phases"][0] == "list of [section](#trainphases0)"
    assert known["train.phases.0.steps"][3] == "Steps of the optimiser."
    assert known["text.NAME.width"][3] == "Channels of the hidden states."


def test_what_it_says_holds():
    """A value at each end of a range passes, and one beyond it does not: by the example of `cluster.stall_s`."""
    for value in (1, 604_800):
        assert load(f"cluster.stall_s={value}").cluster.stall_s == value
    for value in (0.999, 604_801):
        with pytest.raises(ValueError, match=r"cluster\.stall_s"):
            load(f"cluster.stall_s={value}")
