"""Scorers: how good a picture is for a prompt, or as a copy of an original, in one float32 number each.

pickscore   how much people would like it (Kirstain et al., arXiv 2305.01569): exp(logit_scale) * cos(picture, text)
            of a CLIP ViT-H/14 that was fine-tuned on people's choices; about 21 for a fair match
clip score  how well it fits the text (Hessel et al., arXiv 2104.08718): 100 * cos(picture, text) of a plain CLIP
aesthetic   LAION's predictor, whatever the prompt
psnr, ssim, lpips   likeness to the original, where there is one; equal pictures have a PSNR of 100 dB
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from stages.scoring.metrics import psnr, ssim

if TYPE_CHECKING:  # they take seconds to import: only who has such a scorer waits for it
    from stages.scoring.aesthetic import AestheticScorer
    from stages.scoring.clip import Clip

Pictures = Sequence[np.ndarray]  # uint8 RGB (H, W, 3) each


class Scorer(Protocol):
    """What scores pictures."""

    wants_originals: bool
    """Whether it compares with originals, and so scores only where there are any."""

    def __call__(self, pictures: Pictures, prompts: Sequence[str], originals: Pictures | None) -> np.ndarray:
        """float32 (N,): picture i for prompt i, or against original i; one forward pass, so pass them in batches."""

    def is_truncated(self, prompt: str) -> bool:
        """Whether it sees only the beginning of a prompt."""


class PromptScorer:
    """The cosine of picture and prompt in a CLIP, times a factor: its own, exp(logit_scale), as PickScore, or 100."""

    wants_originals = False

    def __init__(self, clip: "Clip", factor: float | None = None) -> None:
        self._clip = clip
        self._factor = clip.scale if factor is None else factor
        self.is_truncated = clip.is_truncated

    def __call__(self, pictures: Pictures, prompts: Sequence[str], originals: Pictures | None = None) -> np.ndarray:
        assert len(pictures) == len(prompts), f"{len(pictures)} pictures, {len(prompts)} prompts"
        cosines = (self._clip.pictures(pictures) * self._clip.texts(prompts)).sum(dim=-1)
        scores: np.ndarray = (self._factor * cosines).cpu().numpy()
        return scores


class PictureScorer:
    """An aesthetic predictor, which looks at no prompt."""

    wants_originals = False

    def __init__(self, predictor: "AestheticScorer") -> None:
        self._predictor = predictor

    def __call__(self, pictures: Pictures, prompts: Sequence[str], originals: Pictures | None = None) -> np.ndarray:
        return self._predictor.score(pictures)

    def is_truncated(self, prompt: str) -> bool:
        """It reads none."""
        return False


class Likeness:
    """How like its original each picture is.

    Args:
        measure: uint8 (N, H, W, 3) and originals of the same shape -> (N,).
    """

    wants_originals = True

    def __init__(self, measure: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        self._measure = measure

    def __call__(self, pictures: Pictures, prompts: Sequence[str], originals: Pictures | None) -> np.ndarray:
        assert originals is not None, "likeness is to originals"
        pairs = zip(pictures, originals, strict=True)
        values = [self._measure(picture[None], original[None])[0] for picture, original in pairs]
        return np.array(values, np.float32)

    def is_truncated(self, prompt: str) -> bool:
        """It reads none."""
        return False


def likenesses(perceptual: Callable[[Tensor, Tensor], Tensor] | None, device: str = "cpu") -> dict[str, Scorer]:
    """PSNR and SSIM, and LPIPS where its network is given: pictures (B, 3, H, W) in [0, 1], twice -> (B,)."""
    found: dict[str, Scorer] = {"psnr": Likeness(lambda *pair: np.minimum(psnr(*pair), 100.0)), "ssim": Likeness(ssim)}
    if perceptual is not None:
        network = perceptual

        def lpips(pictures: np.ndarray, originals: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                distance = network(*(_unit(values, device) for values in (pictures, originals)))
            measured: np.ndarray = distance.cpu().numpy()
            return measured

        found["lpips"] = Likeness(lpips)
    return found


def _unit(pictures: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device, torch.float32) / 255
