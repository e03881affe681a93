"""What all settings share: their base, and the kinds of their values."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
TimeSampling = Literal["released", "uniform"]
Precision = Literal["fp32", "bf16"]


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused, the text under a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
