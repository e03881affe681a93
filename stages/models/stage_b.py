"""Stage B: the latent diffusion model that turns the compressor's code into Stage A's latents.

After `DiffNeXt` of dome272/Wuerstchen's `modules.py` (state-dict keys kept; 814 at full size): a U-Net of
convolution, timestep and attention blocks. The code enters every convolution block of the levels that inject
it, the text by attention.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages import diffusion
from stages.draws import Draws
from stages.models.attention import AttnBlock, SeenText, activated
from stages.models.layers import (
    Conv2d,
    ConvTranspose2d,
    Patchify,
    ResBlock,
    TimestepBlock,
    Unpatchify,
    channels_last,
    damp_residuals_,
    embedded,
    in_fp32,
    layer_norm,
    norm_before_product,
    to_unit_range,
    xavier_,
)
from stages.settings.losses import StageBLoss
from stages.settings.models import StageBConfig

if TYPE_CHECKING:  # needs torchvision
    from stages.models.compressor import Compressor

B_FLOOR = 1e-3  # the divisor of the output stays within [0.001, 0.999]


class StageB(nn.Module):
    """Noise predictor on Stage A's latents. At the start it returns twice its input."""

    def __init__(self, config: StageBConfig) -> None:
        super().__init__()
        self.timestep_channels = config.timestep_channels
        self.latent_channels = config.latent_channels
        self.patch = config.patch
        widths, cond, injects = config.widths, config.cond_width, config.inject_code

        self.clip_mapper = nn.Linear(config.text_width, cond)
        self.seq_norm = layer_norm(cond)
        places = (*injects, *reversed(injects))  # the levels down, then the levels up
        mappers = {str(i): Conv2d(config.code_channels, cond, 1) for i, inject in enumerate(places) if inject}
        self.effnet_mappers = nn.ModuleDict(mappers)
        entry = Conv2d(config.latent_channels * config.patch**2, widths[0], 1)
        self.embedding = nn.Sequential(Patchify(config.patch), entry, layer_norm(widths[0]))

        def block(kind: str, level: int, skip: int) -> nn.Module:
            if kind == "C":
                return ResBlock(widths[level], skip + (cond if injects[level] else 0), config.dropout)
            if kind == "T":
                return TimestepBlock(widths[level], config.timestep_channels)
            return AttnBlock(widths[level], cond, config.heads[level], config.dropout)

        def repeats(level: int, skip: int = 0) -> list[nn.Module]:
            """The level's blocks; the first one also sees `skip` channels from the way down."""
            kinds = config.patterns[level] * config.blocks[level]
            return [block(kind, level, skip if i == 0 else 0) for i, kind in enumerate(kinds)]

        self.down_blocks = nn.ModuleList([nn.ModuleList(repeats(0))])
        for level in range(1, len(widths)):
            shrink = Conv2d(widths[level - 1], widths[level], 2, stride=2)
            resampler = nn.Sequential(norm_before_product(widths[level - 1]), shrink)
            self.down_blocks.append(nn.ModuleList([resampler, *repeats(level)]))

        self.up_blocks = nn.ModuleList()
        for level in range(len(widths) - 1, 0, -1):
            grow = ConvTranspose2d(widths[level], widths[level - 1], 2, stride=2)
            resampler = nn.Sequential(norm_before_product(widths[level]), grow)
            skip = widths[level] if level < len(widths) - 1 else 0
            self.up_blocks.append(nn.ModuleList([*repeats(level, skip), resampler]))
        self.up_blocks.append(nn.ModuleList(repeats(0, widths[0] if len(widths) > 1 else 0)))

        head = Conv2d(widths[0], 2 * config.latent_channels * config.patch**2, 1)
        self.clf = nn.Sequential(layer_norm(widths[0]), head, Unpatchify(config.patch))

        xavier_(self)
        for mapper in mappers.values():
            nn.init.normal_(mapper.weight, std=config.code_mapper_std)
        nn.init.normal_(self.clip_mapper.weight, std=0.02)
        nn.init.xavier_uniform_(entry.weight, gain=0.02)
        nn.init.zeros_(head.weight)
        damp_residuals_(self, sum(config.blocks))

    def forward(self, x: Tensor, t: Tensor, code: Tensor, text: Tensor | SeenText | None = None) -> Tensor:
        """Predict the noise in x.

        x: (B, 4, H, W) noisy latents, sides divisible by 16 (patch x 2^(levels - 1)); t: (B,) fp32 in [0, 1], or
        (1,) for all; code: (B, 16, h, w), the compressor's raw output; text: (B, N, D) hidden states, or what `see`
        made of them, or None for a model that was trained without. Returns (B, 4, H, W) fp32.
        """
        timestep = embedded(t, self.timestep_channels)
        seen = iter(text) if isinstance(text, tuple) else repeat(None)
        read = self._read(text) if isinstance(text, Tensor) else None
        levels = len(self.down_blocks)
        sides = [(x.shape[-2] // self.patch >> level, x.shape[-1] // self.patch >> level) for level in range(levels)]
        injects = [str(level) in self.effnet_mappers for level in range(levels)]
        codes = [_resized(code, *side) if inject else None for inject, side in zip(injects, sides, strict=True)]

        hidden = self.embedding(x)
        skips: list[Tensor | None] = []
        for level, blocks in enumerate(self.down_blocks):
            hidden = _run(blocks, hidden, timestep, read, seen, None, codes[level], self._mapper(level))
            skips.append(hidden)
        skips[-1] = None  # the deepest level goes on as `hidden` itself
        for place, blocks in enumerate(self.up_blocks, start=levels):
            level = 2 * levels - 1 - place
            hidden = _run(blocks, hidden, timestep, read, seen, skips[level], codes[level], self._mapper(place))
        a, b = in_fp32(self.clf, hidden).chunk(2, dim=1)
        return (x.float() - a) / (b.sigmoid() * (1 - 2 * B_FLOOR) + B_FLOOR)

    def see(self, text: Tensor) -> SeenText:
        """What `forward` needs of texts (B, N, D), once for all steps of a drawing."""
        read = self._read(text)
        return tuple(block.see(read) for block in self.modules() if isinstance(block, AttnBlock))  # as `forward` goes

    def _read(self, text: Tensor) -> Tensor:
        return activated(self.seq_norm(self.clip_mapper(text)))

    def freeze_text(self) -> None:
        """Exclude from training what only text reaches."""
        self.clip_mapper.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, AttnBlock):
                module.kv_mapper.requires_grad_(False)

    def _mapper(self, place: int) -> Tensor | None:
        """The map of the code, as `ResBlock` takes it, for a level on the way down or, counted on, on the way up."""
        if str(place) not in self.effnet_mappers:
            return None
        mapper = self.effnet_mappers[str(place)]
        assert isinstance(mapper, Conv2d)
        assert mapper.bias is not None
        return torch.cat([mapper.weight.flatten(1), mapper.bias[:, None]], dim=1)


def _resized(code: Tensor, height: int, width: int) -> Tensor:
    """(B, C, h, w) -> (B, height, width, C), resized as released."""
    resized = F.interpolate(code.float(), (height, width), mode="bicubic", antialias=True, align_corners=True)
    return channels_last(resized)


def _run(
    blocks: nn.Module,
    x: Tensor,
    timestep: Tensor,
    text: Tensor | None,
    seen: Iterator[Tensor | None],
    skip: Tensor | None,
    code: Tensor | None,
    mapper: Tensor | None,
) -> Tensor:
    """Pass x through one level. `skip`, from the way down, enters its first block only; `seen` is one a block."""
    for block in blocks.children():
        if isinstance(block, ResBlock):
            x = block(x, skip, code, mapper)
            skip = None
        elif isinstance(block, TimestepBlock):
            x = block(x, timestep)
        elif isinstance(block, AttnBlock):
            x = block(x, text, next(seen))
        else:
            x = block(x)
    return x


class StageBObjective(nn.Module):
    """Noise prediction on Stage A's latents, with the compressor trained along or frozen.

    Batch: `image` (B, 3, H, W) uint8, `latents_a` (B, 4, H/4, W/4), and `text` (B, N, D) unless `null_text`
    is None. null_text: (N, D) hidden states of the empty caption; None trains Stage B without text.
    """

    def __init__(
        self,
        stage_b: StageB,
        compressor: "Compressor",
        loss: StageBLoss,
        null_text: Tensor | None,
        train_compressor: bool = True,
    ) -> None:
        super().__init__()
        self.stage_b = stage_b
        self.compressor = compressor
        self.loss = loss
        self.weight = diffusion.weighting(loss.weight)
        self.train_compressor = train_compressor
        self.null_text: Tensor | None
        self.register_buffer("null_text", null_text, persistent=False)
        if not train_compressor:
            compressor.requires_grad_(False)
        if null_text is None:
            stage_b.freeze_text()

    def train(self, mode: bool = True) -> "StageBObjective":
        super().train(mode)
        self.compressor.train(mode and self.train_compressor)
        return self

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        code = self._corrupted(self.compressor(to_unit_range(batch["image"])), draws)
        text = None
        if self.null_text is not None:
            text = diffusion.drop(batch["text"], self.null_text, draws.uniform() < self.loss.text_drop)
        return diffusion.denoising_loss(
            lambda x, t: self.stage_b(x, t, code, text),
            batch["latents_a"].float(),
            draws,
            self.loss.timesteps,
            self.weight,
        )

    def _corrupted(self, code: Tensor, draws: Draws) -> Tensor:
        """Zero the code of some samples, diffuse that of others; the compressor stays in the graph."""
        fate = draws.uniform()
        noisy = (self.loss.code_drop <= fate) & (fate < self.loss.code_drop + self.loss.code_noise)
        abar = diffusion.alpha_bar(draws.uniform() * self.loss.code_noise_t)
        noise = draws.normal(*code.shape[1:]) * self.compressor.code_std
        code = torch.where(noisy[:, None, None, None], diffusion.add_noise(code, noise, abar), code)
        return code * (fate >= self.loss.code_drop)[:, None, None, None]
