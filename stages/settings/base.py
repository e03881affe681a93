"""What all settings share: their base, and the kinds of their values."""

import re
from typing import Annotated, Any, Literal

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
Steps = Annotated[int, Field(ge=0, le=10**9)]  # of an optimiser, also none
Channels = Annotated[int, Field(ge=1, le=2**16)]
Layers = Annotated[int, Field(ge=1, le=1024)]  # blocks one after the other
Heads = Annotated[int, Field(ge=1, le=1024)]  # of attention
Batch = Annotated[int, Field(ge=1, le=10**6)]  # rows at a time
Weight = Annotated[float, Field(ge=0.0, le=10.0**6)]  # of a term of a loss
Share = Annotated[float, Field(ge=0.0, le=1.0)]
TimeSampling = Literal["released", "uniform"]
Precision = Literal["fp32", "bf16"]


MANNER = "manner"  # marks a field that decides how something is done, not what comes out: no fingerprint has it


def manners(settings: BaseModel) -> dict[str, Any]:
    """The fields that are manners, of these settings and all below, as pydantic's `exclude` takes them.

    They are marked in the typed config (`Annotated[Count, MANNER]`); what settings leave idle (a property of that name)
    counts too.
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


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused, the text under a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
