"""What shows codes as pictures while Stage C trains, which makes no more than codes: the previewer that learned these
codes, where there is one, else Stage B and A. They are loaded for each panel, one after the other, and let go again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.models import loading
from pipeline.store.artifacts import Artifact
from stages.diffusion import sampling_times
from stages.sampling.denoising import Noise, Steps, sample_latents
from stages.sampling.sample import preview, to_pixels
from stages.settings.models import PreviewerConfig, StageAConfig, StageBConfig, TextConfig

EMPTY = 235  # grey
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


@dataclass(frozen=True)
class Prompts:
    """Prompts of the files that the model is going to be measured on, and the tower that encodes them; can be sent to
    ranks."""

    captions: Sequence[str]
    """What stands above each, with the name of its set."""
    texts: Sequence[str]
    model: TextConfig
    tower: Artifact

    def encoded(self, device: torch.device) -> list[Tensor]:
        """Hidden states of each (1, N, D) fp32; the tower is loaded for that, on the CPU, and let go again."""
        tower = loading.tower(self.model, self.tower)
        return [tower.encode([text])[0].float().to(device) for text in self.texts]


class Shower:
    """A decoder as one rank uses it, and prompts beside the data's captions. What is always the same, what the decoder
    makes of the data's own codes, and the prompts' hidden states, is made once."""

    def __init__(self, decoder: Decoder, prompts: Prompts | None = None) -> None:
        self._decoder, self._prompts = decoder, prompts
        self._given: Pictures | None = None
        self._encoded: list[Tensor] | None = None

    @property
    def by(self) -> str:
        """What the decoder is called."""
        return self._decoder.by

    @property
    def captions(self) -> Sequence[str]:
        """Those of the prompts."""
        return self._prompts.captions if self._prompts else ()

    @torch.inference_mode()
    def texts(self, device: torch.device) -> list[Tensor]:
        """Hidden states of the prompts."""
        if self._encoded is None:
            self._encoded = self._prompts.encoded(device) if self._prompts else []
        return self._encoded

    @torch.inference_mode()
    def pictures(self, codes: Sequence[Tensor], texts: Sequence[Tensor], steps: int) -> Pictures:
        """See `Decoder`."""
        return self._decoder(codes, texts, steps)

    def given(self, codes: Sequence[Tensor], texts: Sequence[Tensor], steps: int) -> Pictures:
        """The same of the data's codes, and an empty picture for each prompt, which has none."""
        if self._given is None:
            found = self.pictures(codes, texts, steps)
            self._given = found + [np.full_like(found[0], EMPTY)] * len(self.captions)
        return self._given
