"""What torch.compile makes of a training's blocks on a card that is not there: its own partition, its own fusions.

Each block is traced as a step calls it, forward and backward; torch's partitioner decides what the forward pass keeps
and what the backward pass computes again; inductor lowers both and its scheduler fuses them, with the rules and the
properties of a card. There it stops: no kernel is written. The kernels that were left are priced as the eager step's
are (`tests.bench.counting`): each reads once what it needs and writes once what others need.

The way is `torch._inductor.compile_fx`'s, from the joint graph on. Before it, AOTAutograd traces through dispatch keys
that want a real card, so the joint graph is made here: the forward pass by autocast's rules, then the gradients of
what was recorded, then both without mutations, by inductor's decompositions.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.utils
import torch.utils._triton
from torch import Tensor, nn
from torch._dynamo.device_interface import caching_worker_device_properties
from torch._inductor import compile_fx, config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import ExternKernel, MultiOutput
from torch._inductor.memory import estimate_peak_memory
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from stages.models.layers import Block, TimestepBlock
from tests.bench.counting import Kernel, flops_of
from tests.bench.fake_cuda import CUDA, Card

H200 = SimpleNamespace(  # as `torch.cuda.get_device_properties` names them; fusion asks for processors and registers
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2_048,
    max_threads_per_block=1_024,
    warp_size=32,
    shared_memory_per_block_optin=232_448,
    total_memory=141 * 10**9,
)


@dataclass(frozen=True)
class Compiled:
    """One compiled graph: its kernels, bytes of what it allocates at most, and what it returns.

    returns: for each output None, or its name (equal ones lie in the same memory) and its value.
    """

    kernels: list[Kernel]
    peak: int
    returns: list[tuple[str, Tensor] | None]

    def run(self, card: Card, given: dict[str, Tensor]) -> list[Tensor | None]:
        """Make what it returns, new but for what it was given; whoever listens hears of its kernels."""
        if card.listener:
            card.listener.run(self.kernels, self.peak)
        made = dict(given)
        for name, value in filter(None, self.returns):
            if name not in made:
                made[name] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
        return [None if found is None else made[found[0]] for found in self.returns]


@contextmanager
def fake_compiler(card: Card) -> Iterator[None]:
    """Meanwhile `torch.compile` makes what counts as compiled; equal blocks share their graphs, as Dynamo's do.

    Models without blocks, which have buffers that change, are left as they are.
    """
    graphs: dict[Any, list[Compiled]] = {}

    def compiled(call: Any, **_: Any) -> Any:
        if not isinstance(call.__self__, Block | TimestepBlock):
            return call

        def called(*inputs: Any) -> Tensor:
            modules = [call.__self__, *(given for given in inputs if isinstance(given, nn.Module))]
            tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
            tensors += [given for given in inputs if isinstance(given, Tensor)]
            modes = (torch.is_grad_enabled(), torch.is_autocast_enabled("cuda"))
            key = (modes, _signature(modules), *map(_like, tensors))
            if key not in graphs:
                with card.unheard():
                    graphs[key] = _compile(call, modules, inputs, tensors)
            with torch.autocast("cuda", enabled=False):  # casts are in the graphs
                made: Tensor = _Run.apply(graphs[key], card, *tensors)
            return made

        return called

    with patch.object(torch, "compile", compiled):
        yield


class _Run(torch.autograd.Function):
    """A compiled block: the forward graph, and the backward graph on what the partition keeps."""

    @staticmethod
    def forward(ctx: Any, graphs: list[Compiled], card: Card, *tensors: Tensor) -> Tensor:
        given = {f"primals_{number}": tensor for number, tensor in enumerate(tensors, 1)}
        made, *kept = graphs[0].run(card, given)
        ctx.graphs, ctx.card = graphs, card
        ctx.save_for_backward(*kept)
        assert made is not None
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        assert ctx.saved_tensors  # asked for, so that what is checkpointed runs again
        found = ctx.graphs[1].run(ctx.card, {f"tangents_{number}": each for number, each in enumerate(gradients, 1)})
        return (None, None, *found)


def _signature(modules: list[nn.Module]) -> tuple[Any, ...]:
    """What decides what modules compute, beside their tensors."""
    plain = (bool, int, float, str, tuple)
    parts = [part for module in modules for part in module.modules()]
    return tuple(
        (type(part), *((name, value) for name, value in vars(part).items() if isinstance(value, plain)))
        for part in parts
    )


def _like(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad


def _compile(call: Any, modules: list[nn.Module], inputs: tuple[Any, ...], tensors: list[Tensor]) -> list[Compiled]:
    """The graph of a forward pass without gradients, or a forward and a backward graph."""
    graphs = partitioned(call, modules, inputs, tensors)
    return [_lowered(graph, is_backward=bool(number), alone=len(graphs) == 1) for number, graph in enumerate(graphs)]


def partitioned(
    call: Any, modules: list[nn.Module], inputs: tuple[Any, ...], tensors: list[Tensor]
) -> list[GraphModule]:
    """A call as inductor's operators: a forward and a backward graph, or one where no gradients are wanted.

    tensors: those of `modules`, parameters then buffers of each, and those among `inputs`.
    """
    primals = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
    forward = _forward(call, modules, inputs, primals)
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in primals):
        return [_functional(forward, primals, [])]
    with torch.no_grad():
        tangents = [torch.empty_like(forward(*primals))]
    joint = _functional(_joint(forward, primals, tangents), primals, tangents)
    static = range(len(tensors) - sum(isinstance(given, Tensor) for given in inputs))
    with _inductor(primals):
        pair: tuple[GraphModule, GraphModule] = compile_fx.partition_fn(
            joint, [*primals, *tangents], num_fwd_outputs=1, static_lifetime_input_indices=list(static)
        )
    return list(pair)


def _forward(call: Any, modules: list[nn.Module], inputs: tuple[Any, ...], primals: list[Tensor]) -> GraphModule:
    """A function of parameters, buffers and tensors, in that order, as operators after autocast."""

    def forward(*tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        with ExitStack() as stack:
            for module in modules:
                names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
                stack.enter_context(_reparametrize_module(module, {name: next(rest) for name in names}))
            made: Tensor = call(*(next(rest) if isinstance(given, Tensor) else given for given in inputs))
            return made

    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # or casts of what is traced here would stay
    try:
        with torch.no_grad(), patch("torch.compiler.is_compiling", lambda: True):
            return make_fx(forward)(*primals)
    finally:
        torch.set_autocast_cache_enabled(cached)


def _joint(forward: GraphModule, primals: list[Tensor], tangents: list[Tensor]) -> GraphModule:
    """`forward` and its gradients, as autograd's operators."""

    def joint(primals: list[Tensor], tangents: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        with torch.enable_grad():
            made = forward(*primals)
            found = torch.autograd.grad(made, [each for each in primals if each.requires_grad], tangents)
        gradients = iter(found)
        return [made], [next(gradients) if each.requires_grad else None for each in primals]

    # Whoever checkpoints a block keeps it for a step, not for this trace.
    with torch.autocast("cuda", enabled=False), saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
        graph = make_fx(joint)(primals, tangents)
    for node in graph.graph.nodes:  # the fake card has told autograd that what is cast lies elsewhere
        if node.target is torch.ops.aten._to_copy.default and "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": CUDA}
    graph.recompile()
    return graph


def _functional(graph: GraphModule, primals: list[Tensor], tangents: list[Tensor]) -> GraphModule:
    """The same without mutations, by inductor's decompositions; inputs named as torch's partitioner wants them."""

    def functional(primals: list[Tensor], tangents: list[Tensor]) -> Any:
        if tangents:
            return torch.func.functionalize(graph)(primals, tangents)
        return [torch.func.functionalize(graph)(*primals)]

    with torch.no_grad():
        traced = make_fx(functional, decomposition_table=select_decomp_table())(primals, tangents)
    traced.graph.eliminate_dead_code()
    (output,) = traced.graph.find_nodes(op="output")
    output.args = (tree_leaves(output.args),)
    traced.graph.set_codegen(torch.fx.graph.CodeGen())  # inputs and outputs are flat lists
    traced.recompile()
    return traced


@contextmanager
def _inductor(tensors: list[Tensor]) -> Iterator[None]:
    """Inductor with the tensors' fake mode, as it finds things on an H200."""
    mode = tensors[0].fake_mode  # type: ignore[attr-defined]
    there: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "_get_device_properties": lambda _: H200,
    }
    with ExitStack() as stack:
        for name, substitute in there.items():
            stack.enter_context(patch.object(torch.cuda, name, substitute, create=True))
        # Its patterns are of attention spelt out, and their examples are real tensors.
        stack.enter_context(patch("torch._inductor.fx_passes.fuse_attention._sfdp_init", lambda *_: None))
        # Constants would be folded by real tensors, and whether products gain by padding would be timed.
        stack.enter_context(config.patch(joint_graph_constant_folding=False, shape_padding=False))
        for context in (_disable_current_modes(), torch.device("cpu"), mode, V.set_fake_mode(mode), torch.no_grad()):
            stack.enter_context(context)
        stack.enter_context(V.set_debug_handler(DebugContext()))
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    """Have inductor look again at what there is: it asks once."""
    caching_worker_device_properties.clear()
    DeviceProperties.create.cache_clear()
    for module in (torch.utils._triton, torch._inductor.utils):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


def _lowered(graph: GraphModule, is_backward: bool, alone: bool) -> Compiled:
    """What inductor makes of a graph, up to the kernels that its scheduler would write."""
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    with _inductor([given for given in inputs if isinstance(given, Tensor)]):
        if alone:  # else it was done before the partition
            graph = compile_fx._recursive_joint_graph_passes(graph, input_device=CUDA)
        compile_fx.view_to_reshape(graph)
        compile_fx.fake_tensor_prop(graph, inputs)
        compile_fx._recursive_record_original_output_strides(graph)
        compile_fx._recursive_post_grad_passes(graph, is_inference=alone)
        lowering = GraphLowering(graph, example_inputs=inputs, is_backward=is_backward, is_inference=alone)
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            lowering.init_wrapper_code()
            lowering._update_scheduler()
            nodes = lowering.scheduler.nodes
            kernels = [kernel for kernel in map(_kernel, nodes) if kernel]
            names = lowering.get_output_names()
            peak, _ = estimate_peak_memory(nodes, {}, OrderedSet(names))
    (output,) = graph.graph.find_nodes(op="output")
    found = iter(names)
    returns = [(next(found), node.meta["val"]) if isinstance(node, Node) else None for node in output.args[0]]
    return Compiled(kernels, peak, returns)


def _kernel(node: BaseSchedulerNode) -> Kernel | None:
    """What one of the scheduler's kernels reads, computes and writes; None for what starts none."""
    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, MultiOutput):
        return None
    moved = node.get_read_write_buffers_sizes()
    origin = _operator(node)
    if origin is None:
        return Kernel(f"fused, {len(node.get_nodes())}", 0.0, 32, moved)
    args, kwargs, made = map_arg((origin.args, origin.kwargs, origin), lambda each: each.meta["val"])
    packet = origin.target.overloadpacket  # type: ignore[union-attr]
    flops = flops_of(packet, args, kwargs, made)
    given = next((leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), None)
    bits = 8 * given.element_size() if flops and given is not None else 32
    return Kernel(str(packet).removeprefix("aten."), flops, bits, moved)


def _operator(node: BaseSchedulerNode) -> Node | None:
    """The operator that a kernel of a library stands for; None for what inductor writes itself."""
    if not isinstance(node.node, ExternKernel):
        return None
    wanted = node.node.op_overload
    return next((each for each in node.node.get_origins() if each.target is wanted), node.node.get_origin_node())
