"""Every key of the config, one after the other: another value enters fingerprints, or the key is marked as a manner."""

from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.settings import compose
from pipeline.settings.config import Config
from settings import MANNER

# Sections that say where and how a run is done, and what of it is wanted: no step reads them.
HOW = ("targets", "workers", "cluster", "tracking", "data.download", "data.source")
ALL = ["previewer", "baseline_samples", "release", "stage_b", "latents_a"]
WORDS = ["scale=micro", "data.holdout=0.2", "eval=baseline", "data.views={fine: {min_side: 64}}"]
WORDS += ["eval.distances.inception=w.pth", "eval.speed={compiled: true}", "sample.ablations=[preview]"]


@cache
def config(*words: str) -> Config:
    return compose.load("stage_c", [*WORDS, f"targets={ALL}", *words])


def leaves(settings: Any, key: str = "", manner: bool = False) -> Iterator[tuple[str, bool, Any, Any]]:
    """Dotted key, whether it or what it lies in is a manner, annotation, value: of all that is no section."""
    for name, field in type(settings).model_fields.items():
        value, place = getattr(settings, name), f"{key}.{name}".strip(".")
        how = manner or MANNER in field.metadata or place.startswith(HOW) or name in getattr(settings, "idle", ())
        if isinstance(value, BaseModel):
            yield from leaves(value, place, how)
        elif place.endswith((".validation.keep", ".train.lanes")):
            yield place, False, field.annotation, value  # another value of it decides, though this one decides nothing
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            yield from leaves(value[0], f"{place}.0", how)
        else:
            yield place, how, field.annotation, value


def others(annotation: Any, value: Any) -> list[Any]:
    """Other values that a key may take."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2, value // 2, value - 1, value + 128, value + 64]
    if isinstance(value, float):
        return [value / 2, value * 1.5, value + 0.25]
    options = [option for part in (annotation, *get_args(annotation)) for option in get_args(part)]
    named = [option for option in options if isinstance(option, str) and option != value]
    if isinstance(value, tuple | list):
        return [value[:-1], [*value[:-1], *others(None, value[-1])[:1]]] if value else [["other"]]
    return [*named, None, 0.5, 1, 2, f"{value}x", "other", {"decay": 0.9, "every": 1, "start": 0}]


def changed(key: str, value: Any, *words: str) -> Config | None:
    """The config with another value, where that is one."""
    tree = config(*words).model_dump()
    *sections, name = key.split(".")
    place = tree
    for section in sections:
        place = place[int(section)] if section.isdigit() else place[section]
    place[name] = value
    try:
        return Config.model_validate(tree)
    except ValidationError:
        return None


def digests(found: Config) -> dict[str, str]:
    steps = order(table(found), found.targets)
    lookup = found.lookup
    return {name: print_.digest for name, print_ in fingerprints(steps, lambda key: lookup(key, repr)).items()}


def test_another_value_enters_fingerprints_or_the_key_is_a_manner():
    before, wrong, tried = digests(config()), {}, 0
    for key, manner, annotation, value in leaves(config()):
        found = next(filter(None, (changed(key, other) for other in others(annotation, value))), None)
        if found is None or found == config():
            continue
        tried += 1
        after = digests(found)
        entered = any(after.get(name) != digest for name, digest in before.items())
        if entered == manner:
            wrong[key] = "is a manner, and enters a fingerprint" if manner else "enters no fingerprint"
    assert wrong == {}
    assert tried > 200


def test_lanes_that_divide_no_batch_are_the_one_lane_that_there_always_was():
    other = changed("stage_c.train.lanes", 7)
    assert other
    assert other.stage_c.train.shared_lanes == 1
    assert digests(other) == digests(config())
    assert other.stage_c.train.recipe(0) == config().stage_c.train.recipe(0)


def test_a_batch_in_pieces_is_no_manner_where_batchnorm_sees_a_piece():
    nothing_drawn_with_it = "sample.ablations=[]"

    def of(key: str) -> set[str]:
        found = changed(f"{key}.micro_batch", 2, nothing_drawn_with_it)
        assert found
        before, after = digests(config(nothing_drawn_with_it)), digests(found)
        return {name for name in before if before[name] != after[name]}

    assert of("previewer.train") == {"previewer"}
    assert "stage_a" in of("stage_a.train")
    assert of("stage_c.train") == of("baseline.train") == set()


def test_existing_weights_are_drawn_with_by_the_tower_that_the_config_names():
    towers = "text={one: {model: seeded, width: 32, layers: 1, heads: 2, context_length: 16, seed: 0}, two: {model: "
    towers += "seeded, width: 32, layers: 1, heads: 2, context_length: 16, seed: 1}}"
    existing = [f"{stage}.{key}" for stage in ("stage_b", "stage_c") for key in ("train=null", "weights=w/x.pt")]

    def of(first: str, second: str) -> dict[str, str]:
        words = [
            "scale=micro",
            towers,
            "baseline.text=one",
            f"stage_b.text={first}",
            f"stage_c.text={second}",
            *existing,
        ]
        return digests(compose.load("stage_c", words))

    one, two = of("one", "two"), of("two", "one")
    assert one["samples"] != two["samples"]
    assert one["release"] != two["release"]
    assert one["stage_b"] == two["stage_b"]
