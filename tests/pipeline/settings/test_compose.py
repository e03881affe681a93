"""Whatever is set, a config comes out or one sentence that names the key: random values of every kind at every key."""

import copy
import itertools
import re
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from pipeline.errors import UsageError
from pipeline.plan.table import table
from pipeline.settings import compose
from pipeline.settings.config import Config
from tests import composing

SCHEMA = Config.model_json_schema()
BASES = [
    compose.compose("stage_c", ["scale=micro", *words])
    for words in (
        ("data.views={fine: {min_aesthetic: 6}}", "text.clip={model: ViT-H-14, weights: w.safetensors}"),
        ("data=coco_captions", "data.coco_captions.annotations=captions.json", "eval=baseline"),
        ("data=localized_narratives", "data.localized_narratives.annotations=narratives.jsonl"),
        ("data=webdataset", "data.webdataset.path=tars", "data.scorer={clip_weights: a, head_weights: b}"),
        ("data=folder", "data.folder.path=pictures", "compressor.model.backbone=efficientnet_v2_s"),
    )
]
ODD = [0, -1, 1e-9, 1e20, 10**400, float("nan"), float("inf"), "", "  ", "a\nb", "\x1b[2J", "ü" * 500, "auto", "0"]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(ODD),
    lambda inside: (
        st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inside, max_size=3)
    ),
    max_leaves=5,
)


def keys(schema: dict[str, Any], prefix: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every key of the config with its schema: `NAME` stands for names of one's own, 0 for an item of a list."""
    for name, field in schema["properties"].items():
        yield (*prefix, name), field
        yield from inside(field, (*prefix, name))


def inside(field: dict[str, Any], prefix: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if "$ref" in field:
        yield from keys(SCHEMA["$defs"][field["$ref"].rpartition("/")[2]], prefix)
    for part in (*field.get("anyOf", ()), *field.get("oneOf", ())):
        yield from inside(part, prefix)
    for name, part in (("NAME", field.get("additionalProperties")), (0, field.get("items"))):
        if isinstance(part, dict):
            yield (*prefix, name), part
            yield from inside(part, (*prefix, name))
    for part in field.get("patternProperties", {}).values():
        yield (*prefix, "NAME"), part
        yield from inside(part, (*prefix, "NAME"))


KEYS = list(keys(SCHEMA))


def fitting(field: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a field's own schema allows; what other fields have against them is another matter."""
    if "anyOf" in field:
        return st.one_of([fitting(part) for part in field["anyOf"]])
    if "enum" in field or "const" in field:
        return st.sampled_from(field.get("enum", [field.get("const")]))
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum", field.get("exclusiveMaximum"))
    match field.get("type"):
        case "integer":
            step = field.get("multipleOf", 1)
            near = st.integers(-(-low // step), min(high // step, low // step + 16))
            return (near | st.integers(-(-low // step), high // step)).map(lambda count: count * step)
        case "number":
            return st.floats(low, high) | st.floats(low, min(high, low + 1))
        case "boolean":
            return st.booleans()
        case "array":
            item = field["items"] if "items" in field else field["prefixItems"][0]
            return st.lists(fitting(item), min_size=field.get("minItems", 0), max_size=4)
        case "null":
            return st.none()
        case "string":
            return st.sampled_from(["tiny", "clip", "fine", "a.pt", "s3://bucket/prefix", "CTA"])
        case _:
            return anything


@st.composite
def overridden(draw: st.DrawFn) -> dict[str, Any]:
    """A composed tree in which some keys have other values."""
    tree = copy.deepcopy(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(1, 4))):
        path, field = draw(st.sampled_from(KEYS))
        put(tree, path, draw(anything if draw(st.integers(0, 3)) == 0 else fitting(field)))
    return tree


def put(tree: Any, path: tuple[str | int, ...], value: Any) -> None:
    """Set what lies at a path; sections that are not there are made, as an override makes them."""
    for here, below in itertools.pairwise(path):
        if here == "NAME":
            here = next(iter(tree), "fine")
        if isinstance(tree, list):
            tree += [{}] * (not tree)
        elif not isinstance(tree.get(here), list if below == 0 else dict):
            tree[here] = [] if below == 0 else {}
        tree = tree[here]
    if isinstance(tree, list):
        tree[:1] = [value]
    else:
        tree[path[-1]] = value


def test_every_key_is_tried():
    assert len(KEYS) > 300
    assert ("stage_c", "train", "phases", 0, "steps") in [path for path, _ in KEYS]
    assert ("text", "NAME", "weights") in [path for path, _ in KEYS]


@settings(max_examples=600, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(overridden())
def test_whatever_is_set_a_config_comes_out_or_a_sentence_that_names_the_key(tree):
    try:
        config = compose.check(tree)
    except UsageError as error:
        assert_sentence(str(error))
        return
    assert compose.check(config.model_dump(mode="json")) == config
    for step in table(config):
        assert config.worlds_of(step.name)[:1] == [config.ranks_of(step.name)]
        assert len(config.views_of(step.name)) <= len(config.data.views)


def test_odd_values_are_refused_in_a_sentence_at_every_key():
    odd = itertools.cycle([*ODD, None, True, [], {}, [[1]], {"a": 1}, {1: None}])
    for path, _ in KEYS:
        for value in itertools.islice(odd, 2):
            tree = copy.deepcopy(BASES[0])
            put(tree, path, copy.deepcopy(value))
            try:
                compose.check(tree)
            except UsageError as error:
                assert_sentence(str(error))


def assert_sentence(text: str) -> None:
    assert text.isprintable(), repr(text)
    assert len(text) < 1000
    assert re.match(r"\w+", text)[0] in Config.model_fields or "there is no such key" in text, text


@pytest.mark.parametrize("base", BASES)
def test_what_the_overrides_start_from_is_valid(base):
    assert compose.check(base)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["scale=micro", "seed=7", "stage_c.train.learning_rate=0.5"],
        ["data=folder", "data.folder.path=a b", "~eval.rivals", "data.views={fine: {min_aesthetic: 6}}"],
        ["scale=paper", "cluster=a100x64", "workers=64", "data.metadata=x"],
        ["stage_c.train=null", "stage_c.train.compile=true"],
        ["scale=nothing"],
        ["seed"],
        ["nobody.knows=1"],
    ],
)
def test_confs_that_tests_compose_once_are_those_that_hydra_composes(words, monkeypatch):
    def outcome() -> object:
        try:
            return compose.compose("stage_c", words)
        except UsageError as error:
            return str(error)

    once = [outcome(), outcome()]
    monkeypatch.setattr("hydra.compose", composing._compose)
    assert once == [outcome()] * 2
