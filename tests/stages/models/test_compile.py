"""torch.compile and activation checkpointing: one graph a resolution, and the results of the plain models."""

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from stages.models import layers
from stages.models.attention import Attention, scaled_dot_product_attention
from stages.models.baseline import Baseline
from stages.models.stage_a import ReplicationPad, StageA
from stages.models.stage_b import StageB
from stages.models.stage_c import StageC, StageCObjective
from stages.settings.losses import StageCLoss
from stages.settings.models import BaselineConfig, StageAConfig, StageBConfig, StageCConfig
from stages.settings.training import TrainingConfig
from stages.training.activity import Activity
from stages.training.callbacks import Callbacks
from stages.training.loop import train
from stages.training.trainer import Trainer

TINY_A = StageAConfig(bottleneck_blocks=1, hidden=16, codebook_size=32, codebook_init="normal")
TINY_B = StageBConfig(
    widths=(8, 16),
    blocks=(1, 1),
    patterns=("CT", "CTA"),
    heads=(0, 2),
    inject_code=(False, True),
    cond_width=24,
    text_width=20,
    dropout=0.0,
)
# Each kind of block once, and no other size: a compiler of kernels takes a second for each of them.
ONE_LEVEL = StageBConfig(
    widths=(8,),
    blocks=(1,),
    patterns=("CTA",),
    heads=(2,),
    inject_code=(True,),
    cond_width=24,
    text_width=20,
    dropout=0.0,
)
TINY_C = StageCConfig(width=32, depth=1, heads=4, text_width=20, dropout=0.0)

Inputs = Callable[[int], tuple[Tensor, ...]]  # from the side, in units of the model's own
MODELS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "a": (lambda: StageA(TINY_A), lambda side: (torch.rand(2, 3, 4 * side, 4 * side), torch.tensor([True, False]))),
    "b": (
        lambda: StageB(TINY_B),
        lambda side: (torch.randn(2, 4, 4 * side, 4 * side), torch.rand(2), torch.randn(2, 16, 2, 2), text()),
    ),
    "c": (lambda: StageC(TINY_C), lambda side: (torch.randn(2, 16, side, side), torch.rand(2), text())),
}
COMPILED = {"a": MODELS["a"], "b": (lambda: StageB(ONE_LEVEL), MODELS["b"][1])}  # C has no block that B has not
NEEDS_COMPILER = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def text() -> Tensor:
    return torch.randn(2, 7, 20)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # a pool of processes would outlive the test


def randomised(module: nn.Module) -> nn.Module:
    """The authors' start leaves most of a model without effect: draw every weight."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
        if isinstance(module, StageC):  # keep its divisor |1 - b| away from zero, where rounding explodes
            for parameter in module.out.parameters():
                parameter.mul_(0.05)
    return module


def with_dropout(module: nn.Module, share: float) -> nn.Module:
    for part in module.modules():
        if isinstance(part, layers.Dropout):
            part.p = share
        elif isinstance(part, Attention):
            part.dropout = share
    return module


def gradients(module: nn.Module, run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output and the gradient of its mean square by every parameter, zero where there is none."""
    module.zero_grad()
    output = run(*inputs)
    output = output[0] if isinstance(output, tuple) else output
    output.square().mean().backward()
    found = (torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters())
    return [output.detach(), *found]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """To a thousandth of the largest number of each tensor: fused kernels add up in another order."""
    for ours, plain in zip(found, expected, strict=True):
        scale = plain.abs().max().item()
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3 * scale + 1e-7)


def check_graphs(build: Callable[[], nn.Module], inputs: Inputs, backend: str, resolutions: dict[int, int]) -> None:
    """By sides, in their order: as many graphs as so far, and the plain model's results and gradients."""
    model = randomised(build())
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for side, graphs in resolutions.items():
        for tensors in (inputs(side), inputs(side)):
            assert_close(gradients(model, compiled, tensors), gradients(model, model, tensors))
        assert counter.frame_count == graphs


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_one_graph_a_resolution(name: str) -> None:
    """By a backend that traces forward and backward like inductor, and needs no compiler."""
    check_graphs(*MODELS[name], "aot_eager", {4: 1, 6: 2})


@NEEDS_COMPILER
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_kernels_compute_what_the_model_does(name: str) -> None:
    check_graphs(*COMPILED[name], "inductor", {4: 1})


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_one_graph(name: str) -> None:
    build, inputs = MODELS[name]
    model = randomised(build()).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for _ in range(3):
            tensors = inputs(4)
            torch.testing.assert_close(compiled(*tensors), model(*tensors), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["b", "c"])
def test_dropout_and_checkpointing_stay_in_the_graph(name: str) -> None:
    build, inputs = MODELS[name]
    model = with_dropout(randomised(build()), 0.1)
    layers.checkpoint_blocks(model, True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    found = gradients(model, compiled, inputs(4))
    assert all(tensor.isfinite().all() for tensor in found)
    assert counter.frame_count == 1


def test_the_compilers_pad_is_torchs() -> None:
    pad, x = ReplicationPad(), torch.randn(2, 5, 4, 3)
    compiled = torch.compile(pad, backend="aot_eager", fullgraph=True)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=layout)
        assert torch.equal(compiled(given), pad(given))


# ------------------------------------------------------------------------------------------ checkpointing


TINY_BASELINE = BaselineConfig(widths=(8, 16), heads=(2, 0), blocks=1, middle_heads=2, groups=4, text_width=20)
BASELINE: tuple[Callable[[], nn.Module], Inputs] = (
    lambda: Baseline(TINY_BASELINE),
    lambda side: (torch.randn(2, 4, 4 * side, 4 * side), torch.rand(2), text()),
)


@pytest.mark.parametrize(("build", "inputs"), [*MODELS.values(), BASELINE], ids=[*MODELS, "baseline"])
def test_checkpointing_changes_neither_result_nor_gradients(build: Callable[[], nn.Module], inputs: Inputs) -> None:
    model, tensors = with_dropout(randomised(build()), 0.3), inputs(4)
    results = []
    for enabled in (False, True):
        layers.checkpoint_blocks(model, enabled)
        torch.manual_seed(7)
        results.append(gradients(model, model, tensors))
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    model, tensors = StageC(TINY_C.model_copy(update={"depth": 4})), MODELS["c"][1](8)
    kept = []
    for enabled in (False, True):
        layers.checkpoint_blocks(model, enabled)
        sizes: list[int] = []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(0 if isinstance(tensor, nn.Parameter) else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(*tensors)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


# ------------------------------------------------------------------------------------------- in the loop


def losses(**changes: object) -> list[float]:
    """The losses of a short training of Stage C on codes of two sizes."""
    values: dict[str, object] = {
        "phases": [{"steps": 3, "batch_size": 2, "size": 256}, {"steps": 2, "batch_size": 2, "size": 128}],
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "precision": "fp32",
        "log_every": 1,
        "checkpoint_every": 5,
    }
    config = TrainingConfig.model_validate(values | changes)

    def read(step: int) -> dict[str, np.ndarray]:
        generator, side = np.random.default_rng(step), config.phase_at(step).size * 3 // 128
        return {
            "latents_c": generator.standard_normal((2, 16, side, side), np.float32),
            "text": generator.standard_normal((2, 7, 20), np.float32),
        }

    torch.manual_seed(3)
    logged = Logged()
    train(
        StageCObjective(StageC(TINY_C.model_copy(update={"depth": 2})), StageCLoss(), torch.zeros(7, 20)),
        read,
        config,
        logged,
        seed=0,
        device=torch.device("cpu"),
    )
    return logged.losses


class Logged(Callbacks):
    """Keeps the losses."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.losses.append(values["loss"])


def test_a_compiled_training_has_the_plain_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    assert losses(compile=True) == pytest.approx(losses(), rel=1e-5)
    assert counter.frame_count == 6  # for each of two sizes one a kind of block, none for further blocks or steps


@NEEDS_COMPILER
def test_a_training_with_graphs_has_the_plain_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs have no graphs: that inductor is told of them, and where steps begin, is all that can be seen here."""
    asked, marks = list[object](), list[None]()
    compiled, mark = nn.Module.compile, torch.compiler.cudagraph_mark_step_begin

    def noted(module: nn.Module, **how: Any) -> None:
        asked.append(how)
        compiled(module, **how)

    def marked() -> None:
        marks.append(mark())

    monkeypatch.setattr(nn.Module, "compile", noted)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", marked)
    shorter: dict[str, Any] = {"phases": [{"steps": 3, "batch_size": 2, "size": 128}], "checkpoint_every": 3}
    plain = losses(**shorter)
    assert not marks
    assert not asked
    assert losses(compile="graphs", **shorter) == pytest.approx(plain, rel=1e-5)
    assert len(marks) == 3
    assert asked == len(asked) * [{"dynamic": False, "options": {"triton.cudagraphs": True}}]


def test_only_steps_are_compiled_where_they_are_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shown and validated calls models as often as it likes; what comes out is anybody's."""
    counter, frames = CompileCounterWithBackend("aot_eager"), list[int]()
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda call, dynamic, options: compiled(call, backend=counter, dynamic=dynamic)
    )
    values: dict[str, Any] = {"phases": [{"steps": 1, "batch_size": 2, "size": 128}], "learning_rate": 1e-3}
    values |= {"warmup_steps": 0, "precision": "fp32", "log_every": 1, "checkpoint_every": 1, "compile": "graphs"}
    objective = StageCObjective(StageC(TINY_C), StageCLoss(), torch.zeros(7, 20))
    trainer = Trainer(objective, TrainingConfig.model_validate(values), 0, torch.device("cpu"), 0, 1)

    def show(*_: object) -> None:
        objective.stage_c(*MODELS["c"][1](3))
        frames.append(counter.frame_count)

    trainer.present(show, lambda: None)
    batch = {"latents_c": torch.randn(2, 16, 3, 3), "text": text()}
    trainer.advance(batch, Activity())
    assert counter.frame_count == 3  # a kind of block
    trainer.present(show, lambda: None)
    trainer.finish()
    with torch.no_grad():
        show()
    assert frames == [0, 3, 3]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"micro_batch": 1}, "compile=graphs needs micro_batch=null, not 1: the next piece"),
        ({"shard": 2}, "compile=graphs needs shard=1, not 2: FSDP"),
    ],
)
def test_what_does_not_go_with_graphs_is_refused(changes: dict[str, object], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        losses(compile="graphs", **changes)


def test_a_checkpointed_training_has_the_plain_losses() -> None:
    assert losses(checkpointing=True) == losses()


def test_how_a_training_runs_is_no_part_of_its_recipe() -> None:
    """A state saved without them goes on with them."""
    config = TrainingConfig.model_validate(
        {
            "phases": [{"steps": 1, "batch_size": 1, "size": 128}],
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "log_every": 1,
            "checkpoint_every": 1,
        }
    )
    other = config.model_copy(update={"checkpointing": True, "compile": True})
    assert other.recipe(0) == config.recipe(0)


# ------------------------------------------------------------------------------------------------ dropout


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    x = torch.rand(1000, 1001) + 1
    dropped = layers.dropout(x, 0.1)
    gone = dropped == 0
    assert gone.double().mean().item() == pytest.approx(0.1, abs=1e-3)  # three standard deviations
    torch.testing.assert_close(dropped[~gone], x[~gone] / 0.9)
    for axis in (0, 1):  # no pattern along either axis
        assert gone.double().mean(dim=axis).std().item() == pytest.approx((0.09 / 1000) ** 0.5, rel=0.1)
    torch.manual_seed(1)
    first = layers.dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(layers.dropout(x, 0.5), first)


def test_dropout_at_its_ends() -> None:
    x = torch.rand(5)
    assert torch.equal(layers.dropout(x, 0.0), x)
    assert layers.dropout(x, 1.0).count_nonzero() == 0


def test_attention_with_dropout_is_the_plain_one_on_average() -> None:
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    plain = scaled_dot_product_attention(query, key, value, 0.0)
    many = [tensor.expand(4000, -1, -1, -1) for tensor in (query, key, value)]
    mean = scaled_dot_product_attention(*many, 0.1).mean(dim=0, keepdim=True)
    torch.testing.assert_close(mean, plain, rtol=0, atol=0.05)
