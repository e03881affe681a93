"""Blocks shared by the stages, after `modules.py` of dome272/Wuerstchen, with its state-dict key names.

Hidden states are channels-last, (B, H, W, C): LayerNorm, Linear and attention then work in place, and a
convolution sees the same memory as a (B, C, H, W) tensor with `torch.channels_last` strides. Images and
latents at a model's borders are (B, C, H, W). Legend: B batch, H W sides, C channels, N tokens.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from stages.models.response_norm import GlobalResponseNorm


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` on (B, H, W, C). One of 1x1 is a product, for which torch's convolution on CPUs copies its input."""

    def forward(self, input: Tensor) -> Tensor:
        if self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1:
            return F.linear(input, self.weight.flatten(1), self.bias)
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvTranspose2d(nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` on (B, H, W, C)."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2), output_size).permute(0, 2, 3, 1)


class Patchify(nn.Module):
    """(B, C, H, W) -> (B, H/p, W/p, C p^2), channels in the order of `nn.PixelUnshuffle`."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(F.pixel_unshuffle(x, self.patch))


class Unpatchify(nn.Module):
    """(B, H, W, C p^2) -> (B, C, H p, W p), channels in the order of `nn.PixelShuffle`."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x.permute(0, 3, 1, 2), self.patch)


class NormBeforeProduct(nn.LayerNorm):
    """LayerNorm whose result goes into a product that takes half precision under autocast.

    Autocast for GPUs makes fp32 copies before and after LayerNorm. The kernel itself reckons in fp32 whatever it reads,
    and rounds as the cast after it would: the product sees the same numbers.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input)


class Dropout(nn.Dropout):
    """`nn.Dropout` by `dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p) if self.training else input


class Block(nn.Module):
    """A block that can recompute its activations in the backward pass instead of keeping them (arXiv 1604.06174)."""

    checkpointing = False

    def __call__(self, *inputs: Any) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False)  # with the same dropout
        return super().__call__(*inputs)


def checkpoint_blocks(module: nn.Module, enabled: bool) -> None:
    """Switch the recomputation of activations in all blocks of `module`; results and gradients stay the same."""
    for block in module.modules():
        if isinstance(block, Block):
            block.checkpointing = enabled


def compile_blocks(objective: nn.Module, graphs: bool = False) -> None:
    """Have torch.compile make the kernels of every model of `objective`: of its blocks, equal ones sharing theirs.

    Timestep blocks are among them: recomputing them gains nothing, but fused they pass over a map 5 times and not 11.
    Models without blocks are compiled as a whole; the objective itself, which draws random numbers by seed, is not.

    graphs: GPUs play the kernels back as CUDA graphs. Whoever calls the models says where a step begins
    (`torch.compiler.cudagraph_mark_step_begin`): all that graphs have made, gradients too, is gone from then on.
    """
    options: dict[str, Any] | None = {"triton.cudagraphs": True} if graphs else None
    for model in objective.children():
        blocks: list[nn.Module] = [part for part in model.modules() if isinstance(part, Block | TimestepBlock)]
        for part in blocks or [model]:
            part.compile(dynamic=False, options=options)


def uncompile(objective: nn.Module) -> None:
    """Have all of it run as it is written again."""
    for part in objective.modules():
        part._compiled_call_impl = None


class ResBlock(Block):
    """Convolution block C: depthwise 3x3, then an MLP over its channels and `skip` further ones."""

    def __init__(self, channels: int, skip: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.depthwise = Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)
        self.norm = norm_before_product(channels)
        self.channelwise = nn.Sequential(
            nn.Linear(channels + skip, 4 * channels),
            nn.GELU(),
            GlobalResponseNorm(4 * channels),
            Dropout(dropout),
            nn.Linear(4 * channels, channels),
        )

    def forward(
        self, x: Tensor, skip: Tensor | None = None, code: Tensor | None = None, mapper: Tensor | None = None
    ) -> Tensor:
        """Return (B, H, W, channels); the MLP sees x, `skip` (B, H, W, S) and the map of `code` (B, H, W, K).

        mapper: (M, K + 1), of the map to M channels the weight, and its bias as the last column. It is multiplied into
        the weight that follows: K columns take the place of the map's many, which is less work wherever a batch has
        more than K positions.
        """
        entry, _, norm, drop, last = self.channelwise
        assert isinstance(entry, nn.Linear)
        weight, bias = entry.weight, entry.bias
        seen = self.norm(self.depthwise(x))
        more = [part.to(seen.dtype) for part in (skip, code) if part is not None]
        if mapper is not None:
            sizes = [weight.shape[1] - mapper.shape[0], mapper.shape[0]]
            direct, mapped = weight.to(seen.dtype).split(sizes, dim=1)
            of_code, shift = (mapped @ mapper).split([mapper.shape[1] - 1, 1], dim=1)
            weight, bias = torch.cat([direct, of_code], dim=1), bias + shift.squeeze(1)
        hidden = gelu(F.linear(torch.cat([seen, *more], dim=-1) if more else seen, weight, bias))
        return plus(x, last(drop(norm(hidden))))


class TimestepBlock(nn.Module):
    """Block T: scale and shift by the timestep's embedding."""

    def __init__(self, channels: int, timestep_channels: int) -> None:
        super().__init__()
        self.mapper = nn.Linear(timestep_channels, 2 * channels)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """x (B, H, W, C); timestep (B, channels), or (1, channels) where all samples have the same."""
        scale, shift = self.mapper(timestep)[:, None, None, :].chunk(2, dim=-1)
        if torch.is_grad_enabled():
            modulated: Tensor = _Modulation.apply(x, scale, shift)
            return modulated
        return torch.addcmul(shift, x, 1 + scale)


class _Modulation(torch.autograd.Function):
    """x (1 + scale) + shift. torch's own derivative of `addcmul` multiplies a whole map by 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        factor = 1 + scale
        ctx.save_for_backward(x, factor)
        return torch.addcmul(shift, x, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, factor = ctx.saved_tensors
        return gradient * factor, (gradient * x).sum_to_size(factor.shape), gradient.sum_to_size(factor.shape)


def dropout(x: Tensor, share: float) -> Tensor:
    """Zero a `share` of x and scale up the rest.

    On CPUs, torch draws a number for each element; 16 bits of one do, and take a fifth of the time. The share
    is then a multiple of 2^-16. A compiler fuses torch's own.
    """
    if x.device.type != "cpu" or not 0 < share < 1 or torch.compiler.is_compiling():
        return F.dropout(x, share)
    return x * kept(x.shape, share).to(x.dtype).div_(1 - share)


def kept(shape: Sequence[int], share: float) -> Tensor:
    """Which elements stay where a `share` is dropped: bool of a shape, on the CPU, by 16 bits of randomness each."""
    size = math.prod(shape)
    numbers = torch.empty((size + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return numbers.view(torch.int16)[:size].view(shape) < round((1 - share) * 2**16) - 2**15


def gelu(x: Tensor) -> Tensor:
    """GELU; in x's own memory where no gradient is wanted."""
    return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


def plus(x: Tensor, branch: Tensor) -> Tensor:
    """A residual sum; in the branch's memory where no gradient is wanted."""
    return x + branch if torch.is_grad_enabled() or branch.dtype != x.dtype else branch.add_(x)


def layer_norm(channels: int) -> nn.LayerNorm:
    """LayerNorm over channels, without parameters, as everywhere in Würstchen."""
    return nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)


def norm_before_product(channels: int) -> NormBeforeProduct:
    """`layer_norm` where a product follows."""
    return NormBeforeProduct(channels, elementwise_affine=False, eps=1e-6)


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Sines then cosines of 10000 t at `channels / 2` frequencies from 1 to 1/10000.

    t: (B,) fp32 in [0, 1]; half precision would lose the phase. Returns (B, channels) fp32.
    """
    assert t.dtype == torch.float32, "timesteps stay in fp32"
    half = channels // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000) / (half - 1))
    angles = (t * 10000)[:, None] * exponents.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def embedded(t: Tensor, channels: int) -> Tensor:
    """`timestep_embedding` as all products of a model see it: under autocast cast once, and not in each of them."""
    embedding, kind = timestep_embedding(t, channels), t.device.type
    return embedding.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else embedding


def in_fp32(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a module or function to `x` in fp32, also under autocast.

    On GPUs products and convolutions of fp32 numbers may take TF32 (10 bits of mantissa), as torch is told to.
    """
    with torch.autocast(x.device.type, enabled=False):
        return function(x.float())


def to_unit_range(image: Tensor) -> Tensor:
    """uint8 pixels -> fp32 in [0, 1], the range of Stage A and of the compressor."""
    assert image.dtype == torch.uint8
    return image.float() / 255


def resized(image: Tensor, size: int | Sequence[int]) -> Tensor:
    """uint8 pictures (B, C, H, W) -> of another side, or height and width; bilinear, antialiased; or as they are."""
    assert image.dtype == torch.uint8
    size = (size, size) if isinstance(size, int) else tuple(size)
    if image.shape[-2:] == size:
        return image
    smaller = F.interpolate(image.float(), size, mode="bilinear", antialias=True, align_corners=False)
    return smaller.round().clamp(0, 255).to(torch.uint8)


def xavier_(module: nn.Module) -> None:
    """The authors' general start: Xavier-uniform weights and zero biases in every Linear and Conv2d."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def damp_residuals_(module: nn.Module, depth: int) -> None:
    """The authors' start of the blocks: last weight of each MLP x depth^-1/2, timestep maps zero."""
    for block in module.modules():
        if isinstance(block, ResBlock):
            last = block.channelwise[-1]
            assert isinstance(last, nn.Linear)
            last.weight.mul_(depth**-0.5)
        elif isinstance(block, TimestepBlock):
            nn.init.zeros_(block.mapper.weight)
