"""The previewer: small pictures straight from the compressor's code, without Stage B and A.

After `Previewer` of Stability-AI/StableCascade's `modules/previewer.py` (state-dict keys kept), the idea of the
Würstchen paper's Appendix D: it shows how much of a picture the code, and so Stage C, decides.
"""

import torch
from torch import Tensor, nn

from stages.draws import Draws
from stages.models.geometry import normalise
from stages.models.layers import resized, to_unit_range
from stages.settings.losses import PreviewerLoss
from stages.settings.models import PreviewerConfig


class Previewer(nn.Module):
    """Codes -> pictures with 8 times their side, by convolutions with GELU and BatchNorm."""

    def __init__(self, config: PreviewerConfig) -> None:
        super().__init__()
        inner, middle, outer = config.width, config.width // 2, config.width // 4
        self.blocks = nn.Sequential(
            *_activated(nn.Conv2d(config.latent_channels, inner, 1)),
            *_activated(nn.Conv2d(inner, inner, 3, padding=1)),
            *_activated(nn.ConvTranspose2d(inner, middle, 2, stride=2)),
            *_activated(nn.Conv2d(middle, middle, 3, padding=1)),
            *_activated(nn.ConvTranspose2d(middle, outer, 2, stride=2)),
            *_activated(nn.Conv2d(outer, outer, 3, padding=1)),
            *_activated(nn.ConvTranspose2d(outer, outer, 2, stride=2)),
            *_activated(nn.Conv2d(outer, outer, 3, padding=1)),
            nn.Conv2d(outer, 3, 1),
        )

    def forward(self, code: Tensor) -> Tensor:
        """Normalised codes (B, 16, h, w), any sides -> pictures (B, 3, 8 h, 8 w) in [0, 1], not clamped."""
        return self.blocks(code)


def _activated(convolution: nn.Conv2d | nn.ConvTranspose2d) -> tuple[nn.Module, ...]:
    return convolution, nn.GELU(), nn.BatchNorm2d(convolution.out_channels)


class PreviewerObjective(nn.Module):
    """Error of the preview against the picture, shrunk to the preview's side with antialiasing.

    Batch: `image` (B, 3, S, S) uint8; `latents_c` (B, 16, h, h), the compressor's raw outputs.
    """

    def __init__(self, previewer: Previewer, loss: PreviewerLoss) -> None:
        super().__init__()
        self.previewer = previewer
        self.loss = loss

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        preview = self.previewer(normalise(batch["latents_c"].float())).float()
        error = preview - to_unit_range(resized(batch["image"], preview.shape[-2:]))
        l1, mse = error.abs().mean(), error.square().mean()
        loss = torch.stack([self.loss.l1 * l1, self.loss.mse * mse]).sum()
        return loss, {"l1": l1.detach(), "mse": mse.detach()}
