"""What the networks are made of, from single layers up to their blocks, and what each weighs, computes and keeps.

All is of one sample. What a training keeps is what autograd holds for the backward pass, counted tensor by tensor: the
inputs of products, norms and non-linearities. A block lists its layers in the order in which `stages.models` runs them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import NamedTuple, ParamSpec

P = ParamSpec("P")
FP32, HALF = 4, 2  # bytes of a number


@dataclass(frozen=True)
class Features:
    """The shape of what a layer sees: positions, of a map height x width, of a text its tokens, and their channels."""

    positions: int
    channels: int

    @property
    def numbers(self) -> int:
        return self.positions * self.channels

    def of(self, channels: int) -> "Features":
        """As many positions with other channels."""
        return Features(self.positions, channels)


class Block(NamedTuple):
    """A layer, or several: parameters, multiply-adds (`products`) of a forward pass, and what a training keeps."""

    parameters: int = 0
    products: int = 0
    kept: int = 0  # numbers in the precision of the products: half under autocast, else fp32
    kept_fp32: int = 0  # numbers in fp32
    kept_copies: int = 0  # numbers in half precision under autocast; without it they are among the others
    kept_bytes: int = 0  # bytes of another kind
    recomputed: int = 0  # numbers that enter it, where checkpointing keeps these alone and computes the others again

    def keeping(self, numbers: int) -> "Block":
        """The same, but so many numbers kept in the precision of the products."""
        return self._replace(kept=numbers)

    def bytes_kept(self, autocast: bool) -> int:
        """Bytes that a training without checkpointing keeps."""
        product, copy = (HALF, HALF) if autocast else (FP32, 0)
        return product * self.kept + FP32 * self.kept_fp32 + copy * self.kept_copies + self.kept_bytes


def joined(*parts: Block, recomputed: int = 0) -> Block:
    """Layers one after the other."""
    return Block(*map(sum, zip(*parts, strict=True)))._replace(recomputed=recomputed)


def in_fp32(*parts: Block) -> Block:
    """Layers one after the other that autocast does not reach."""
    whole = joined(*parts)
    return whole._replace(kept=0, kept_fp32=whole.kept + whole.kept_fp32, kept_copies=0)


def summed(network: Callable[P, Iterable[Block]], of: Callable[[Block], int]) -> Callable[P, int]:
    """What the blocks of a network have together, by its settings and the sizes of what goes in."""

    @wraps(network)
    def total(*args: P.args, **kwargs: P.kwargs) -> int:
        return sum(of(block) for block in network(*args, **kwargs))

    return total


# -------------------------------------------------------------------------------------------------- layers


def convolution(x: Features, y: Features, kernel: int = 3, groups: int = 1, bias: bool = True) -> Block:
    """From x to y; where y has more positions, transposed. Keeps x."""
    weights = kernel**2 * x.channels * y.channels // groups
    return Block(weights + bias * y.channels, weights * min(x.positions, y.positions), x.numbers)


def linear(x: Features, channels: int, bias: bool = True) -> Block:
    """A linear layer or a 1x1 convolution. Keeps x."""
    return convolution(x, x.of(channels), 1, bias=bias)


def attention(x: Features, context: int) -> Block:
    """Scores of x's positions with those of a context, and sums of values by them. Keeps queries, keys and values."""
    return Block(products=2 * x.numbers * context, kept=x.numbers + 2 * context * x.channels)


def norm(x: Features, affine: bool = False) -> Block:
    """LayerNorm or GroupNorm, in fp32 also under autocast. Keeps x."""
    return Block(affine * 2 * x.channels, kept_fp32=x.numbers)


def norm_before_product(x: Features) -> Block:
    """LayerNorm whose result goes into a product: it reads, and keeps, x in half precision. Keeps x."""
    return Block(kept=x.numbers)


def batch_norm(x: Features) -> Block:
    """BatchNorm with scale and shift. Keeps x."""
    return Block(2 * x.channels, kept=x.numbers)


def activation(x: Features) -> Block:
    """A non-linearity. Keeps x."""
    return Block(kept=x.numbers)


# -------------------------------------------------------------------------------------------------- blocks


def mixing(x: Features) -> Block:
    """Stage A's block: a depthwise convolution, then an MLP, each between a norm and a gate."""
    inner = x.of(4 * x.channels)
    gammas = Block(3)  # scale and shift that the norm applies, and a gate that the weight does
    return joined(
        norm(x),
        Block(kept_fp32=x.numbers),  # padding
        convolution(x, x, groups=x.channels),
        gammas,
        norm(x),
        linear(x, inner.channels),
        activation(inner),
        linear(inner, x.channels),
        gammas,
        recomputed=x.numbers,
    )


def block_c(x: Features, skip: int = 0, code: int = 0, mapped: int = 0) -> Block:
    """Block C of Stage B and C: a depthwise convolution, then an MLP.

    The MLP also sees `skip` channels from the way down, and the code's map of `mapped` channels. That map is multiplied
    into the MLP's weight, so that a training keeps the `code` channels it is made from.
    """
    inner, seen = x.of(4 * x.channels), x.of(x.channels + skip + mapped)
    return joined(
        convolution(x, x, groups=x.channels),
        norm_before_product(x),
        linear(seen, inner.channels).keeping(x.numbers + x.positions * (skip + code)),
        activation(inner),
        Block(2 * inner.channels, kept=inner.numbers),  # global response norm
        Block(kept_bytes=inner.numbers),  # dropout's mask
        linear(inner, x.channels),
        recomputed=x.numbers,
    )


def block_t(x: Features, timestep: int) -> Block:
    """Block T of Stage B and C: scale and shift by a timestep of so many channels."""
    return linear(Features(1, timestep), 2 * x.channels).keeping(x.numbers)


def block_a(x: Features, text: Features) -> Block:
    """Block A of Stage B and C: attention of each position to all positions and to the text."""
    mapped = text.of(x.channels)
    return joined(
        norm_before_product(x),
        linear(x, 3 * x.channels),
        linear(text, x.channels),
        linear(mapped, 2 * x.channels)._replace(parameters=0),  # the text's keys and values, by the same weights
        Block(kept=x.numbers),  # the positions, joined with the text
        attention(x, x.positions + text.positions),
        linear(x, x.channels),
        recomputed=x.numbers,
    )


def residual(x: Features, channels: int, timestep: int) -> Block:
    """The baseline's block of two convolutions, with a timestep of so many channels in between."""
    y = x.of(channels)
    shortcut = linear(x, channels)._replace(kept=0, kept_copies=x.numbers)
    return joined(
        in_fp32(norm(x, affine=True), activation(x)),
        convolution(x, y),
        linear(Features(1, timestep), channels).keeping(0),
        in_fp32(norm(y, affine=True), activation(y)),
        convolution(y, y),
        *[shortcut] * (x != y),
        recomputed=x.numbers,
    )


def transformer(x: Features, text: Features, depth: int) -> Block:
    """The baseline's block of attention to all positions, attention to the text, and a gated MLP, `depth` times."""
    inner = x.of(4 * x.channels)
    repeat = (
        norm(x, affine=True),
        linear(x, 3 * x.channels, bias=False),
        attention(x, x.positions),
        linear(x, x.channels),
        norm(x, affine=True),
        linear(x, x.channels, bias=False),
        linear(text, x.channels, bias=False),  # keys
        linear(text, x.channels, bias=False),  # values
        attention(x, text.positions),
        linear(x, x.channels),
        norm(x, affine=True),
        linear(x, 2 * inner.channels),
        Block(kept=3 * inner.numbers),  # value, gate, and the gate's GELU
        linear(inner, x.channels),
    )
    ends = linear(x, x.channels)
    return joined(norm(x, affine=True), ends, *depth * repeat, ends, recomputed=x.numbers)
