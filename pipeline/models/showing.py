"""What shows codes as pictures while Stage C trains, which makes no more than codes: the previewer that learned these
codes, where there is one, else Stage B and A. They are loaded for each panel, one after the other, and let go again."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.models import loading
from pipeline.store.artifacts import Artifact
from stages.diffusion import sampling_times
from stages.sampling.denoising import Noise, Steps, sample_latents
from stages.sampling.sample import preview, to_pixels
from stages.settings.models import PreviewerConfig, StageAConfig, StageBConfig

Pictures = list[np.ndarray]  # uint8 (H, W, 3) each


class Decoder(Protocol):
    """Makes pictures of codes; can be sent to ranks."""

    @property
    def by(self) -> str:
        """What it is called, in few letters."""

    def __call__(self, codes: Sequence[Tensor], texts: Sequence[Tensor], steps: int) -> Pictures:
        """A picture of each code (1, C, h, w), on its device; `texts` are Stage C's hidden states of the captions,
        `steps` are calls of a diffusion model."""


@dataclass(frozen=True)
class ByPreviewer:
    """The previewer: small pictures at once."""

    model: PreviewerConfig
    artifact: Artifact
    by: str = "previewer"

    def __call__(self, codes: Sequence[Tensor], texts: Sequence[Tensor], steps: int) -> Pictures:
        previewer = loading.previewer(self.model, self.artifact).to(codes[0].device)
        return [preview(previewer, code)[0].numpy() for code in codes]


@dataclass(frozen=True)
class ByStages:
    """Stage B, then A. B sees the caption where `shares_text`, that is where its tower is Stage C's, else the empty one
    of its own (`text`), else none."""

    model_a: StageAConfig
    stage_a: Artifact
    model_b: StageBConfig
    stage_b: Artifact
    shares_text: bool
    text: Artifact | None
    by: str = "B + A"

    def __call__(self, codes: Sequence[Tensor], texts: Sequence[Tensor], steps: int) -> Pictures:
        latents = self._latents(codes, texts, steps)
        stage_a = loading.stage_a(self.model_a, self.stage_a).to(codes[0].device)
        return [to_pixels(stage_a.decode(one))[0].numpy() for one in latents]

    def _latents(self, codes: Sequence[Tensor], texts: Sequence[Tensor], steps: int) -> list[Tensor]:
        stage_b = loading.stage_b(self.model_b, self.stage_b).to(codes[0].device)
        empty = None if self.text is None else loading.null_text(self.text)[None].to(codes[0].device)
        unguided = Steps(sampling_times(steps))
        return [
            sample_latents(
                stage_b, code, text if self.shares_text else empty, None, Noise([number], code.device), unguided
            )
            for number, (code, text) in enumerate(zip(codes, texts, strict=True))
        ]


@dataclass
class Shower:
    """A decoder as one rank uses it: what it makes of the data's own codes is always the same, and kept."""

    decoder: Decoder
    _given: Pictures = field(default_factory=list)

    @property
    def by(self) -> str:
        """What the decoder is called."""
        return self.decoder.by

    @torch.inference_mode()
    def pictures(self, codes: Sequence[Tensor], texts: Sequence[Tensor], steps: int) -> Pictures:
        """See `Decoder`."""
        return self.decoder(codes, texts, steps)

    def given(self, codes: Sequence[Tensor], texts: Sequence[Tensor], steps: int) -> Pictures:
        """The same of the data's codes, made once."""
        if not self._given:
            self._given = self.pictures(codes, texts, steps)
        return self._given
