"""Inception of 2015 as torch-fidelity has it, the extractor of FID, KID and IS: from a file to features in memory.

torch-fidelity is wanted here alone, and only where one of these is asked for (`pyproject.toml`, group `distances`).
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.state_dicts import read, require_finite
from stages.weight_files import BadWeights

FEATURES, LOGITS = "2048", "logits_unbiased"  # torch-fidelity's names of the layers: of FID and KID, and of IS


class BadInception(BadWeights):
    """A file does not hold the Inception asked for, or nothing can read it."""


def load(weights: Path, device: str = "cpu", features: str = FEATURES) -> "Inception":
    """Inception from a file of its tensors, safetensors or torch's; `features` is torch-fidelity's name of a layer.

    Raises:
        BadInception: torch-fidelity is not installed, or the file is damaged, or of another architecture.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise BadInception("FID, KID and IS need torch-fidelity 0.4; install it: pip install torch-fidelity") from error
    try:
        state = read(weights)
        require_finite(state, weights)
    except BadWeights as error:
        raise BadInception(str(error)) from error
    safe = io.BytesIO()  # it unpickles what it is given: this was written here, and nothing but tensors are in it
    torch.save(dict(state), safe)
    safe.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception", [features, LOGITS], feature_extractor_weights_path=safe)
    except RuntimeError as error:
        raise BadInception(f"{weights} does not hold the tensors of Inception v3 as FID takes it") from error
    return Inception(network, device)


class Inception:
    """What Inception makes of pictures, in float32.

    Args:
        network: torch-fidelity's extractor of two layers, features and logits; moved to `device`.
    """

    def __init__(self, network: Any, device: str = "cpu") -> None:
        self._network = network.to(device)
        self._device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, D) and logits without bias (N, classes) of pictures uint8 (S, S, 3), all of one size.

        They are resized to 299 px inside, as TensorFlow 1 did it; one forward pass, so pass them in batches.
        """
        batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(self._device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 would cut 13 bits off
            features, logits = self._network(batch)
        return features.cpu().numpy(), logits.cpu().numpy()
