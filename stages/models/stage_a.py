"""Stage A: the VQGAN that turns pixels into latents with a quarter of the side, and back.

After `vqgan.py` of dome272/Wuerstchen (state-dict keys kept; 122 at full size). Stage B of the paper works on
the unquantised latents; the codebook regularises the training and gives a second way to decode.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.anatomy.memory_estimate import LOOKUP_ROWS
from stages.draws import Draws
from stages.models.discriminator import Discriminator, adversarial_loss, discriminator_loss
from stages.models.geometry import BadImageSize
from stages.models.layers import (
    Block,
    Conv2d,
    ConvTranspose2d,
    Patchify,
    Unpatchify,
    channels_last,
    gelu,
    layer_norm,
    plus,
    to_unit_range,
    xavier_,
)
from stages.settings.losses import StageALoss
from stages.settings.models import StageAConfig

COMMITMENT = 0.25  # weight of the commitment loss beside the codebook loss (arXiv 1711.00937, eq. 3)


class ReplicationPad(nn.ReplicationPad2d):
    """`nn.ReplicationPad2d(1)` on (B, C, H, W).

    torch 2.15 compiles a wrong layout for the gradient of its own kernel where channels lie last; the compiler gets
    the same pad by concatenation, which takes twice as long where nothing fuses it.
    """

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(input)
        wide = torch.cat([input[..., :1], input, input[..., -1:]], dim=-1)
        return torch.cat([wide[..., :1, :], wide, wide[..., -1:, :]], dim=-2)


class MixingBlock(Block):
    """Residual block with six learnt scalars, all zero at the start, which makes it the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = layer_norm(channels)
        self.depthwise = nn.Sequential(ReplicationPad(), nn.Conv2d(channels, channels, 3, groups=channels))
        self.norm2 = layer_norm(channels)
        self.channelwise = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.gammas = nn.Parameter(torch.zeros(6))
        xavier_(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the same. Norms apply scales and shifts, weights the gates: none takes a pass over a map."""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.gammas.unbind()
        (pad, mix), (entry, _, last) = self.depthwise, self.channelwise
        assert isinstance(mix, nn.Conv2d)
        assert mix.bias is not None
        assert isinstance(last, nn.Linear)
        spatial = pad(_scaled(self.norm1, x, scale1, shift1).permute(0, 3, 1, 2))
        mixed = F.conv2d(spatial, mix.weight * gate1, mix.bias * gate1, groups=mix.groups)
        x = plus(x, mixed.permute(0, 2, 3, 1))
        hidden = gelu(entry(_scaled(self.norm2, x, scale2, shift2)))
        return plus(x, F.linear(hidden, last.weight * gate2, last.bias * gate2))


def _scaled(norm: nn.LayerNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift, both ()."""
    shape = norm.normalized_shape
    return F.layer_norm(x, shape, (1 + scale).expand(shape), shift.expand(shape), norm.eps)


class VectorQuantizer(nn.Module):
    """Nearest codebook vectors (arXiv 1711.00937)."""

    def __init__(self, size: int, channels: int, init: str) -> None:
        super().__init__()
        self.codebook = nn.Embedding(size, channels)
        self.in_use: Tensor
        if init == "uniform":  # the embedding itself starts as N(0, 1)
            nn.init.uniform_(self.codebook.weight, -1 / size, 1 / size)

    @torch.no_grad()
    def indices(self, z: Tensor) -> Tensor:
        """Index of the nearest vector of each position: (B, C, H, W) -> (B, H, W) int64."""
        points = z.permute(0, 2, 3, 1)
        codes = self.codebook.weight.detach().float()
        exact = nullcontext() if torch.compiler.is_compiling() else full_fp32()  # by TF32, 1 % would differ
        with torch.autocast(z.device.type, enabled=False), exact:
            offsets = codes.square().sum(dim=1)
            chunks = points.reshape(-1, points.shape[-1]).float().split(LOOKUP_ROWS)
            nearest = [torch.addmm(offsets, chunk, codes.T, alpha=-2).argmin(dim=1) for chunk in chunks]
        return torch.cat(nearest).view(points.shape[:-1])

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, H, W) int64 -> (B, C, H, W)."""
        return self.codebook(indices).permute(0, 3, 1, 2)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise z (B, C, H, W), fp32; the gradient passes straight through to z.

        Also returns the loss: that of the codebook plus 0.25 x commitment. `in_use` is then the share of the codebook
        that some position was nearest to.
        """
        z = z.float()
        indices = self.indices(z)
        size = self.codebook.num_embeddings
        self.in_use = z.new_zeros(size).index_fill(0, indices.flatten(), 1.0).mean()
        q = self.lookup(indices)
        loss = F.mse_loss(q, z.detach()) + COMMITMENT * F.mse_loss(z, q.detach())
        return z + (q - z).detach(), loss


class StageA(nn.Module):
    """The VQGAN: images (B, 3, H, W) in [0, 1], sides divisible by 4 <-> latents (B, 4, H/4, W/4).

    The side ratio is 2^levels.
    """

    def __init__(self, config: StageAConfig) -> None:
        super().__init__()
        self.scale = config.scale
        self.side_ratio = 2**config.levels
        widths = [config.hidden >> level for level in reversed(range(config.levels))]
        self.in_block = nn.Sequential(Patchify(2), Conv2d(3 * 4, widths[0], 1))

        down: list[nn.Module] = [MixingBlock(widths[0])]
        for outer, inner in pairwise(widths):
            down += [Conv2d(outer, inner, 4, stride=2, padding=1), MixingBlock(inner)]
        latents = config.latent_channels
        down += [nn.Sequential(nn.Conv2d(widths[-1], latents, 1, bias=False), nn.BatchNorm2d(latents))]
        self.down_blocks = nn.Sequential(*down)

        self.vquantizer = VectorQuantizer(config.codebook_size, latents, config.codebook_init)

        up: list[nn.Module] = [nn.Sequential(Conv2d(latents, widths[-1], 1))]
        up += [MixingBlock(widths[-1]) for _ in range(config.bottleneck_blocks)]
        for inner, outer in pairwise(reversed(widths)):
            up += [ConvTranspose2d(inner, outer, 4, stride=2, padding=1), MixingBlock(outer)]
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(Conv2d(widths[0], 3 * 4, 1), Unpatchify(2))

    def encode(self, image: Tensor) -> Tensor:
        """Image in [0, 1] -> unquantised latents, divided by `scale`: what is stored and Stage B sees.

        Raises BadImageSize if a side is no multiple of 2^levels: the way back would give another size.
        """
        height, width = image.shape[-2:]
        if height % self.side_ratio or width % self.side_ratio:
            raise BadImageSize(f"image of {width}x{height} px: each side must be a multiple of {self.side_ratio} px")
        return self.features(image) / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as `encode` gives them -> image, not clamped."""
        return self.pixels(latents * self.scale)

    def decode_quantised(self, latents: Tensor) -> Tensor:
        """The same, through the nearest codebook vectors."""
        quantizer = self.vquantizer
        return self.pixels(quantizer.lookup(quantizer.indices(latents * self.scale)))

    def forward(self, image: Tensor, quantised: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct images, through the codebook where `quantised` (B,) is true; also returns its loss."""
        features = self.features(image).float()
        nearest, loss = self.vquantizer(features)
        return self.pixels(torch.where(quantised[:, None, None, None], nearest, features)), loss

    def features(self, image: Tensor) -> Tensor:
        """Encoder without the scale: the space of the codebook."""
        x = self.down_blocks[:-1](self.in_block(image))
        # the last block works on (B, C, H, W), so that SyncBatchNorm can take BatchNorm's place
        return self.down_blocks[-1](x.permute(0, 3, 1, 2))

    def pixels(self, features: Tensor) -> Tensor:
        """Decoder without the scale, from the space of the codebook."""
        return self.out_block(self.up_blocks(channels_last(features)))


class StageAObjective(nn.Module):
    """Reconstruction of `batch["image"]` (B, 3, H, W) uint8, some samples decoded through the codebook.

    discriminator: given exactly where the loss has an adversarial weight. It lives here and in the checkpoints, not in
    Stage A's weights. One loss trains both at once: Stage A's terms see a discriminator with detached parameters, the
    discriminator's term sees a detached reconstruction, so each gets its own gradient from one backward pass, and one
    optimiser steps both from the same weights (GAN trainings with two optimisers step one after the other). They share
    the learning rate, the weight decay and the clipped norm; AdamW's steps do not depend on a gradient's scale. The
    discriminator learns from the first step on, so that it is worth listening to once `adversarial_start` is reached.

    perceptual: distance of reconstructions and images, (B, 3, H, W) twice -> (B,); None leaves that term out. No
    `nn.Module`, so that its weights stay out of the checkpoints (see `stages.training.perceptual`).
    """

    def __init__(
        self,
        stage_a: StageA,
        loss: StageALoss,
        discriminator: Discriminator | None = None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        assert (discriminator is not None) == (loss.adversarial > 0)
        assert not isinstance(perceptual, nn.Module)
        self.stage_a = stage_a
        self.loss = loss
        self.discriminator = discriminator
        self.perceptual = perceptual

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        image = batch["image"]
        if self.loss.crop is not None:
            image = random_crop(image, self.loss.crop, draws.uniform(), draws.uniform())
        image = to_unit_range(image)
        coin = draws.uniform() if self.loss.coin == "sample" else draws.shared_uniform()
        reconstruction, vq = self.stage_a(image, coin < self.loss.quantised)
        error = reconstruction.float() - image
        parts = {
            "l1": error.abs().mean(),
            "mse": error.square().mean(),
            "colour": F.avg_pool2d(error, 4).abs().mean(),
            "vq": vq,
            "codes_in_use": self.stage_a.vquantizer.in_use,
        }
        weights = {"l1": self.loss.l1, "mse": self.loss.mse, "colour": self.loss.colour, "vq": self.loss.vq}
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(reconstruction, image).mean()
            weights["perceptual"] = self.loss.perceptual
        if self.discriminator is not None and self.training:  # validated is what Stage A itself makes
            parts["discriminator"] = discriminator_loss(self.discriminator, image, reconstruction)
            begun = draws.step >= self.loss.adversarial_start
            parts["adversarial"] = (
                adversarial_loss(self.discriminator, reconstruction) if begun else error.new_zeros(())
            )
            weights["discriminator"] = 1.0
            weights["adversarial"] = self.loss.adversarial
        loss = torch.stack([weights[name] * parts[name] for name in weights]).sum()
        return loss, {name: part.detach() for name, part in parts.items()}


@contextmanager
def full_fp32() -> Iterator[None]:
    """Meanwhile products of fp32 numbers are not computed by TF32."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":  # to say so once more is another state to torch, for which it compiles anew
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def random_crop(image: Tensor, side: int, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Square crops of (B, C, H, W), one place a sample, from two sets of U[0, 1) numbers (B,)."""
    batch, _, height, width = image.shape
    span = torch.arange(side, device=image.device)
    top = (vertical * (height - side + 1)).long()[:, None, None] + span[:, None]
    left = (horizontal * (width - side + 1)).long()[:, None, None] + span
    sample = torch.arange(batch, device=image.device)[:, None, None]
    return image[sample, :, top, left].permute(0, 3, 1, 2)
