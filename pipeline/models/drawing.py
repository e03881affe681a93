"""Drawing pictures in batches, and the seed of a caption: what the verb `sample` and the step `sample` share."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stages.settings.sampling import SamplingConfig

if TYPE_CHECKING:
    import torch

    from stages.sampling.sample import Models


def drawn(
    models: "Models",
    texts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplingConfig,
    batch: int,
    device: "torch.device",
    image: "torch.Tensor | None" = None,
    strength: float | None = None,
    preview: bool = False,
) -> Iterator[np.ndarray]:
    """Pictures, uint8 (H, W, 3), of texts and seeds (and pictures, (B, 3, H, W)), `batch` of them drawn at a time;
    `preview` as in `generate`."""
    from stages.sampling.sample import generate

    for start in range(0, len(seeds), batch):
        part = slice(start, start + batch)
        yield from generate(
            models,
            texts[part],
            seeds[part],
            settings,
            image=None if image is None else image[part],
            strength=strength,
            preview=preview,
            device=device,
        ).numpy()


def caption_seed(seed: int, caption: str) -> int:
    """The seed of a caption's picture where none is given: 31 bits from the run's seed and the text."""
    digest = hashlib.sha256(f"{seed}\0{caption}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
