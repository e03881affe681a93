"""Settings of sampling: how a picture is drawn."""

from typing import Literal

from pydantic import Field

from stages.settings.base import Count, Precision, Settings, TimeSampling

Sampler = Literal["ddpm", "ddim"]


class SamplingConfig(Settings):
    """How a picture is drawn: all that decides it beside models, caption and seed."""

    width: int = Field(1024, ge=128, le=8192, multiple_of=128)
    """Px."""
    height: int = Field(1024, ge=128, le=8192, multiple_of=128)
    """Px."""
    steps_c: Count = 60
    """Model calls of Stage C, where `timesteps` is uniform."""
    steps_b: Count = 12
    """Model calls of Stage B."""
    guidance_c: float = Field(4.0, ge=0.0)
    """Guidance of Stage C in Imagen's convention; 1 or less is off."""
    guidance_b: float = Field(4.0, ge=0.0)
    """Guidance of Stage B: 4 in the paper, off in the released pipeline."""
    negative: str = ""
    """Caption to keep away from, where guidance is on."""
    sampler: Sampler = "ddpm"
    """Steps of both stages: DDPM adds noise at each, DDIM draws it once."""
    timesteps: TimeSampling = "uniform"
    """Times of Stage C's calls: `steps_c` even ones, or the 29 of the released pipeline's list."""
    precision: Precision = "fp32"
    """Stage B and C in fp32, or under bf16 autocast; heads and schedule are fp32 in both."""
