"""Which parameters Muon takes, its steps beside torch's own, and that a training with it skips steps and goes on."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.optimize import linprog
from torch import Tensor, nn

from stages.models.layers import Block
from stages.models.stage_c import StageC
from stages.settings.models import StageCConfig
from stages.settings.training import MuonConfig, TrainingConfig
from stages.training import checkpoint
from stages.training import optimizer as optimizer_module
from stages.training.checkpoint import Checkpoint, Rows, State
from stages.training.optimizer import COEFFICIENTS, Muon, Optimizer, matrices, orthogonal
from tests.stages.training.test_loop import Denoise, Outcome, Run, config, weights

CPU = torch.device("cpu")


class Hidden(Block):
    """A block of one matrix, with a vector beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.product(x)


class DenoiseByBlocks(Denoise):
    """The same objective, with a block in the middle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), Hidden(), nn.Dropout(0.1), nn.Linear(16, 6))


def by_muon(**changes: object) -> TrainingConfig:
    return config(muon={"learning_rate": 0.05}, **changes)


def test_muon_takes_the_matrices_of_blocks() -> None:
    stage_c = StageC(StageCConfig(width=32, depth=2, heads=2, text_width=8, timestep_channels=8))
    names = ["channelwise.0.weight", "channelwise.4.weight"]
    attention = ["attention.attn.in_proj_weight", "attention.attn.out_proj.weight", "kv_mapper.1.weight"]
    expected = {f"blocks.{3 * n}.{name}" for n in range(2) for name in names}
    expected |= {f"blocks.{3 * n + 2}.{name}" for n in range(2) for name in attention}
    assert matrices(stage_c, dict(stage_c.named_parameters())).keys() == expected


@pytest.mark.parametrize("shape", [(3, 8, 40), (2, 40, 8), (1, 24, 24)])
def test_orthogonal_matrices_keep_their_singular_vectors(shape: tuple[int, ...]) -> None:
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    found = left.mT @ orthogonal(given, torch.float32) @ right.mT
    stretched = torch.diagonal(found, dim1=1, dim2=2)
    assert stretched.min() > 0.3  # the least ones of a square matrix are still on their way
    assert stretched.max() < 1.2
    assert (found - torch.diag_embed(stretched)).abs().max() < 1e-3


def stepped(given: list[Tensor], gradients: list[list[Tensor]], names: list[str]) -> list[Tensor]:
    """Matrices after a step for each gradient, at half of the peak of the learning rate."""
    trained = {name: nn.Parameter(value.clone()) for name, value in zip(names, given, strict=True)}
    muon = Muon(trained, MuonConfig(learning_rate=0.04), 0.1, torch.bfloat16)
    momenta = [torch.zeros_like(value) for value in given]
    for step in gradients:
        for parameter, gradient in zip(trained.values(), step, strict=True):
            parameter.grad = gradient
        muon.step(momenta, 0.5, torch.zeros(()), None)
    return [parameter.detach() for parameter in trained.values()]


def test_coefficients_are_the_best_ones() -> None:
    """Found anew as a linear programme: the least distance from 1 anywhere on what has become of [0.004, 1], and 3 %
    above."""
    low, high = 0.004, 1.0
    for coefficients in COEFFICIENTS:
        at = np.concatenate([np.geomspace(low, 1.03 * high, 2000), np.linspace(low, 1.03 * high, 2000)])
        powers = np.stack([at, at**3, at**5], axis=1)
        limits = np.concatenate([np.c_[powers, -np.ones(len(at))], np.c_[-powers, -np.ones(len(at))]])
        bounds = np.concatenate([np.ones(len(at)), -np.ones(len(at))])
        best = linprog([0, 0, 0, 1], limits, bounds, bounds=[(None, None)] * 3 + [(0, None)], method="highs")
        np.testing.assert_allclose(coefficients, best.x[:3], rtol=1e-3)
        low, high = 1 - best.x[3], 1 + best.x[3]
    assert (round(low, 2), round(high, 2)) == (0.84, 1.16)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_directions_stay_as_near_as_many(rank: int, dtype: torch.dtype) -> None:
    """A single one lies at the end of what the polynomials are made for, where roundings may not carry it away."""
    torch.manual_seed(0)
    given = torch.randn(50, 48, rank) @ torch.randn(50, rank, 96)
    values = torch.linalg.svdvals(orthogonal(given, dtype))
    assert values[:, 0].max() < 1.2
    assert values[:, rank - 1].min() > 0.8
    assert values[:, rank:].max() < 0.3  # of roundings


def test_steps_are_those_of_torchs_own_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its coefficients."""
    monkeypatch.setattr(optimizer_module, "COEFFICIENTS", [(3.4445, -4.7750, 2.0315)] * 5)
    torch.manual_seed(0)
    given = [torch.randn(12, 20), torch.randn(20, 12), torch.randn(12, 20)]
    gradients = [[torch.randn_like(value) for value in given] for _ in range(3)]
    theirs = [nn.Parameter(value.clone()) for value in given]
    optimizer = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in gradients:
        for parameter, gradient in zip(theirs, step, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for ours, their, before in zip(stepped(given, gradients, ["a", "b", "c"]), theirs, given, strict=True):
        moved = (their - before).abs().mean()
        assert (ours - their).abs().mean() < 0.02 * moved  # both in bf16


@pytest.mark.parametrize(("name", "parts"), [("attn.in_proj_weight", 3), ("ff.net.0.proj.weight", 2)])
def test_matrices_in_one_parameter_are_made_orthogonal_apart(name: str, parts: int) -> None:
    torch.manual_seed(0)
    single = [torch.randn(8, 8) for _ in range(parts)]
    gradients = [torch.randn(8, 8) * 10**scale for scale in range(parts)]
    (joined,) = stepped([torch.cat(single)], [[torch.cat(gradients)]], [name])
    apart = stepped(single, [gradients], [str(number) for number in range(parts)])
    torch.testing.assert_close(joined, torch.cat(apart), rtol=0, atol=1e-4)


def test_gradients_are_divided_first_and_a_bad_step_leaves_no_trace() -> None:
    torch.manual_seed(0)
    matrix, momentum = nn.Parameter(torch.randn(4, 6)), torch.randn(4, 6)
    muon = Muon({"m": matrix}, MuonConfig(learning_rate=0.1, momentum=0.5), 0.1, torch.float32)
    before, kept = matrix.detach().clone(), momentum.clone()
    matrix.grad = torch.full((4, 6), float("nan"))
    muon.step([momentum], 1.0, torch.ones(()), None)
    assert torch.equal(matrix, before)
    assert torch.equal(momentum, kept)
    matrix.grad = torch.ones(4, 6)
    muon.step([momentum], 1.0, torch.zeros(()), torch.tensor(4.0))
    torch.testing.assert_close(momentum, (kept + 0.25) / 2)
    assert not torch.equal(matrix, before)


def test_a_training_by_muon_goes_on_to_the_same_bytes() -> None:
    straight, reference = Run(by_muon()), DenoiseByBlocks()
    assert straight.train(reference) == Outcome(12, finished=True)
    plain = Run(config())
    plain.train(DenoiseByBlocks())
    assert plain.logged[12] != straight.logged[12]
    for stop in (1, 6, 11):
        first = Run(by_muon(), stop_after=stop)
        first.train(DenoiseByBlocks())
        second, resumed = Run(by_muon(), state=first.saved[stop]), DenoiseByBlocks()
        second.train(resumed)
        assert second.saved[12] == straight.saved[12]
        assert weights(resumed) == weights(reference)
    names = checkpoint.load(straight.saved[12]).tensors.keys()
    assert {name for name in names if name.startswith("optimizer.net.2.product.weight")} == {
        "optimizer.net.2.product.weight.momentum"
    }


def test_ranks_share_the_momentum_of_a_state() -> None:
    """Each saves half of the rows, and any number of ranks reads them again."""

    def state() -> State:
        model = DenoiseByBlocks()
        trained = dict(model.named_parameters())
        optimizer = Optimizer(model, trained, by_muon(), CPU)
        for number, parameter in enumerate(trained.values()):
            for value in optimizer.begin(parameter).values():
                value.copy_(torch.arange(value.numel()).view_as(value) + number)
        rows = {name: Rows(0, len(value)) for name, value in trained.items()}
        return State(model.state_dict(), trained, optimizer, None, rows)

    saved = state()
    parts = [Checkpoint(3, {}, *saved.share(number, 2)) for number in range(2)]
    assert len(parts[0].tensors["optimizer.net.2.product.weight.momentum"]) == 8
    fresh = state()
    for parameter in fresh.trained.values():
        fresh.optimizer.begin(parameter)
    fresh.restore(parts)
    for name, value in saved.snapshot().items():
        if ".step" not in name:
            assert torch.equal(fresh.snapshot()[name], value), name


def test_a_state_of_the_other_optimiser_is_refused_by_its_recipe() -> None:
    plain = Run(config(), stop_after=2)
    plain.train(DenoiseByBlocks())
    with pytest.raises(checkpoint.CheckpointMismatch, match="muon"):
        Run(by_muon(), state=plain.saved[2]).train(DenoiseByBlocks())


def test_muon_wants_whole_matrices() -> None:
    with pytest.raises(ValidationError, match="muon takes whole matrices, and no rank has any where shard is 2"):
        by_muon(shard=2)
