"""Kinds of values that the settings of models and trainings have."""

from typing import Annotated, Literal

from pydantic import Field

Steps = Annotated[int, Field(ge=0, le=10**9)]  # of an optimiser, also none
Channels = Annotated[int, Field(ge=1, le=2**16)]
Layers = Annotated[int, Field(ge=1, le=1024)]  # blocks one after the other
Heads = Annotated[int, Field(ge=1, le=1024)]  # of attention
Batch = Annotated[int, Field(ge=1, le=10**6)]  # rows at a time
Weight = Annotated[float, Field(ge=0.0, le=10.0**6)]  # of a term of a loss
TimeSampling = Literal["released", "uniform"]
Precision = Literal["fp32", "bf16"]
ChosenPrecision = Precision | Literal["auto"]  # bf16 where the device computes in it, fp32 elsewhere
