"""A CUDA device of which nothing is there but its rules: tensors have shapes, dtypes and strides, and no numbers.

So a training step of full size runs on any machine in seconds, and what its kernels would read and write can be counted.
The rules are those of torch's own dispatcher (autocast, layouts of convolutions). Attention and dropout take the kernels
that torch would choose on a card: flash for half precision, the memory-efficient one for fp32; the fused dropout.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.draws import Draws

CUDA, META = torch.device("cuda", 0), torch.device("meta")


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Meanwhile all tensors are fakes, those made without a device lie on the CUDA device, and autocast works there."""
    recorded = _Recorded()
    with ExitStack() as stack:
        for what, substitute in {
            # What asks whether there is a card: autocast switches itself off without one.
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        }.items():
            stack.enter_context(patch(what, substitute))
        stack.enter_context(patch.object(Draws, "_generator", lambda self: None))  # a generator of CUDA needs a card too
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(patch.object(F, "dropout", dropout))
        stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        for name in ("__enter__", "__exit__"):
            stack.enter_context(patch.object(torch.autocast, name, recorded.followed(getattr(torch.autocast, name))))
        stack.enter_context(patch.object(FakeTensor, "_normalize_fake_device", staticmethod(_normalised)))
        handlers = {torch.ops.prim.device.default: recorded.device}
        stack.enter_context(patch.dict(fake_tensor._DISPATCH_META_HANDLERS, handlers))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(CUDA)
        stack.enter_context(recorded)
        yield


class _Recorded(TorchDispatchMode):
    """Tells autograd that all lies on `meta`, and autocast that it lies on the card.

    The engine of autograd wants a context of the device that its nodes were recorded on, which is not there; autocast
    leaves alone what does not lie on its device. Both ask by the same operator. Autograd asks first, and once, for
    what an operator has just made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()
        self.casts = False

    def followed(self, switch: Callable[..., Any]) -> Callable[..., Any]:
        """What switches autocast, with a note of what it is then: within an operator, torch itself says that it is off."""

        def switched(*args: Any) -> Any:
            result = switch(*args)
            self.casts = torch.is_autocast_enabled("cuda")
            return result

        return switched

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.detach.default:
            self.made = set()
        elif function is not torch.ops.prim.device.default:
            given = tree_leaves((args, kwargs))
            follows = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given)
            self.made = {id(leaf) for leaf in tree_leaves(made)} if follows else set()
        return made

    def device(self, args: tuple[Tensor]) -> torch.device:
        """Where the one who asks shall believe that a tensor lies."""
        (tensor,) = args
        records = id(tensor) in self.made
        self.made.discard(id(tensor))  # autograd asks once
        return CUDA if self.casts and not records else META


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
