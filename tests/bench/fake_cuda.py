"""A CUDA device of which nothing is there but its rules: tensors have shapes, dtypes and strides, and no numbers.

So a training step of full size runs on any machine in seconds, and what its kernels would read and write can be
counted. The rules are those of torch's own dispatcher (autocast, layouts of convolutions). Attention and dropout take
the kernels that torch would choose on a card: flash for half precision, the memory-efficient one for fp32; the fused
dropout.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.draws import Draws
from tests.bench.counting import Kernel

CUDA, META = torch.device("cuda", 0), torch.device("meta")
_APPLY = vars(torch._C._FunctionBase)["apply"]  # of a class


class Listener(Protocol):
    """Who hears what a card is asked to do."""

    def __call__(self, function: Any, args: Any, kwargs: Any, made: Any) -> None:
        """Hear of an operator, its arguments by place and name, and what it made."""

    def run(self, kernels: list[Kernel], within: int) -> None:
        """Hear of kernels that a compiler made, and of the bytes that they allocate at most."""


@contextmanager
def fake_cuda() -> Iterator["Card"]:
    """Meanwhile all tensors are fakes, those made without a device lie on the card, and autocast works there."""
    card = Card()
    with ExitStack() as stack:
        for what, substitute in {
            # What asks whether there is a card: autocast switches itself off without one, convolutions leave cuDNN's
            # layout, channels last, and norms of many tensors take a kernel each.
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.is_bf16_supported": lambda *_, **__: True,
            "torch.nn.utils.clip_grad._has_foreach_support": lambda *_: True,
            "torch._C._select_conv_backend": lambda *_, **__: torch._C._ConvBackend.Cudnn,  # type: ignore[attr-defined]
        }.items():
            stack.enter_context(patch(what, substitute))
        stack.enter_context(
            patch.object(Draws, "_generator", lambda self: None)
        )  # a generator of CUDA needs a card too
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(patch.object(F, "dropout", dropout))
        stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        for name in ("__enter__", "__exit__"):
            stack.enter_context(patch.object(torch.autocast, name, card.followed(getattr(torch.autocast, name))))
        stack.enter_context(patch.object(torch.autograd.Function, "apply", classmethod(card.recorded)))
        stack.enter_context(patch.object(FakeTensor, "_normalize_fake_device", staticmethod(_normalised)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(CUDA)
        stack.enter_context(card)
        yield card


class Card(TorchDispatchMode):
    """Sees every operator, and tells autograd that all lies on `meta`, autocast that it lies on the card.

    The engine of autograd wants a context of the device that its nodes were recorded on, which is not there; autocast
    leaves alone what does not lie on its device. Both ask by the same operator. Autograd asks first, and once, for
    what an operator has just made. `listener` hears of every other operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.listener: Listener | None = None
        self._made: set[int] = set()
        self._casts = False

    def followed(self, switch: Callable[..., Any]) -> Callable[..., Any]:
        """What switches autocast, with a note of what it is then: within an operator, torch says that it is off."""

        def switched(*args: Any) -> Any:
            result = switch(*args)
            self._casts = torch.is_autocast_enabled("cuda")
            return result

        return switched

    def recorded(self, function: Any, *args: Any) -> Any:
        """What applies a function with a derivative of its own, of whose result autograd asks as of an operator's."""
        forward = function.forward

        def noted(*given: Any) -> Any:
            made = forward(*given)
            self._made = {id(leaf) for leaf in tree_leaves(made)}
            return made

        with patch.object(function, "forward", staticmethod(noted)):
            return _APPLY.__get__(None, function)(*args)

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Meanwhile nobody listens."""
        listener, self.listener = self.listener, None
        try:
            yield
        finally:
            self.listener = listener

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.prim.device.default:
            return self._device(args[0])
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        records = torch.is_grad_enabled() and function is not torch.ops.aten.detach.default
        records = records and any(
            isinstance(given, Tensor) and given.requires_grad for given in tree_leaves((args, kwargs))
        )
        self._made = {id(leaf) for leaf in tree_leaves(made)} if records else set()
        if self.listener:
            self.listener(function, args, kwargs, made)
        return made

    def _device(self, tensor: Tensor) -> torch.device:
        records = id(tensor) in self._made
        self._made.discard(id(tensor))
        return CUDA if self._casts and not records else META


def record(leaves: list[nn.Parameter]) -> list[Any]:
    """The nodes at which leaves gather their gradients; to be kept, so that they are made here, without autocast."""
    return [leaf.view_as(leaf).grad_fn.next_functions for leaf in leaves]  # type: ignore[union-attr]


def _normalised(device: torch.device) -> torch.device:
    """Every device with its number; what autograd makes where it believes that gradients are lies on the card."""
    return CUDA if device.type in ("meta", "cuda") else device


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What `module.to` does, with new parameters: torch's own swaps tensors in place, which fakes do not bear."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(function(parameter), parameter.requires_grad)
        part._buffers.update({name: function(value) for name, value in part._buffers.items() if value is not None})
    return module


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """The fused kernel, which keeps a byte a number."""
    assert not inplace
    return torch.native_dropout(x, p, True)[0] if training and 0 < p < 1 else x


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **_: Any
) -> Tensor:
    """The kernel's own operator, after autocast's casts."""
    assert attn_mask is None
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    query, key, value = (tensor.to(half) for tensor in (query, key, value))
    if half == torch.float32:
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, None, query.requires_grad or key.requires_grad, dropout_p)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p)[0]
