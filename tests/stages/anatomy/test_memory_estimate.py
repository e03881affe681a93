"""The memory estimate against the models themselves: weights as they are, activations as torch keeps them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from stages.anatomy import memory_estimate
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

TOLERANCE = 0.2  # as the module states it
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
    draws = Draws(0, 0, 0, BATCH, BATCH, torch.device("cpu"))
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss, _ = objective(batch, draws)
    loss.backward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def batch(size: int = SIZE) -> dict[str, Tensor]:
    code = int(size * SMALL.input_ratio) // 32
    return {
        "image": torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8),
        "text": torch.randn(BATCH, TOKENS, 40),
        "latents_a": torch.randn(BATCH, 4, size // 4, size // 4),
        "latents_c": torch.randn(BATCH, 16, code, code),
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


# ----------------------------------------------------------------------------------------------- activations


def close(found: Memory, kept: int) -> None:
    assert found.activations == pytest.approx(kept, rel=TOLERANCE)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_stage_a(precision):
    objective = StageAObjective(StageA(A), StageALoss())
    estimate = memory_estimate.train_a(A, StageALoss(), training(precision=precision), workers=1)
    close(estimate, kept_bytes(objective, batch(), precision))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage_as_judges_count(precision):
    loss = StageALoss(perceptual=1.0, perceptual_weights="vgg16.pth", adversarial=1.0)
    vgg16 = {f"features.{key}": value for key, value in make_layers(cfgs["D"]).state_dict().items()}
    perceptual = Perceptual(vgg16, None)
    objective = StageAObjective(StageA(A), loss, Discriminator(), perceptual)
    estimate = memory_estimate.train_a(A, loss, training(precision=precision), workers=1)
    assert estimate.gradients == FP32 * count(objective)
    if precision == "fp32":
        copies = 2 * count(objective.discriminator)
        assert estimate.weights == FP32 * (count(objective) + copies + count(perceptual.features))
    kept = kept_bytes(objective, batch(), precision, perceptual.features)
    close(estimate, kept)
    own = memory_estimate.train_a(A, StageALoss(), training(precision=precision), workers=1).activations
    judges = kept - kept_bytes(StageAObjective(StageA(A), StageALoss()), batch(), precision)
    assert estimate.activations - own == pytest.approx(judges, rel=TOLERANCE)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("joint", [True, False])
def test_activations_of_stage_b_and_the_compressor(precision, joint):
    torch.manual_seed(0)
    objective = StageBObjective(StageB(B), Compressor(SMALL), StageBLoss(), torch.zeros(TOKENS, 40), joint)
    estimate = memory_estimate.train_b(B, SMALL, joint, TOKENS, training(precision=precision), workers=1)
    close(estimate, kept_bytes(objective, batch(), precision))


def test_activations_of_the_warm_up():
    loss = CompressorWarmupLoss(width=48)
    objective = CompressorWarmup(Compressor(SMALL), 16, 4, loss)
    estimate = memory_estimate.warm_up(SMALL, loss.width, 4, training(), workers=1)
    close(estimate, kept_bytes(objective, batch(), "fp32"))
    assert estimate.weights == FP32 * count(objective)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [256, 512])
def test_activations_of_stage_c(precision, size):
    objective = StageCObjective(StageC(C), StageCLoss(), torch.zeros(TOKENS, 40))
    train = training(precision=precision, phases=[{"steps": 1, "batch_size": BATCH, "size": size}])
    estimate = memory_estimate.train_c(C, SMALL, TOKENS, train, workers=1)
    close(estimate, kept_bytes(objective, batch(size), precision))


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
