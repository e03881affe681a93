"""Blocks shared by the stages, after `modules.py` of dome272/Wuerstchen, with its state-dict key names.

Hidden states are channels-last, (B, H, W, C): LayerNorm, Linear and attention then work in place, and a
convolution sees the same memory as a (B, C, H, W) tensor with `torch.channels_last` strides. Images and
latents at a model's borders are (B, C, H, W). Legend: B batch, H W sides, C channels, N tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` on (B, H, W, C)."""

    def forward(self, input: Tensor) -> Tensor:
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


class GlobalResponseNorm(nn.Module):
    """Global response normalisation over H and W (ConvNeXt V2, arXiv 2301.00808, Algorithm 1).

    At the start it is the identity. The norms are taken in fp32: squares summed over a whole map lose digits
    in half precision. GPUs have a kernel that adds them up so without a copy of the map in fp32; on CPUs that one is up
    to four times slower than the plain formula, and both have the gradient 0 at 0.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        norm = plain_norm(x) if x.device.type == "cpu" else fused_norm(x)
        norm = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return torch.addcmul(self.beta.to(x.dtype), x, (1 + self.gamma * norm).to(x.dtype))


def plain_norm(x: Tensor) -> Tensor:
    """L2 norm over H and W in fp32: (B, H, W, C) -> (B, 1, 1, C)."""
    return x.float().square().sum(dim=(1, 2), keepdim=True).clamp(min=1e-30).sqrt()


def fused_norm(x: Tensor) -> Tensor:
    """`plain_norm` in one kernel, which keeps x as it is for the backward pass."""
    return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)


class NormBeforeProduct(nn.LayerNorm):
    """LayerNorm whose result goes into a product that takes half precision under autocast.

    Autocast for GPUs makes fp32 copies before and after LayerNorm. The kernel itself reckons in fp32 whatever it reads,
    and rounds as the cast after it would: the product sees the same numbers.
    """

    def forward(self, input: Tensor) -> Tensor:
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


def compile_blocks(objective: nn.Module) -> None:
    """Have torch.compile make the kernels of every model of `objective`: of its blocks, equal ones sharing theirs.

    Timestep blocks are among them: recomputing them gains nothing, but fused they pass over a map 5 times and not 11.
    Models without blocks are compiled as a whole; the objective itself, which draws random numbers by seed, is not.
    """
    for model in objective.children():
        blocks: list[nn.Module] = [part for part in model.modules() if isinstance(part, Block | TimestepBlock)]
        for part in blocks or [model]:
            part.compile(dynamic=False)


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
        self, x: Tensor, skip: Tensor | None = None, code: Tensor | None = None, mapper: Conv2d | None = None
    ) -> Tensor:
        """Return (B, H, W, channels); the MLP sees x, `skip` (B, H, W, S) and `mapper(code)`, code (B, H, W, K).

        The 1x1 map of the code is multiplied into the weight that follows: K columns take the place of the
        map's many, which is less work wherever a batch has more than K positions.
        """
        entry, *rest = self.channelwise
        assert isinstance(entry, nn.Linear)
        weight, bias = entry.weight, entry.bias
        inputs = [part for part in (self.norm(self.depthwise(x)), skip, code) if part is not None]
        if mapper is not None:
            assert mapper.bias is not None
            direct, mapped = weight.split([weight.shape[1] - mapper.out_channels, mapper.out_channels], dim=1)
            weight = torch.cat([direct, mapped @ mapper.weight.flatten(1)], dim=1)
            bias = bias + mapped @ mapper.bias
        hidden = F.linear(torch.cat(inputs, dim=-1) if inputs[1:] else inputs[0], weight, bias)
        for layer in rest:
            hidden = layer(hidden)
        return x + hidden


class TimestepBlock(nn.Module):
    """Block T: scale and shift by the timestep's embedding."""

    def __init__(self, channels: int, timestep_channels: int) -> None:
        super().__init__()
        self.mapper = nn.Linear(timestep_channels, 2 * channels)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        scale, shift = self.mapper(timestep)[:, None, None, :].chunk(2, dim=-1)
        return torch.addcmul(shift, x, 1 + scale)


class Attention(nn.Module):
    """Attention of tokens to themselves and a context, with the key names of `nn.MultiheadAttention`."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, tokens: Tensor, context: Tensor | None) -> Tensor:
        """Return (B, N, C) for tokens (B, N, C) and a context (B, M, C)."""
        sizes = [tokens.shape[-1], 2 * tokens.shape[-1]]
        (query_weight, weight), (query_bias, bias) = self.in_proj_weight.split(sizes), self.in_proj_bias.split(sizes)
        query = F.linear(tokens, query_weight, query_bias)
        # One product for all keys and values: autocast casts each weight once, and its gradient is summed in fp32.
        seen = tokens if context is None else torch.cat([tokens, context.to(tokens.dtype)], dim=1)
        key, value = F.linear(seen, weight, bias).chunk(2, dim=-1)
        heads = (self._split(query), self._split(key), self._split(value))
        attended = scaled_dot_product_attention(*heads, self.dropout if self.training else 0.0)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class AttnBlock(Block):
    """Block A: attention of each position to all positions and to the text.

    Its first layer on the text, a SiLU, is the same in all blocks of a model, which applies it once (`activated`).
    """

    def __init__(self, channels: int, cond_width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = norm_before_product(channels)
        self.attention = nn.ModuleDict({"attn": Attention(channels, heads, dropout)})  # the authors' key names
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(cond_width, channels))

    def forward(self, x: Tensor, text: Tensor | None) -> Tensor:
        """Return (B, H, W, channels); text: (B, N, cond_width) as of `activated`."""
        tokens = self.norm(x).flatten(1, 2)
        context = None if text is None else self.kv_mapper[1](text)
        return x + self.attention["attn"](tokens, context).view_as(x)


def activated(text: Tensor) -> Tensor:
    """What all attention blocks of a model see of its text: after their SiLU."""
    return F.silu(text)


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, drop: float) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for (B, heads, N, D), with a share `drop` of the probabilities dropped.

    torch's kernel, but on CPUs in fp32, since its backward pass there is six to twelve times slower in bf16, and
    without it where probabilities are dropped, which none of its fast ones for CPUs can do.
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, dropout_p=drop)
    with torch.autocast("cpu", enabled=False):
        query, key, value = query.float(), key.float(), value.float()
        if drop == 0:
            return F.scaled_dot_product_attention(query, key, value)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        return dropout(scores.softmax(dim=-1), drop) @ value


def dropout(x: Tensor, share: float) -> Tensor:
    """Zero a `share` of x and scale up the rest.

    On CPUs, torch draws a number for each element; 16 bits of one do, and take a fifth of the time. The share
    is then a multiple of 2^-16. A compiler fuses torch's own.
    """
    if x.device.type != "cpu" or not 0 < share < 1 or torch.compiler.is_compiling():
        return F.dropout(x, share)
    numbers = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = numbers.view(torch.int16)[: x.numel()].view(x.shape)
    kept = bits < round((1 - share) * 2**16) - 2**15
    return x * kept.to(x.dtype).div_(1 - share)


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


@contextmanager
def fresh_batch_norm(module: nn.Module) -> Iterator[None]:
    """Measure BatchNorm statistics anew: they become the plain average over all batches that pass meanwhile.

    Running averages lag behind the weights of a short training. Everything but BatchNorm is in evaluation
    mode, and the whole module is so afterwards.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        with torch.no_grad():
            yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        module.eval()
