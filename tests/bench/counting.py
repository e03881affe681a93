"""What the kernels of a piece of work would do: operations, FLOPs, bytes moved, and the memory alive at most.

Every operator that torch dispatches counts as a kernel which reads each of its inputs once and writes each of its
outputs once, all from and to the device's memory. Views move nothing. So the bytes are what is moved at least where
nothing is fused, and a kernel's time at best is the longer one of its FLOPs at the card's peak and its bytes at the
card's bandwidth.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_FREE = {  # no kernel, though their schemas do not say so
    aten._unsafe_view,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten.lift_fresh,
    aten.is_same_size,
}
_WRITE_ONLY = {aten.copy_, aten.fill_, aten.zero_, aten.normal_, aten.uniform_, aten.random_, aten.bernoulli_}


@dataclass(frozen=True)
class Kernel:
    """One kernel: its name, FLOPs of matrix products and convolutions, the bits of their numbers, bytes moved."""

    name: str
    flops: float
    bits: int
    bytes: int


@dataclass
class Work:
    """All kernels of a piece of work, in their order, and the most bytes alive meanwhile."""

    kernels: list[Kernel] = field(default_factory=list)
    peak: int = 0

    @property
    def operations(self) -> int:
        """How many kernels there are, and so launches by the host."""
        return len(self.kernels)

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def flops(self) -> float:
        """Of matrix products and convolutions, those that are computed twice included."""
        return sum(kernel.flops for kernel in self.kernels)

    def seconds(self, flops: float, bandwidth: float) -> float:
        """At best, on a card of so many dense bf16 FLOP/s (of TF32, half as many) and bytes a second."""
        return sum(seconds_of(kernel, flops, bandwidth) for kernel in self.kernels)


def seconds_of(kernel: Kernel, flops: float, bandwidth: float) -> float:
    """A kernel at best."""
    return max(kernel.flops / (flops * 16 / kernel.bits), kernel.bytes / bandwidth)


class Counter:
    """Collects the kernels of the operators it hears of. `beside`: tensors that are there already, and alive."""

    def __init__(self, beside: Iterable[Tensor] = ()) -> None:
        self.work = Work()
        self._alive: dict[int, int] = {}
        self._bytes = 0
        self.hold(list(beside))

    def __call__(self, function: Any, args: Any, kwargs: Any, made: Any) -> None:
        """Hear of an operator, its arguments, and what it made."""
        if not is_free(function) and not _stays(function, args, made):
            self.work.kernels.append(kernel_of(function, args, kwargs, made))
        self.hold(made)

    def run(self, kernels: list[Kernel], within: int) -> None:
        """Hear of kernels that run one after the other; `within`: bytes that they allocate at most."""
        self.work.kernels += kernels
        self.hold((), within)

    def hold(self, made: Any, within: int = 0) -> None:
        """What was made is alive from here on; `within`: bytes alive meanwhile and gone already."""
        self.work.peak = max(self.work.peak, self._bytes + within)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        self.work.peak = max(self.work.peak, self._bytes)

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = storage.nbytes()
            self._bytes += storage.nbytes()
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self._bytes -= self._alive.pop(key)


@cache
def is_free(function: Any) -> bool:
    """Whether an operator starts no kernel: a view, a question, an allocation."""
    if function.overloadpacket in _FREE:
        return True
    returns = function._schema.returns
    aliases = [found.alias_info for found in returns if found.alias_info]
    if function.namespace == "prim" or not (returns or _writes(function)):
        return True
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _stays(function: Any, args: Any, made: Any) -> bool:
    """Whether a tensor is moved to where it is: on a real device nothing happens then."""
    if function is not aten._to_copy.default:
        return False
    return (args[0].dtype, args[0].stride(), args[0].device) == (made.dtype, made.stride(), made.device)


def kernel_of(function: Any, args: Any, kwargs: Any, made: Any) -> Kernel:
    """What an operator with these arguments reads, computes and writes."""
    packet = function.overloadpacket
    read, written = [], []
    for place, argument in enumerate(function._schema.arguments):
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes:
            written += tensors
        if not (writes and packet in _WRITE_ONLY):
            read += tensors
    known = {id(tensor) for tensor in written}
    written += [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and id(leaf) not in known]
    count = sum(touched(tensor) for tensor in {id(tensor): tensor for tensor in read}.values())
    count += sum(touched(tensor) for tensor in written)
    flops = flops_of(packet, args, kwargs, made)
    bits = 8 * read[0].element_size() if flops else 32
    return Kernel(str(packet).removeprefix("aten."), flops, bits, count)


def _writes(function: Any) -> bool:
    return any(each.alias_info and each.alias_info.is_write for each in function._schema.arguments)


def touched(tensor: Tensor) -> int:
    """Bytes of a tensor, those that are repeated by a stride of 0 once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


def flops_of(packet: Any, args: Any, kwargs: Any, made: Any) -> float:
    """FLOPs of matrix products, attention and convolutions; of those in groups torch's own count is wrong backward."""
    if packet == aten.convolution:  # each number of the weight meets each position of the smaller side once
        return _products(args[0] if args[6] else made, args[1])
    if packet == aten.convolution_backward:
        return sum(args[10][:2]) * _products(args[1] if args[7] else args[0], args[2])
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=made))
    return 0.0


def _products(x: Tensor, weight: Tensor) -> float:
    """2 x positions of x (B, C, H, W), all samples' together, x numbers of the weight."""
    return 2.0 * x.numel() / x.shape[1] * weight.numel()
