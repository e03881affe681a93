"""The memory estimate against the models themselves: weights as they are, activations as torch keeps them."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.vgg import cfgs, make_layers

from stages.anatomy import architectures, memory_estimate
from stages.anatomy.blocks import Block
from stages.anatomy.memory_estimate import FP32, Memory
from stages.draws import Draws
from stages.models.baseline import Baseline, BaselineObjective
from stages.models.compressor import Compressor, CompressorWarmup
from stages.models.discriminator import Discriminator
from stages.models.layers import checkpoint_blocks
from stages.models.previewer import Previewer, PreviewerObjective
from stages.models.stage_a import StageA, StageAObjective
from stages.models.stage_b import StageB, StageBObjective
from stages.models.stage_c import StageC, StageCObjective
from stages.settings.losses import BaselineLoss, CompressorWarmupLoss, PreviewerLoss, StageALoss, StageBLoss, StageCLoss
from stages.settings.models import (
    BaselineConfig,
    CompressorConfig,
    PreviewerConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)
from stages.settings.training import TrainingConfig
from stages.training.perceptual import Perceptual

TOLERANCE = 0.2  # as the module states it; A, B and C are held to 10 % in tests/whole/test_fake_step.py
BATCH, TOKENS, SIZE = 4, 9, 128
SHORT = {  # an EfficientNetV2 with every kind of block
    "stem": 8,
    "stages": [
        {"block": "fused", "expand": 1, "stride": 2, "channels": 16, "layers": 2},
        {"block": "fused", "expand": 4, "stride": 2, "channels": 24, "layers": 2},
        {"block": "mb", "expand": 4, "stride": 2, "channels": 32, "layers": 3},
        {"block": "mb", "expand": 1, "stride": 2, "channels": 40, "layers": 2},
    ],
    "last": 64,
}
A = StageAConfig(hidden=64, bottleneck_blocks=3, codebook_size=32)
B = StageBConfig(
    widths=(32, 64, 64),
    blocks=(1, 2, 3),
    patterns=("CT", "CTA", "CTA"),
    heads=(0, 4, 4),
    inject_code=(False, True, True),
    cond_width=48,
    text_width=40,
    dropout=0.0,  # torch's attention on CPUs keeps all scores where it drops some, that on GPUs does not
)
C = StageCConfig(width=128, depth=4, heads=8, text_width=40, dropout=0.0)
BASELINE = BaselineConfig(
    widths=(32, 64, 96), blocks=2, heads=(2, 4, 0), middle_heads=4, middle_depth=3, groups=8, text_width=40
)
SMALL = CompressorConfig.model_validate({"backbone": SHORT})


def training(**changes: Any) -> TrainingConfig:
    values = {
        "phases": [{"steps": 10, "batch_size": BATCH, "size": SIZE}],
        "learning_rate": 1e-4,
        "warmup_steps": 0,
        "precision": "fp32",
        "log_every": 1,
        "checkpoint_every": 1,
    }
    return TrainingConfig.model_validate(values | changes)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def kept_bytes(objective: nn.Module, batch: dict[str, Tensor], precision: str, frozen: nn.Module | None = None) -> int:
    """Bytes of all tensors that autograd keeps after a forward pass, weights and their copies left out."""
    known = [*objective.parameters(), *(frozen.parameters() if frozen else ())]
    weights = {parameter.untyped_storage().data_ptr() for parameter in known}
    shapes = {parameter.shape for parameter in known if parameter.ndim > 1}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        copy = tensor.ndim > 1 and (tensor.shape in shapes or tensor.mT.shape in shapes)
        if tensor.untyped_storage().data_ptr() not in weights and not copy:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    objective.train()
    rows = len(batch["image"])
    draws = Draws(0, 0, 0, rows, rows, torch.device("cpu"))
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        _graph = objective(batch, draws)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def batch(size: int = SIZE, rows: int = BATCH) -> dict[str, Tensor]:
    code = int(size * SMALL.input_ratio) // 32
    return {
        "image": torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8),
        "text": torch.randn(rows, TOKENS, 40),
        "latents_a": torch.randn(rows, 4, size // 4, size // 4),
        "latents_c": torch.randn(rows, 16, code, code),
    }


# ----------------------------------------------------------------------------------- weights and what follows


@pytest.mark.parametrize("norm", ["affine", "fixed"])
@pytest.mark.parametrize("joint", [True, False])
def test_weights_gradients_and_moments_are_those_of_the_optimiser(norm, joint):
    small = SMALL.model_copy(update={"batch_norm": norm})
    objective = StageBObjective(StageB(B), Compressor(small), StageBLoss(), torch.zeros(TOKENS, 40), joint)
    trained = sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    found = memory_estimate.train_b(B, small, joint, TOKENS, training(), workers=1)
    assert found.weights == FP32 * count(objective)
    assert found.gradients == FP32 * trained
    assert found.moments == 2 * FP32 * trained


def test_what_is_spread_or_cut_into_pieces_takes_its_share():
    phases = [{"steps": 1, "batch_size": 64, "size": SIZE}]

    def need(**changes: Any) -> Memory:
        return memory_estimate.train_c(C, SMALL, TOKENS, training(phases=phases, **changes), workers=8)

    whole, spread, cut = need(), need(shard=4), need(micro_batch=2)
    assert (spread.moments, spread.gradients) == (whole.moments // 4, whole.gradients // 4)
    assert spread.weights - whole.weights == whole.gradients // 4  # a share beside whole weights
    assert cut.activations * 4 == whole.activations
    assert need(shard=4, micro_batch=2).gradients == whole.gradients + whole.gradients // 4


def test_the_average_counts_where_it_lies_beside_the_model():
    def average(**ema: Any) -> int:
        train = training(ema={"decay": 0.9, "every": 1, "start": 0, **ema})
        return memory_estimate.train_c(C, SMALL, TOKENS, train, workers=1).average

    assert average() == FP32 * count(StageC(C))
    assert average(device="cpu") == 0
    assert memory_estimate.train_c(C, SMALL, TOKENS, training(), workers=1).average == 0


def test_the_largest_phase_counts_by_what_one_worker_sees():
    def activations(*phases: tuple[int, int], workers: int = 1) -> int:
        found = training(phases=[{"steps": 1, "batch_size": rows, "size": size} for rows, size in phases])
        return memory_estimate.train_c(C, SMALL, TOKENS, found, workers).activations

    assert activations((8, 128), (4, 512), (8, 256)) == activations((4, 512))
    assert activations((8, 256), workers=4) == activations((2, 256))


# ------------------------------------------------------------------------------------------- between two steps


class Live(TorchDispatchMode):
    """The most bytes that tensors made within it have at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.held:
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.held.values()))
        return made


def peak(work: Callable[[], object]) -> int:
    with Live() as live:
        work()
    return live.peak


def within(found: int, peak: int) -> None:
    """A bound that is not far off."""
    assert peak <= found < 4 * peak


@pytest.mark.parametrize("side", [128, 256])
@torch.no_grad()
def test_a_pass_through_stage_a_alone(side):
    stage_a, pictures = StageA(A).eval(), torch.rand(2, 3, side, side)
    found = memory_estimate.encode_a(A, side, rows=2) - FP32 * count(stage_a)
    assert found == pytest.approx(peak(lambda: stage_a.decode(stage_a.encode(pictures))), rel=0.05)
    quantised = peak(lambda: stage_a.decode_quantised(stage_a.encode(pictures)))
    assert found == pytest.approx(quantised, rel=0.05)


@pytest.mark.parametrize("size", [512, 768])  # of smaller ones, copies of weights are most of it
@torch.no_grad()
def test_a_pass_through_the_others_alone(size):
    def passing(blocks: Iterable[Block]) -> int:
        return BATCH * memory_estimate._sample(blocks, training()).passing

    side, code, seen = size // 4, SMALL.code_side(size), SMALL.seen_side(size)
    b, c, baseline, compressor = StageB(B).eval(), StageC(C).eval(), Baseline(BASELINE).eval(), Compressor(SMALL).eval()
    given, t = batch(size), torch.full((BATCH,), 0.5)
    pictures = given["image"] / 255
    latents, codes, text = given["latents_a"], given["latents_c"], given["text"]
    within(passing(architectures.stage_b(B, side, side, TOKENS)), peak(lambda: b(latents, t, codes, text)))
    within(passing(architectures.stage_c(C, code, code, TOKENS)), peak(lambda: c(codes, t, text)))
    within(passing(architectures.baseline(BASELINE, side, side, TOKENS)), peak(lambda: baseline(latents, t, text)))
    within(passing(architectures.compressor(SMALL, seen)), peak(lambda: compressor(pictures)))


def test_a_validation_counts_where_it_takes_more_than_a_step():
    def activations(rows: int, **changes: Any) -> int:
        train = training(phases=[{"steps": 1, "batch_size": rows, "size": SIZE}], **changes)
        return memory_estimate.train_b(B, SMALL, False, TOKENS, train, workers=1).activations

    watched = {"validation": {"every": 1}}
    assert activations(1, **watched) > activations(1)
    assert activations(1, **watched) == activations(2, **watched)
    assert activations(64, **watched) == activations(64)
    assert activations(1, **watched, micro_batch=1) == activations(1)  # it goes by that too


# ----------------------------------------------------------------------------------------------- activations


def test_the_codebook_is_searched_for_what_goes_through_at_once():
    large = A.model_copy(update={"hidden": 8, "codebook_size": 4096})

    def activations(rows: int, micro_batch: int | None) -> int:
        train = training(phases=[{"steps": 1, "batch_size": rows, "size": SIZE}], micro_batch=micro_batch)
        return memory_estimate.train_a(large, StageALoss(), train, workers=1).activations

    assert activations(64, 1) == activations(1, None)
    assert activations(64, 16) == activations(16, None)
    objective = StageAObjective(StageA(large), StageALoss())
    draws = Draws(0, 0, 0, BATCH, BATCH, torch.device("cpu"))
    real = peak(lambda: objective(batch(), draws))
    assert real <= activations(64, BATCH) < 1.5 * real


def close(found: Memory, kept: int) -> None:
    assert found.activations == pytest.approx(kept, rel=TOLERANCE)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage_as_judges_count(precision):
    loss = StageALoss(perceptual=1.0, perceptual_weights="vgg16.pth", adversarial=1.0)
    vgg16 = {f"features.{key}": value for key, value in make_layers(cfgs["D"]).state_dict().items()}
    perceptual = Perceptual(vgg16, None)
    objective = StageAObjective(StageA(A), loss, Discriminator(), perceptual)
    train = training(precision=precision, phases=[{"steps": 10, "batch_size": 1, "size": SIZE}])
    estimate = memory_estimate.train_a(A, loss, train, workers=1)
    assert estimate.gradients == FP32 * count(objective)
    if precision == "fp32":
        copies = 2 * count(objective.discriminator)
        assert estimate.weights == FP32 * (count(objective) + copies + count(perceptual.features))
    kept = kept_bytes(objective, batch(rows=1), precision, perceptual.features)
    close(estimate, kept)
    own = memory_estimate.train_a(A, StageALoss(), train, workers=1).activations
    judges = kept - kept_bytes(StageAObjective(StageA(A), StageALoss()), batch(rows=1), precision)
    assert estimate.activations - own == pytest.approx(judges, rel=TOLERANCE)


@pytest.mark.parametrize("predicts", ["latents_a", "colours"])
def test_activations_of_the_warm_up(predicts):
    loss = CompressorWarmupLoss(width=48, predicts=predicts)
    objective = CompressorWarmup(Compressor(SMALL), 16, 4, loss)
    estimate = memory_estimate.warm_up(SMALL, loss.width, loss.channels(4), training(), workers=1)
    close(estimate, kept_bytes(objective, batch(), "fp32"))
    assert estimate.weights == FP32 * count(objective)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_the_previewer(precision):
    config = PreviewerConfig(width=64)
    objective = PreviewerObjective(Previewer(config), PreviewerLoss())
    train = training(precision=precision, phases=[{"steps": 1, "batch_size": BATCH, "size": 256}])
    estimate = memory_estimate.train_previewer(config, SMALL, train, workers=1)
    close(estimate, kept_bytes(objective, batch(256), precision))
    assert estimate.gradients == FP32 * count(objective)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_of_the_baseline(precision, checkpointing, norms_as_on_gpus):
    objective = BaselineObjective(Baseline(BASELINE), BaselineLoss(), torch.zeros(TOKENS, 40))
    checkpoint_blocks(objective, checkpointing)
    train = training(precision=precision, checkpointing=checkpointing)
    estimate = memory_estimate.train_baseline(BASELINE, TOKENS, train, workers=1)
    kept = kept_bytes(objective, batch(), precision)
    assert estimate.gradients == FP32 * count(objective)
    if checkpointing:  # and in the backward pass one block, the largest
        whole = memory_estimate.train_baseline(BASELINE, TOKENS, training(precision=precision), workers=1).activations
        assert kept < estimate.activations < 0.6 * whole
    else:
        close(estimate, kept)


@pytest.fixture
def norms_as_on_gpus(monkeypatch):
    """Autocast for GPUs gives group_norm and layer_norm fp32; that for CPUs leaves them what comes."""
    for name in ("group_norm", "layer_norm"):
        norm = getattr(F, name)
        monkeypatch.setattr(F, name, lambda x, *rest, norm=norm: norm(x.float(), *rest))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_keeps_the_blocks_inputs_and_one_block(precision):
    def kept(depth: int, checkpointing: bool) -> tuple[int, int]:
        config = C.model_copy(update={"depth": depth})
        objective = StageCObjective(StageC(config), StageCLoss(), torch.zeros(TOKENS, 40))
        checkpoint_blocks(objective, checkpointing)
        phases = [{"steps": 1, "batch_size": BATCH, "size": 512}]
        train = training(precision=precision, checkpointing=checkpointing, phases=phases)
        estimate = memory_estimate.train_c(config, SMALL, TOKENS, train, workers=1).activations
        return estimate, kept_bytes(objective, batch(512), precision)

    (small, kept_small), (large, kept_large) = kept(2, True), kept(6, True)
    assert large - small == pytest.approx(kept_large - kept_small, rel=TOLERANCE)
    _, whole_block = kept(1, False)
    assert kept_large < large < kept_large + whole_block


@pytest.mark.parametrize("stage", ["a", "b"])
def test_checkpointing_of_stage_a_and_b_spares_most_of_it(stage):
    def estimate(**changes: Any) -> int:
        train = training(**changes)
        if stage == "a":
            return memory_estimate.train_a(A, StageALoss(), train, workers=1).activations
        return memory_estimate.train_b(B, SMALL, False, TOKENS, train, workers=1).activations

    objective: nn.Module
    if stage == "a":
        objective = StageAObjective(StageA(A), StageALoss())
    else:
        objective = StageBObjective(StageB(B), Compressor(SMALL), StageBLoss(), torch.zeros(TOKENS, 40), False)
    checkpoint_blocks(objective, True)
    # and in the backward pass one block, the largest
    assert kept_bytes(objective, batch(), "fp32") < estimate(checkpointing=True) < 0.6 * estimate()
