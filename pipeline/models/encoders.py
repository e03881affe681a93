"""The encoders: captions and pictures become the fields that trainings see.

The steps `encode_*` store their outputs; a training that is to encode online makes the same of each batch on the
way. Both go through `Loaded`, so that they differ by what storing rounds off.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.models import loading
from pipeline.settings.config import Config
from pipeline.store.artifacts import Artifact
from stages.models.layers import to_unit_range
from stages.precision import autocast
from stages.settings.base import ChosenPrecision
from stages.settings.models import CompressorConfig, StageAConfig, TextConfig

RESIZE = "torch's bilinear interpolation of 8-bit pixels, antialiased, on the CPU"


@dataclass(frozen=True)
class Encoder:
    """An encoder that can be sent to a worker and loaded there.

    It makes `field` of `reads`: of `tokens` (B, N), or of `image` (B, 3, H, W) uint8. `weights` is their sha256,
    `about` says in words what else the output depends on.
    """

    field: str
    reads: str
    make: Callable[[torch.device], Callable[[Tensor], Tensor]]
    precision: ChosenPrecision
    batch: int
    weights: str
    about: Mapping[str, str]

    def load(self, where: torch.device) -> "Loaded":
        """With its model on a device."""
        return Loaded(self, where)

    def spec(self, dtype: str) -> dict[str, str]:
        """What the stored output depends on beside the captions or pictures, and the hash of that."""
        found = {"weights": self.weights, **self.about, "precision": self.precision, "dtype": dtype}
        digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
        return {**found, "hash": digest[:16]}


class Loaded:
    """An encoder on a device: of any number of rows, `batch` of them at a time, to fp32."""

    def __init__(self, encoder: Encoder, where: torch.device) -> None:
        self.encoder, self.where = encoder, where
        self._forward = encoder.make(where)
        if where.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 in the step too, as in trainings

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """From and to the host's memory, however many rows that has room for."""
        encoded: np.ndarray = self._encoded(torch.from_numpy(values), Tensor.cpu).numpy()
        return encoded

    def there(self, values: Tensor) -> Tensor:
        """What stays on the device, for a training, made in the present stream."""
        return self._encoded(values, lambda part: part)

    def _encoded(self, values: Tensor, kept: Callable[[Tensor], Tensor]) -> Tensor:
        # Not in inference mode: a training keeps what it is given for its backward pass.
        with torch.no_grad(), autocast(self.where, self.encoder.precision):
            parts = values.split(self.encoder.batch)
            return torch.cat([kept(self._forward(part.to(self.where)).float()) for part in parts])


def text(config: Config, artifact: Artifact) -> Encoder:
    """The tower of an artifact `text_<tower>`: tokens -> hidden states (B, N, D)."""
    model, settings = config.text[artifact.name.removeprefix("text_")], config.encode.text
    return Encoder(
        field="text",
        reads="tokens",
        make=partial(_tower, model, artifact),
        precision=settings.precision,
        batch=settings.batch,
        weights=artifact.files[loading.TOWER].sha256,
        about={
            "layer": "the last, after the final LayerNorm, at all positions",
            "tokenizer": f"CLIP's byte pairs of NFC in lower case, <|endoftext|> up to {model.context_length} tokens",
        },
    )


def latents_a(config: Config, artifact: Artifact) -> Encoder:
    """Stage A: pictures -> unquantised latents (B, 4, H/4, W/4)."""
    settings = config.encode.latents_a
    return Encoder(
        field="latents_a",
        reads="image",
        make=partial(_stage_a, config.stage_a.model, artifact),
        precision=settings.precision,
        batch=settings.batch,
        weights=artifact.files[loading.STAGE_A].sha256,
        about={"layer": "before the codebook, over the scale", "resize": RESIZE},
    )


def latents_c(config: Config, artifact: Artifact) -> Encoder:
    """The compressor of an artifact `stage_b`, always in fp32: pictures -> codes (B, 16, h, w), not normalised."""
    model = config.compressor.model
    return Encoder(
        field="latents_c",
        reads="image",
        make=partial(_compressor, model, artifact),
        precision="fp32",
        batch=config.encode.latents_c.batch,
        weights=artifact.files[loading.COMPRESSOR].sha256,
        about={
            "layer": "the last BatchNorm",
            "resize": f"{RESIZE}; then {model.resize} in fp32, antialiased, to {model.input_ratio} of the side",
        },
    )


def _tower(model: TextConfig, artifact: Artifact, where: torch.device) -> Callable[[Tensor], Tensor]:
    tower = loading.tower(model, artifact).to(where)
    return lambda tokens: tower(tokens.long())


def _stage_a(model: StageAConfig, artifact: Artifact, where: torch.device) -> Callable[[Tensor], Tensor]:
    stage_a = loading.stage_a(model, artifact).to(where)
    return lambda image: stage_a.encode(to_unit_range(image))


def _compressor(model: CompressorConfig, artifact: Artifact, where: torch.device) -> Callable[[Tensor], Tensor]:
    compressor = loading.compressor(model, artifact).to(where)
    return lambda image: compressor(to_unit_range(image))
