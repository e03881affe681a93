"""torch.compile on a card that is not there: torch's own graphs, fused, priced and shared."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from stages.models.layers import Block, NormBeforeProduct, checkpoint_blocks, compile_blocks
from tests.bench.counting import Counter, Work
from tests.bench.fake_compiler import fake_compiler, partitioned
from tests.bench.fake_cuda import fake_cuda, record

ROWS, WIDTH = 512, 256
NARROW, WIDE = ROWS * WIDTH, 4 * ROWS * WIDTH


class Mlp(Block):
    """What the models' blocks are made of, where CPUs and GPUs compute alike."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = NormBeforeProduct(WIDTH, elementwise_affine=False)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.wide(self.norm(x)))
        return x + self.narrow(nn.functional.dropout(hidden, 0.1))


def operators(graph: GraphModule) -> list[str]:
    """Their names, but for casts."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [name for name in names if "convert_element_type" not in name]


def test_the_graphs_are_those_that_torch_makes() -> None:
    """On a CPU, whose casts differ: of norms' statistics, and of sums, which GPUs write in fp32. So may the order."""
    found: list[list[str]] = []

    def compiler(graph: GraphModule, *_: Any, **__: Any) -> Any:
        found.append(operators(graph))
        return make_boxed_func(graph.forward)

    block = torch.compile(Mlp(), backend=partial(compile_fx, inner_compile=compiler), dynamic=False)
    with torch.autocast("cpu", torch.bfloat16):
        made = block(torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True))
    made.sum().backward()

    with fake_cuda():
        fake = Mlp()
        x = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            graphs = partitioned(fake._call_impl, [fake], (x,), [*fake.parameters(), x])
    for ours, theirs in zip(graphs, found, strict=True):
        assert sorted(operators(ours)) == sorted(theirs)


def counted(blocks: int, checkpointing: bool = False, gradients: bool = True) -> Work:
    """A pass through some equal blocks, forward and where there are gradients backward."""
    with fake_cuda() as card, fake_compiler(card):
        model = nn.Sequential(*(Mlp() for _ in range(blocks)))
        checkpoint_blocks(model, checkpointing)
        compile_blocks(nn.ModuleList([model]))
        x = nn.Parameter(torch.empty(ROWS, WIDTH, dtype=torch.bfloat16))
        nodes = record([*model.parameters(), x])
        card.listener = counter = Counter([*model.parameters(), x])
        with torch.set_grad_enabled(gradients), torch.autocast("cuda", torch.bfloat16):
            made = model(x)
        if gradients:
            made.backward(torch.empty_like(made))
        card.listener = None
        del nodes
    return counter.work


def test_fused_kernels_move_what_others_need() -> None:
    """Normalisation, cast and cast of the weights in front of the first product; GELU and dropout behind it."""
    kernels = counted(1, gradients=False).kernels
    products = [place for place, kernel in enumerate(kernels) if kernel.name == "addmm"]
    assert [kernels[place].flops for place in products] == [2 * NARROW * 4 * WIDTH] * 2
    assert [kernels[place].bytes for place in products] == [
        2 * (NARROW + 4 * WIDTH**2 + 4 * WIDTH + WIDE),
        2 * (WIDE + 4 * WIDTH**2 + WIDTH + NARROW),
    ]
    moved = {kernel.bytes for kernel in kernels if kernel.name.startswith("fused")}
    assert 2 * (NARROW + NARROW) in moved  # normalised
    assert 2 * (NARROW + NARROW + NARROW) in moved  # added to what came in


def test_equal_blocks_share_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Module] = []

    def counting(call: Any, modules: list[nn.Module], *rest: Any) -> list[GraphModule]:
        made.extend(modules)
        return partitioned(call, modules, *rest)

    monkeypatch.setattr("tests.bench.fake_compiler.partitioned", counting)
    one, three = counted(1), counted(3)
    assert len(made) == 2
    assert three.flops == 3 * one.flops


def test_a_block_that_is_recomputed_runs_again_and_keeps_nothing() -> None:
    kept, recomputed = counted(8), counted(8, checkpointing=True)
    assert recomputed.flops == pytest.approx(kept.flops * 4 / 3, rel=0.01)
    assert recomputed.peak < kept.peak - 4 * 2 * WIDE
