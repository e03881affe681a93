"""Stage C: the text-conditional prior that writes the compressor's code.

After `Prior` of dome272/Wuerstchen's `modules.py` (state-dict keys kept; 520 at full size): convolution,
timestep and attention blocks at one resolution, no positions, so that any size can be sampled.
"""

from itertools import repeat

import torch
from torch import Tensor, nn

from stages import diffusion
from stages.draws import Draws
from stages.models.attention import AttnBlock, SeenText, activated
from stages.models.geometry import denormalise, normalise
from stages.models.layers import (
    Conv2d,
    ResBlock,
    TimestepBlock,
    channels_last,
    damp_residuals_,
    embedded,
    in_fp32,
    layer_norm,
    xavier_,
)
from stages.settings.losses import StageCLoss
from stages.settings.models import StageCConfig


class StageC(nn.Module):
    """Noise predictor on codes, scaled where the config says so. At the start it returns its input."""

    def __init__(self, config: StageCConfig) -> None:
        super().__init__()
        self.latent_channels = config.latent_channels
        self.timestep_channels = config.timestep_channels
        self.scaled_codes = config.scaled_codes
        width = config.width
        self.projection = Conv2d(config.latent_channels, width, 1)
        text_in, text_out = nn.Linear(config.text_width, width), nn.Linear(width, width)
        self.cond_mapper = nn.Sequential(text_in, nn.LeakyReLU(0.2), text_out)
        self.blocks = nn.ModuleList()
        for _ in range(config.depth):
            self.blocks.append(ResBlock(width, dropout=config.dropout))
            self.blocks.append(TimestepBlock(width, config.timestep_channels))
            self.blocks.append(AttnBlock(width, width, config.heads, config.dropout))
        head = Conv2d(width, 2 * config.latent_channels, 1)
        self.out = nn.Sequential(layer_norm(width), head)

        xavier_(self)
        for layer in (self.projection, text_in, text_out):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(head.weight)
        damp_residuals_(self, config.depth)

    def forward(self, x: Tensor, t: Tensor, text: Tensor | SeenText) -> Tensor:
        """Predict the noise in x.

        x: (B, 16, H, W) noisy codes as of `from_code`, any sides; t: (B,) fp32 in [0, 1], or (1,) for all; text:
        (B, N, D) hidden states of all positions, padding included, or what `see` made of them. Returns (B, 16, H, W)
        fp32.
        """
        timestep = embedded(t, self.timestep_channels)
        seen = iter(text) if isinstance(text, tuple) else repeat(None)
        read = None if isinstance(text, tuple) else activated(self.cond_mapper(text))
        hidden = self.projection(channels_last(x))
        for block in self.blocks:
            if isinstance(block, TimestepBlock):
                hidden = block(hidden, timestep)
            elif isinstance(block, AttnBlock):
                hidden = block(hidden, read, next(seen))
            else:
                hidden = block(hidden)
        a, b = in_fp32(self.out, hidden).permute(0, 3, 1, 2).chunk(2, dim=1)
        return (x.float() - a) / ((1 - b).abs() + 1e-5)

    def see(self, text: Tensor) -> SeenText:
        """What `forward` needs of texts (B, N, D), once for all steps of a drawing."""
        read = activated(self.cond_mapper(text))
        return tuple(block.see(read) for block in self.blocks if isinstance(block, AttnBlock))

    def from_code(self, code: Tensor) -> Tensor:
        """The compressor's raw output -> the space that Stage C works in."""
        return normalise(code) if self.scaled_codes else code

    def to_code(self, latents: Tensor) -> Tensor:
        """The inverse of `from_code`."""
        return denormalise(latents) if self.scaled_codes else latents


class StageCObjective(nn.Module):
    """Noise prediction on codes.

    Batch: `latents_c` (B, 16, H, W), the compressor's raw outputs; `text` (B, N, D).
    null_text: (N, D) hidden states of the empty caption, which replaces dropped ones.
    """

    null_text: Tensor

    def __init__(self, stage_c: StageC, loss: StageCLoss, null_text: Tensor) -> None:
        super().__init__()
        self.stage_c = stage_c
        self.loss = loss
        self.weight = diffusion.weighting(loss.weight)
        self.register_buffer("null_text", null_text, persistent=False)

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        text, learned = batch["text"], self.stage_c.from_code(batch["latents_c"].float())
        if self.loss.mixup and self.training:
            ratio = torch.where(draws.uniform() < self.loss.mixup, draws.uniform(), 1.0)
            text, learned = diffusion.mixed(text, ratio), diffusion.mixed(learned, ratio)
        text = diffusion.drop(text, self.null_text, draws.uniform() < self.loss.text_drop)
        return diffusion.denoising_loss(
            lambda x, t: self.stage_c(x, t, text),
            learned,
            draws,
            self.loss.timesteps,
            self.weight,
            self.loss.consistency,
            lambda x, t: self._steady(x, t, text),
        )

    @torch.no_grad()
    def _steady(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """A prediction without gradient and dropout."""
        mode = self.stage_c.training
        predicted: Tensor = self.stage_c.eval()(x, t, text)
        self.stage_c.train(mode)
        return predicted
