"""PickScore: how much people would like a picture for a prompt (Kirstain et al., arXiv 2305.01569).

The model is CLIP ViT-H-14, fine-tuned on people's choices between two pictures; the score is
exp(logit_scale) * cos(picture, text), about 21 for a fair match. It runs in open_clip, so any CLIP that
open_clip can build may be the scorer; the published checkpoint (`yuvalkirstain/PickScore_v1`) is read by
renaming its tensors. Everything is computed in float32: half precision flips winners (`metrics.win_rate`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP
from PIL import Image
from torch.nn import functional as F

from stages.scoring import clip
from stages.scoring.clip import BadClipWeights, PictureEncoder
from stages.scoring.metrics import WinRate, win_rate


class PickScoreError(ValueError):
    """The weights or the pictures to score are missing or not what they should be."""


@dataclass(frozen=True)
class Scores:
    """float32 `[N]`, one score per picture and prompt, and how many prompts were too long for the model."""

    values: np.ndarray
    truncated_prompts: int


@dataclass(frozen=True)
class FolderComparison:
    """Scores of two models' pictures for the same prompts; entry i of both is for the prompt of `keys[i]`."""

    keys: list[str]
    scores_a: np.ndarray
    scores_b: np.ndarray
    truncated_prompts: int

    @property
    def win_rate(self) -> WinRate:
        """How often A's picture is preferred to B's."""
        return win_rate(self.scores_a, self.scores_b)


class PickScore:
    """Scores pictures against prompts with one CLIP model.

    Args:
        model: any CLIP of open_clip; moved to `device`, used in float32.
        device: torch device, such as "cpu" or "cuda".
    """

    def __init__(self, model: CLIP, device: str = "cpu") -> None:
        self._model = model.float().to(device).eval()
        self._device = device
        self._tokenize = open_clip.SimpleTokenizer(context_length=model.context_length)
        self._embed = PictureEncoder(self._model, device)

    @torch.inference_mode()
    def score(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> Scores:
        """Score each picture against the prompt of the same index.

        Args:
            pictures: uint8 RGB `[H, W, 3]` each, sizes may differ; one forward pass, so pass them in batches.
            prompts: one for each picture; what exceeds the context (77 tokens) is cut off and counted.
        """
        assert len(pictures) == len(prompts), f"{len(pictures)} pictures, {len(prompts)} prompts"
        tokens = self._tokenize(list(prompts))
        image = self._embed(pictures)
        text = F.normalize(self._model.encode_text(tokens.to(self._device)), dim=-1)
        values = self._model.logit_scale.exp() * (image * text).sum(dim=-1)
        return Scores(values.cpu().numpy(), sum(map(self._is_truncated, prompts)))

    def _is_truncated(self, prompt: str) -> bool:
        start_and_end = 2
        return len(self._tokenize.encode(prompt)) + start_and_end > self._model.context_length


def load_pickscore(weights: Path, device: str = "cpu", architecture: str = "ViT-H-14") -> PickScore:
    """Build the scorer from a file: safetensors or torch, with open_clip's or transformers' tensor names.

    Raises:
        PickScoreError: there is no such file, or it does not hold this architecture.
    """
    check_weights(weights)
    try:
        return PickScore(clip.load(weights, architecture), device)
    except BadClipWeights as error:
        raise PickScoreError(
            f"eval.pickscore.weights: {error}; give the path of model.safetensors of yuvalkirstain/PickScore_v1"
        ) from error


def check_weights(weights: Path) -> None:
    """Raise `PickScoreError` unless there is such a file; cheap, for before the run."""
    if not weights.is_file():
        raise PickScoreError(
            f"eval.pickscore.weights: there is no file {weights}; fetch model.safetensors of "
            "yuvalkirstain/PickScore_v1 and give its path, or leave pickscore out of the scorers"
        )


def compare_folders(
    scorer: PickScore, folder_a: Path, folder_b: Path, prompts: Mapping[str, str], batch: int = 32
) -> FolderComparison:
    """Score the pictures `<key>.png` of two folders against their prompts, `batch` pictures at a time.

    Args:
        prompts: key -> prompt, at least one; pictures of other keys are left alone.

    Raises:
        PickScoreError: a prompt has no picture in one of the folders.
    """
    assert prompts, "nothing to compare"
    keys = sorted(prompts)
    batches = [keys[start : start + batch] for start in range(0, len(keys), batch)]
    scores_a, scores_b = (
        [scorer.score([_read_picture(folder, key) for key in some], [prompts[key] for key in some]) for some in batches]
        for folder in (folder_a, folder_b)
    )
    return FolderComparison(
        keys,
        np.concatenate([scores.values for scores in scores_a]),
        np.concatenate([scores.values for scores in scores_b]),
        sum(scores.truncated_prompts for scores in scores_a),
    )


def _read_picture(folder: Path, key: str) -> np.ndarray:
    path = folder / f"{key}.png"
    if not path.is_file():
        raise PickScoreError(f"there is no picture {path}; both folders need one for each prompt")
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
