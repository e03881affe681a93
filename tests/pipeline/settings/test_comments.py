"""`config` shows a comment for every key, and it is the text under the key's field."""

import typing
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import given, settings
from pydantic import BaseModel, Field

from pipeline.settings.comments import WIDTH, commented_yaml
from pipeline.settings.config import Config
from settings import Settings
from tests.pipeline.plan.test_fingerprints import CONFS
from tests.pipeline.settings.loading import GROUPS, load

NAMES = {"rates", "images"}  # mappings by names, which the mapping's own comment explains


def kinds(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A kind of settings and all that it may hold."""
    yield kind
    for field in kind.model_fields.values():
        for part in parts(field.annotation):
            yield from kinds(part)


def parts(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from parts(part)


def keys_without_comment(text: str) -> list[str]:
    """Lines of a YAML text with a key that nothing explains: no comment behind it or above it.

    Of a list of sections the first one explains the others.
    """
    lines = text.splitlines()
    found = []

    def explained(line: int) -> bool:
        return "  # " in lines[line] or lines[max(line - 1, 0)].lstrip(" -").startswith("# ")

    def walk(node: yaml.Node) -> None:
        if isinstance(node, yaml.SequenceNode) and node.value:
            walk(node.value[0])
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if not explained(key.start_mark.line):
                    found.append(lines[key.start_mark.line].strip())
                if key.value not in NAMES:
                    walk(value)

    walk(yaml.compose(text))
    return found


def test_no_key_of_the_typed_config_lacks_a_docstring():
    assert [f"{kind.__name__}.{name}" for kind in kinds(Config) for name in undescribed(kind)] == []


def undescribed(kind: type[BaseModel]) -> list[str]:
    return [name for name, field in kind.model_fields.items() if not (field.description or "").strip()]


def test_a_key_without_a_docstring_is_noticed():
    class Bare(Settings):
        told: int
        """One."""
        untold: int

    class Holder(Settings):
        bare: dict[str, tuple[Bare, ...]] | None
        """Them."""

    assert [undescribed(kind) for kind in kinds(Holder)] == [[], ["untold"]]


@pytest.mark.parametrize("scale", GROUPS["scale"])
@pytest.mark.parametrize("conf", CONFS)  # the others only name targets, as `test_fingerprints` requires
def test_every_key_of_every_conf_at_every_scale_has_a_comment(conf, scale):
    config = load(conf=conf, scale=scale)
    text = commented_yaml(config)
    assert keys_without_comment(text) == []
    assert yaml.safe_load(text) == config.model_dump(mode="json")
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize(
    "words",
    [
        ("data=laion_aesthetic", "data.metadata=rows.parquet"),
        ("data=coco_captions", "data.coco_captions.annotations=captions.json"),
        ("data=localized_narratives", "data.localized_narratives.annotations=narratives.jsonl"),
        ("data=webdataset", "data.webdataset.path=s3://bucket/tars", "tracking=server", "cluster=slurm"),
        ("data=folder", "data.folder.path=pictures", "eval=baseline"),
        ("eval=pickscore", "eval.scorers.pickscore=w.safetensors", "eval.rivals.other=pictures"),
        ("eval=speed", "eval.distances={inception: i, alterations: {soft: {blur: 1}}, counts: [100]}"),
        ("data.views={fine: {min_aesthetic: 6}, all: {duplicates: drop}}", "sample.negative='# no \"comment\": {'"),
        ("data.scorer={clip_weights: a, head_weights: b}", "text.other={model: seeded}", "tracking.experiment='1'"),
    ],
)
def test_the_other_options_too_and_whatever_the_values_are(words):
    config = load(*words)
    text = commented_yaml(config)
    assert keys_without_comment(text) == []
    assert yaml.safe_load(text) == config.model_dump(mode="json")


class Anything(Settings):
    text: str
    """What is said."""
    rates: dict[str, float]
    """By name."""
    texts: tuple[str, ...]
    """All of them."""


@settings(derandomize=True, deadline=None, database=None)
@given(st.text(), st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)), st.lists(st.text()))
def test_whatever_a_text_holds_it_is_read_back(text, rates, texts):
    anything = Anything(text=text, rates=rates, texts=texts)
    assert yaml.safe_load(commented_yaml(anything)) == anything.model_dump(mode="json")


def test_a_key_without_a_comment_is_noticed():
    text = "a: 1  # one\nb:  # two\n  c: 2\n# three\nd: [3]\ne:  # four\n- f: 1  # five\n  g: 2\n- {f: 1, g: 2}\n"
    assert keys_without_comment(text) == ["c: 2", "g: 2"]


def test_the_comment_is_the_first_paragraph_of_the_docstring_behind_the_key_or_above_it():
    class Inner(Settings):
        """A part.

        Of which there is more to say.
        """

        size: int
        """Side, px; null: none.

        Which needs a longer explanation in the reference.
        """

    class Outer(Settings):
        name: str
        """What it is called, in a sentence that is too long to stand behind its key and its value on a line; what is
        longer than such a line is broken, and stands above the key."""
        parts: tuple[Inner, ...]
        """All of them."""
        named: dict[str, Inner] = Field(default_factory=dict)
        """By name."""

    outer = Outer(name="some name or other", parts=(Inner(size=1), Inner(size=2)), named={"one": Inner(size=3)})
    assert commented_yaml(outer).splitlines() == [
        "# What it is called, in a sentence that is too long to stand behind its key and its value on a line; what is "
        "longer than",
        "# such a line is broken, and stands above the key",
        "name: some name or other",
        "parts:  # All of them",
        "- size: 1  # Side, px; null: none",
        "- {size: 2}",
        "named:  # By name",
        "  one:  # A part",
        "    size: 3  # Side, px; null: none",
    ]
