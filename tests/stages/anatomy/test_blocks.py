"""What each block weighs, computes and keeps, against the block itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stages.anatomy import blocks
from stages.anatomy.blocks import Block, Features
from stages.models.attention import AttnBlock
from stages.models.baseline import Residual, Transformer
from stages.models.layers import ResBlock, TimestepBlock
from stages.models.stage_a import MixingBlock

X, TEXT, TIMESTEP = Features(12 * 8, 64), Features(9, 40), 16
WIDE = Features(48 * 32, 64)  # so wide that the weights with their gates, kept once a batch, are little
Input = Callable[[], Tensor]


def map_of(channels: int, height: int = 12, width: int = 8) -> Input:
    return lambda: torch.randn(1, height, width, channels, requires_grad=True)


def text() -> Tensor:
    return torch.randn(1, TEXT.positions, TEXT.channels, requires_grad=True)


def timestep() -> Tensor:
    return torch.randn(1, TIMESTEP)


CASES: dict[str, tuple[Block, Callable[[], nn.Module], list[Input]]] = {
    "mixing": (blocks.mixing(WIDE), lambda: MixingBlock(64), [map_of(64, 48, 32)]),
    "C": (blocks.block_c(X), lambda: ResBlock(64), [map_of(64)]),
    "C with a skip": (blocks.block_c(X, skip=32), lambda: ResBlock(64, 32), [map_of(64), map_of(32)]),
    "T": (blocks.block_t(X, TIMESTEP), lambda: TimestepBlock(64, TIMESTEP), [map_of(64), timestep]),
    "A": (blocks.block_a(X, TEXT), lambda: AttnBlock(64, 40, 4), [map_of(64), text]),
    "residual": (blocks.residual(X, 64, TIMESTEP), lambda: Residual(64, 64, TIMESTEP, 8), [map_of(64), timestep]),
    "residual with a shortcut": (
        blocks.residual(X.of(96), 64, TIMESTEP),
        lambda: Residual(96, 64, TIMESTEP, 8),
        [map_of(96), timestep],
    ),
    "transformer": (blocks.transformer(X, TEXT, 2), lambda: Transformer(64, 4, 40, 2, 8), [map_of(64), text]),
}


def kept_bytes(module: nn.Module, inputs: list[Tensor]) -> int:
    """Bytes of the tensors that autograd keeps after a forward pass in fp32, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module.train()(*inputs)
    return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in weights)


@pytest.mark.parametrize(("block", "build", "inputs"), CASES.values(), ids=CASES)
def test_a_block_is_as_it_is_described(block, build, inputs):
    module, given = build(), [make() for make in inputs]
    assert block.parameters == sum(parameter.numel() for parameter in module.parameters())
    dropouts = block.kept_bytes  # masks, of which there are none here
    assert block.bytes_kept(autocast=False) - dropouts == pytest.approx(kept_bytes(module, given), rel=0.05)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(*given)
    assert 2 * block.products == counter.get_total_flops()


@pytest.mark.parametrize("name", [name for name in CASES if name != "T"])
def test_checkpointing_keeps_what_enters(name):
    block, _, inputs = CASES[name]
    assert block.recomputed == inputs[0]().numel()
