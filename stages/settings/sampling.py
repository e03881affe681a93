"""Settings of sampling: how a picture is drawn."""

from typing import Annotated, Literal

from pydantic import Field

from settings import Settings
from stages.settings.base import Precision, TimeSampling

Sampler = Literal["ddpm", "ddim"]


class SamplingConfig(Settings):
    """How a picture is drawn: all that decides it beside models, caption and seed."""

    width: int = Field(1024, ge=128, le=8192, multiple_of=128)
    """Width of a picture, px."""
    height: int = Field(1024, ge=128, le=8192, multiple_of=128)
    """Height of a picture, px."""
    steps_c: Annotated[int, Field(ge=1, le=10_000)] = 60
    """Model calls of Stage C, where `timesteps` is uniform."""
    steps_b: Annotated[int, Field(ge=1, le=10_000)] = 12
    """Model calls of Stage B."""
    guidance_c: float = Field(4.0, ge=0.0, le=1000.0)
    """Guidance of Stage C in Imagen's convention, 1 or less is off; 8 is the released default, at 60 steps."""
    guidance_b: float = Field(4.0, ge=0.0, le=1000.0)
    """Guidance of Stage B, 1 or less is off: 4 in the paper, off in the released pipeline."""
    negative: str = ""
    """Caption to keep away from, where guidance is on; blank: the empty one."""
    sampler: Sampler = "ddpm"
    """Steps of both stages: DDPM adds noise at each, DDIM draws it once."""
    timesteps: TimeSampling = "uniform"
    """Times of Stage C's calls: `steps_c` even ones, or the 29 of the released pipeline's list."""
    precision: Precision = "fp32"
    """Stage B and C in fp32, or under bf16 autocast; heads and schedule are fp32 in both."""
