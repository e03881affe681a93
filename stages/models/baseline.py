"""The baseline: latent diffusion without Würstchen's code, a text-conditional U-Net on Stage A's latents.

The blocks are Stable Diffusion 2's (arXiv 2112.10752, section 3.3): residual blocks with GroupNorm, and transformers
whose cross-attention sees the text. State-dict keys are those of diffusers' `UNet2DConditionModel`. It trains and
samples like Stage C: same schedule, loss, loop and sampler.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages import diffusion
from stages.draws import Draws
from stages.models.attention import scaled_dot_product_attention
from stages.models.layers import (
    Block,
    Conv2d,
    Patchify,
    Unpatchify,
    in_fp32,
    timestep_embedding,
)
from stages.settings.losses import BaselineLoss
from stages.settings.models import BaselineConfig


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` on (B, H, W, C)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Residual(Block):
    """Two 3x3 convolutions, the timestep's embedding added in between."""

    def __init__(self, channels: int, width: int, timestep_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels)
        self.conv1 = Conv2d(channels, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(timestep_channels, width)
        self.norm2 = GroupNorm(groups, width)
        self.conv2 = Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = Conv2d(channels, width, 1) if channels != width else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(timestep))[:, None, None, :]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class Attention(nn.Module):
    """Attention of tokens to a context, which may be themselves."""

    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """Return (B, N, C) for tokens (B, N, C) and a context (B, M, D)."""
        projected = (self.to_q(tokens), self.to_k(context), self.to_v(context))
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)
        return self.to_out(scaled_dot_product_attention(query, key, value, 0.0).transpose(1, 2).flatten(2))


class GatedGELU(nn.Module):
    """Linear layer times the GELU of another (GEGLU of arXiv 2002.05202, eq. 6)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, and an MLP, each a residual behind a LayerNorm."""

    def __init__(self, channels: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, text_width, heads)
        self.norm3 = nn.LayerNorm(channels)
        net = nn.Sequential(GatedGELU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))
        self.ff = nn.ModuleDict({"net": net})

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        tokens = tokens + self.attn1(normed, normed)
        tokens = tokens + self.attn2(self.norm2(tokens), text)
        return tokens + self.ff["net"](self.norm3(tokens))


class Transformer(Block):
    """Transformer blocks over all positions of a map."""

    def __init__(self, channels: int, heads: int, text_width: int, depth: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        blocks = (TransformerBlock(channels, heads, text_width) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x).flatten(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens, text)
        return x + self.proj_out(tokens).view_as(x)


class Downsampler(nn.Module):
    """Half the side, by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsampler(nn.Module):
    """Twice the side: every position four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2))


class Level(nn.Module):
    """The blocks of one side: residual blocks, of which the first ones have a transformer behind them."""

    def __init__(self, residuals: list[Residual], transformers: list[Transformer]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(residuals)
        self.attentions = nn.ModuleList(transformers)

    def block(self, place: int, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Pass x through one residual block and its transformer, if it has one."""
        x = self.resnets[place](x, timestep)
        return self.attentions[place](x, text) if place < len(self.attentions) else x


class MiddleLevel(Level):
    """The level between the ways."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        for place in range(len(self.resnets)):
            x = self.block(place, x, timestep, text)
        return x


class DownLevel(Level):
    """A level on the way down, which leaves its maps for the way up."""

    def __init__(self, residuals: list[Residual], transformers: list[Transformer], shrinks: bool) -> None:
        super().__init__(residuals, transformers)
        width = residuals[-1].conv2.out_channels
        self.downsamplers = nn.ModuleList([Downsampler(width)] if shrinks else [])

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, skips: list[Tensor]) -> Tensor:
        for place in range(len(self.resnets)):
            x = self.block(place, x, timestep, text)
            skips.append(x)
        for shrink in self.downsamplers:
            x = shrink(x)
            skips.append(x)
        return x


class UpLevel(Level):
    """A level on the way up; each residual block also sees the map left last on the way down."""

    def __init__(self, residuals: list[Residual], transformers: list[Transformer], grows: bool) -> None:
        super().__init__(residuals, transformers)
        width = residuals[-1].conv2.out_channels
        self.upsamplers = nn.ModuleList([Upsampler(width)] if grows else [])

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, skips: list[Tensor]) -> Tensor:
        for place in range(len(self.resnets)):
            x = self.block(place, torch.cat([x, skips.pop()], dim=-1), timestep, text)
        for grow in self.upsamplers:
            x = grow(x)
        return x


class Baseline(nn.Module):
    """Noise predictor on Stage A's latents. At the start it returns 0."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        widths, groups = config.widths, config.groups
        self.latent_channels = config.latent_channels
        self.timestep_channels = widths[0]
        embedded = 4 * widths[0]
        channels = config.latent_channels * config.patch**2

        def residual(inputs: int, width: int) -> Residual:
            return Residual(inputs, width, embedded, groups)

        def transformer(width: int, heads: int, depth: int = 1) -> Transformer:
            return Transformer(width, heads, config.text_width, depth, groups)

        def blocks(inputs: list[int], place: int) -> tuple[list[Residual], list[Transformer]]:
            width, heads = widths[place], config.heads[place]
            transformers = [transformer(width, heads) for _ in inputs] if heads else []
            return [residual(each, width) for each in inputs], transformers

        self.patchify = Patchify(config.patch)
        self.conv_in = Conv2d(channels, widths[0], 3, padding=1)
        layers = (nn.Linear(widths[0], embedded), nn.SiLU(), nn.Linear(embedded, embedded))
        self.time_embedding = nn.Sequential(OrderedDict(zip(("linear_1", "act", "linear_2"), layers, strict=True)))

        last = len(widths) - 1
        skips = [widths[0]]  # channels of the maps that the way up takes over
        self.down_blocks = nn.ModuleList()
        for place, width in enumerate(widths):
            inputs = [skips[-1]] + [width] * (config.blocks - 1)
            self.down_blocks.append(DownLevel(*blocks(inputs, place), shrinks=place < last))
            skips += [width] * (config.blocks + (place < last))

        width = widths[-1]
        middle = transformer(width, config.middle_heads, config.middle_depth)
        self.mid_block = MiddleLevel([residual(width, width), residual(width, width)], [middle])

        self.up_blocks = nn.ModuleList()
        for place in reversed(range(len(widths))):
            inputs = [each + skips.pop() for each in (width, *[widths[place]] * config.blocks)]
            self.up_blocks.append(UpLevel(*blocks(inputs, place), grows=place > 0))
            width = widths[place]

        self.conv_norm_out = GroupNorm(groups, widths[0])
        self.conv_out = Conv2d(widths[0], channels, 3, padding=1)
        self.unpatchify = Unpatchify(config.patch)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Predict the noise in x.

        x: (B, 4, H, W) noisy latents, sides divisible by patch x 2^(levels - 1); t: (B,) fp32 in [0, 1];
        text: (B, N, D) hidden states of all positions, padding included. Returns (B, 4, H, W) fp32.
        """
        timestep = self.time_embedding(timestep_embedding(t, self.timestep_channels))
        hidden = self.conv_in(self.patchify(x))
        skips = [hidden]
        for level in self.down_blocks:
            hidden = level(hidden, timestep, text, skips)
        hidden = self.mid_block(hidden, timestep, text)
        for level in self.up_blocks:
            hidden = level(hidden, timestep, text, skips)
        return in_fp32(self._noise, hidden)

    def _noise(self, hidden: Tensor) -> Tensor:
        return self.unpatchify(self.conv_out(F.silu(self.conv_norm_out(hidden))))


class BaselineObjective(nn.Module):
    """Noise prediction on Stage A's latents.

    Batch: `latents_a` (B, 4, H, W); `text` (B, N, D).
    null_text: (N, D) hidden states of the empty caption, which replaces dropped ones.
    """

    null_text: Tensor

    def __init__(self, baseline: Baseline, loss: BaselineLoss, null_text: Tensor) -> None:
        super().__init__()
        self.baseline = baseline
        self.loss = loss
        self.weight = diffusion.weighting(loss.weight)
        self.register_buffer("null_text", null_text, persistent=False)

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        text = diffusion.drop(batch["text"], self.null_text, draws.uniform() < self.loss.text_drop)
        return diffusion.denoising_loss(
            lambda x, t: self.baseline(x, t, text),
            batch["latents_a"].float(),
            draws,
            self.loss.timesteps,
            self.weight,
        )
