"""LAION's aesthetic predictors: how well people would like a picture, about 1 to 10.

A head on the embedding of a picture, of length 1, that OpenAI's CLIP ViT-L/14 makes. The second predictor
(`sac+logos+ava1-l14-linearMSE.pth` of github.com/christophschuhmann/improved-aesthetic-predictor) is five linear layers
with nothing but dropout between them, the first one (`sa_0_4_vit_l_14_linear.pth` of github.com/LAION-AI/
aesthetic-predictor) a single one; their scales differ. Everything is computed in float32.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from stages.scoring.clip import Clip
from stages.state_dicts import read
from stages.weight_files import BadWeights

HEADS = (  # names of the linear layers, in their order
    ("layers.0.", "layers.2.", "layers.4.", "layers.6.", "layers.7."),
    ("",),
)


class AestheticScorer:
    """Scores pictures with a CLIP and a head on its embeddings; both on `device`."""

    def __init__(self, clip: Clip, head: nn.Sequential, device: str) -> None:
        self._embed = clip.pictures
        self._head = head.float().to(device).eval()

    @torch.inference_mode()
    def score(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """float32 (N,), of pictures uint8 RGB (H, W, 3) each; one forward pass, so pass them in batches."""
        scores: np.ndarray = self._head(self._embed(pictures))[:, 0].cpu().numpy()
        return scores


def read_head(weights: Path, width: int) -> nn.Sequential:
    """A head on embeddings (N, width), from a file; its output is (N, 1).

    Raises:
        BadWeights: it holds no head of either form, or one for another width.
    """
    state = read(weights)
    for names in HEADS:
        if state.keys() == {f"{name}{kind}" for name in names for kind in ("weight", "bias")}:
            sizes = [state[f"{name}weight"].shape for name in names]
            layers = [nn.Linear(inside, outside) for outside, inside in sizes]
            if (sizes[0][1], sizes[-1][0]) != (width, 1):
                raise BadWeights(f"{weights} makes {sizes[-1][0]} numbers of {sizes[0][1]}, not one of {width}")
            for layer, name in zip(layers, names, strict=True):
                layer.load_state_dict({kind: state[f"{name}{kind}"] for kind in ("weight", "bias")})
            return nn.Sequential(*layers)
    raise BadWeights(f"{weights} holds no head of an aesthetic predictor, to go by its tensors' names")
