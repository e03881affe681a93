"""What the settings of all packages are made of: their base, kinds of values, and marks that say what a field is.

The typed configs are `stages.settings`, `datasets.config` and, of a whole experiment, `pipeline.settings`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def _says_something(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank; give a text, or null where there may be none")
    if CONTROL.search(text):
        raise ValueError("holds a control character; leave it out")
    return text


Text = Annotated[str, AfterValidator(_says_something)]  # a path, a URI, a name
Count = Annotated[int, Field(ge=1, le=10**9)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]

# Marks: `batch: Annotated[Count, MANNER]`.
MANNER = "manner"  # decides how something is done, not what comes out: no fingerprint has it
FILES = "files"  # a path of files that are read as they are: weights, pictures, a list
WEIGHTS = "weights"  # beside it: they are weights
TABLE = "table"  # a path of Parquet, whose rows count, in whatever files they are
PLACE = "place"  # a path of which others say what counts: the owner of the section, or nobody


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused, the text under a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def manners(settings: BaseModel) -> dict[str, Any]:
    """The fields that are manners, of these settings and all below, as pydantic's `exclude` takes them.

    They are marked in the typed config; what settings leave idle (a property of that name) counts too.
    """
    idle: frozenset[str] = getattr(settings, "idle", frozenset())
    found: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        below = True if MANNER in field.metadata or name in idle else _below(getattr(settings, name))
        if below:
            found[name] = below
    return found


def _below(value: Any) -> dict[Any, Any]:
    match value:
        case BaseModel():
            return manners(value)
        case dict():
            return {key: found for key, part in value.items() if (found := _below(part))}
        case tuple():
            return {place: found for place, part in enumerate(value) if (found := _below(part))}
    return {}


def paths(settings: BaseModel, *marks: str) -> dict[str, str]:
    """What the fields with one of these marks name, by dotted key, of these settings and all below.

    A field that holds names with paths, or a list of such, names each of them; one that holds null, or a number where a
    path may stand too, none.
    """
    return {key.removeprefix("."): path for key, path in _paths(settings, frozenset(marks), "", False)}


def _paths(value: Any, marks: frozenset[str], key: str, marked: bool) -> Iterator[tuple[str, str]]:
    match value:
        case str() if marked:
            yield key, value
        case BaseModel():
            for name, field in type(value).model_fields.items():
                yield from _paths(getattr(value, name), marks, f"{key}.{name}", not marks.isdisjoint(field.metadata))
        case Mapping():
            for name, part in value.items():
                yield from _paths(part, marks, f"{key}.{name}", marked)
        case tuple():
            for place, part in enumerate(value):
                yield from _paths(part, marks, f"{key}.{place}", marked)
