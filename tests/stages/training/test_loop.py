"""The training loop: resuming, stopping, averaging, refusing, and several ranks."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from stages.diffusion import AdaptiveWeight
from stages.draws import Draws
from stages.settings.training import TrainingConfig
from stages.state_dicts import Serialized
from stages.training import checkpoint, loop
from stages.training.bad_steps import BadSteps
from stages.training.callbacks import Callbacks, Parts
from stages.training.checkpoint import CheckpointMismatch
from stages.training.loop import Outcome, train
from stages.training.meter import SPEED
from tests.ranks import together

ROWS = 8


class Denoise(nn.Module):
    """A toy with what resuming can get wrong: BatchNorm buffers, dropout, and drawn noise."""

    def __init__(self, dropout: float = 0.1, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Linear(6, 16),
            nn.BatchNorm1d(16) if norm else nn.Identity(),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(16, 6),
        )

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        noise = draws.normal(6)
        error = self.net(batch["x"] + 0.1 * noise) - batch["x"]
        return (error**2).mean(), {"worst": error.abs().max()}


def config(**changes: object) -> TrainingConfig:
    values: dict[str, object] = {
        "phases": [
            {"steps": 7, "batch_size": ROWS, "size": 64},
            {"steps": 5, "batch_size": ROWS // 2, "size": 64, "freeze_norm": True},
        ],
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "schedule": "cosine",
        "precision": "fp32",
        "ema": {"decay": 0.5, "every": 2, "start": 4},
        "checkpoint_every": 1,
        "log_every": 1,
    }
    return TrainingConfig.model_validate(values | changes)


def rows(recipe: TrainingConfig, rank: int = 0, world: int = 1) -> Callable[[int], dict[str, np.ndarray]]:
    """Batches that are a function of the step, cut for one rank."""

    def read(step: int) -> dict[str, np.ndarray]:
        size = recipe.phase_at(step).batch_size
        everything = np.random.default_rng(step).normal(size=(size, 6)).astype(np.float32)
        return {"x": everything[rank * size // world : (rank + 1) * size // world]}

    return read


class Run(Callbacks):
    """One training in memory: its saved states, its log, and the step after which it is asked to stop."""

    def __init__(self, recipe: TrainingConfig, state: bytes | None = None, stop_after: int | None = None):
        super().__init__()
        self.recipe, self.state, self.stop_after = recipe, state, stop_after
        self.saved: dict[int, bytes] = {}
        self.logged: dict[int, dict[str, float]] = {}

    def train(
        self,
        objective: nn.Module,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        device: str = "cpu",
    ) -> Outcome:
        return train(
            objective,
            rows(self.recipe, rank, world),
            self.recipe,
            self,
            seed=seed,
            device=torch.device(device),
            rank=rank,
            world=world,
        )

    def newest_state(self) -> Parts | None:
        return [partial(bytes, self.state)] if self.state else None

    def save_state(self, step: int, data: Serialized) -> None:
        self.saved[step] = bytes(data)

    def should_stop(self) -> bool:
        return self.stop_after is not None and max(self.logged, default=0) >= self.stop_after

    def log(self, step: int, values: dict[str, float]) -> None:
        self.logged[step] = {name: value for name, value in values.items() if not name.startswith(SPEED)}


def weights(module: nn.Module) -> bytes:
    return b"".join(value.numpy().tobytes() for value in module.state_dict().values())


def test_stopping_at_every_step_and_resuming_gives_the_same_bytes() -> None:
    straight = Run(config())
    reference = Denoise()
    assert straight.train(reference) == Outcome(12, finished=True)
    for stop in range(1, 12):
        first = Run(config(), stop_after=stop)
        assert first.train(Denoise()) == Outcome(stop, finished=False)
        second = Run(config(), state=first.saved[stop])
        resumed = Denoise()
        assert second.train(resumed) == Outcome(12, finished=True)
        assert second.saved[12] == straight.saved[12]
        assert weights(resumed) == weights(reference)
        assert first.logged | second.logged == straight.logged


class Clock:
    """Stands in for `time`; a step takes three seconds by it."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Slow(Denoise):
    """Whose forward pass moves a clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        self.clock.now += 3.0
        return super().forward(batch, draws)


def test_a_stop_is_looked_for_every_few_seconds_from_the_first_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = Clock(), list[float]()
    monkeypatch.setattr(loop, "time", clock)
    phases = [{"steps": 21, "batch_size": 12, "size": 64}, {"steps": 39, "batch_size": 12, "size": 64}]
    run = Run(config(log_every=20, checkpoint_every=20, phases=phases))
    monkeypatch.setattr(run, "should_stop", lambda: asked.append(clock.now))  # never
    run.train(Slow(clock))
    assert max(np.diff([0.0, *asked, clock.now])) <= loop._STOP_S


def test_a_stop_is_looked_for_after_the_first_of_a_phase_s_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may take much longer than those of the phase before."""
    clock, asked = Clock(), list[float]()
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(loop, "_STOP_S", 30.0)  # ten steps
    phases = [{"steps": 20, "batch_size": 12, "size": 64}, {"steps": 40, "batch_size": 12, "size": 64}]
    run = Run(config(log_every=20, checkpoint_every=20, phases=phases))
    monkeypatch.setattr(run, "should_stop", lambda: asked.append(clock.now))  # never
    run.train(Slow(clock))
    assert {60.0, 63.0} <= set(asked)


def test_where_steps_are_slow_a_stop_is_seen_between_log_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_STOP_S", 0.0)  # shorter than any step
    recipe = config(log_every=4, checkpoint_every=4)
    straight, stopped = Run(recipe), Run(recipe)
    straight.train(Denoise())
    monkeypatch.setattr(stopped, "should_stop", iter([False, False, False, False, False, True]).__next__)
    assert stopped.train(Denoise()) == Outcome(6, finished=False)  # asked after every step
    assert (list(stopped.logged), list(stopped.saved)) == ([4, 6], [4, 6])
    resumed = Run(recipe, state=stopped.saved[6])
    resumed.train(Denoise())
    assert resumed.saved[12] == straight.saved[12]


def test_a_finished_state_gives_the_trained_weights_without_a_step() -> None:
    straight = Run(config())
    reference = Denoise()
    straight.train(reference)
    again = Run(config(), state=straight.saved[12])
    resumed = Denoise()
    assert again.train(resumed) == Outcome(12, finished=True)
    assert weights(resumed) == weights(reference)
    assert not again.logged
    assert not again.saved


def test_the_loss_falls() -> None:
    phases = [{"steps": 200, "batch_size": ROWS, "size": 64}]
    run = Run(config(phases=phases, ema=None, log_every=20, checkpoint_every=200))
    run.train(Denoise(dropout=0.0))
    assert sorted(run.logged) == list(range(20, 201, 20))
    assert sorted(run.saved) == [200]
    assert run.logged[200]["loss"] < 0.3 * run.logged[20]["loss"]
    assert run.logged[200]["images"] == 200 * ROWS


def test_the_average_copies_until_its_start_and_then_follows() -> None:
    run = Run(config())
    shipped = Denoise()
    run.train(shipped)
    states = {step: checkpoint.load(data).tensors for step, data in run.saved.items()}
    for key in ("net.0.weight", "net.1.running_mean"):  # a weight, and a buffer
        expected = states[4][f"model.{key}"]
        for step in (1, 2, 3, 4):
            assert torch.equal(states[step][f"average.{key}"], states[step][f"model.{key}"])
        for step in (6, 8, 10, 12):
            assert torch.equal(states[step - 1][f"average.{key}"], expected)  # nothing moves between updates
            expected = expected.lerp(states[step][f"model.{key}"], 0.5)
            torch.testing.assert_close(states[step][f"average.{key}"], expected)
        assert torch.equal(shipped.state_dict()[key], states[12][f"average.{key}"])


def test_the_average_moves_at_the_last_step_too_and_must_have_moved() -> None:
    run = Run(config(ema={"decay": 0.5, "every": 5, "start": 5}))  # of 12 steps: a copy at 5, then 10 and 12
    run.train(Denoise())
    states = {step: checkpoint.load(data).tensors for step, data in run.saved.items()}
    expected = states[5]["model.net.0.weight"].lerp(states[10]["model.net.0.weight"], 0.5)
    expected = expected.lerp(states[12]["model.net.0.weight"], 0.5)
    torch.testing.assert_close(states[12]["average.net.0.weight"], expected)
    with pytest.raises(ValidationError, match=r"ema.start \+ ema.every \(13\) must not exceed the 12 steps"):
        config(ema={"decay": 0.5, "every": 5, "start": 8})


def test_the_place_of_the_average_changes_neither_bytes_nor_recipe() -> None:
    kept, moved = Run(config()), Run(config(ema={"decay": 0.5, "every": 2, "start": 4, "device": "cpu"}))
    models = Denoise(), Denoise()
    kept.train(models[0])
    moved.train(models[1])
    assert kept.saved == moved.saved
    assert weights(models[0]) == weights(models[1])
    resumed = Denoise()
    Run(moved.recipe, state=kept.saved[6]).train(resumed)  # half of it beside the model, half on the CPU
    assert weights(resumed) == weights(models[0])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_average_on_the_cpu_equals_one_on_the_gpu() -> None:
    states = []
    for place in ("model", "cpu"):
        run = Run(config(ema={"decay": 0.5, "every": 2, "start": 4, "device": place}))
        run.train(Denoise(), device="cuda")
        states.append(checkpoint.load(run.saved[12]).tensors)
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-6, atol=1e-7)


def test_frozen_norm_keeps_its_statistics() -> None:
    run = Run(config())
    run.train(Denoise())
    means = [checkpoint.load(run.saved[step]).tensors["model.net.1.running_mean"].tolist() for step in range(6, 13)]
    assert means[0] != means[1]
    assert all(before == after for before, after in pairwise(means[1:]))


def test_a_loss_that_is_not_finite_names_its_step_and_saves_nothing_after_it() -> None:
    recipe = config(log_every=4, checkpoint_every=4)
    run = Run(recipe)
    clean = rows(recipe)

    def poisoned(step: int) -> dict[str, np.ndarray]:
        return {"x": np.full_like(clean(step)["x"], np.nan)} if step == 5 else clean(step)

    model = Denoise(norm=False)
    with pytest.raises(BadSteps, match="step 6 "):
        train(model, poisoned, recipe, run, seed=0, device=torch.device("cpu"))
    assert sorted(run.saved) == [4]
    before = Run(config(), stop_after=5)
    expected = Denoise(norm=False)
    before.train(expected)
    assert weights(model) == weights(expected)  # the bad update and all after it were skipped


@pytest.mark.parametrize(
    ("recipe", "model", "seed", "named"),
    [
        (config(learning_rate=0.02), Denoise(), 0, "learning_rate = 0.01, this training has 0.02"),
        (config(), Denoise(), 1, "seed = 0, this training has 1"),
        (config(), Denoise(norm=False), 0, "average.net.1.bias, which this model has not"),
        (config(ema=None), Denoise(), 0, "ema = "),
    ],
)
def test_a_state_of_another_training_is_refused(
    recipe: TrainingConfig, model: nn.Module, seed: int, named: str
) -> None:
    first = Run(config(), stop_after=3)
    first.train(Denoise())
    before = weights(model)
    with pytest.raises(CheckpointMismatch, match=named):
        Run(recipe, state=first.saved[3]).train(model, seed=seed)
    assert weights(model) == before


def test_a_wider_model_is_named_by_its_first_tensor() -> None:
    first = Run(config(), stop_after=3)
    first.train(Denoise())
    wide = Denoise()
    wide.net[0] = nn.Linear(6, 17)
    with pytest.raises(CheckpointMismatch, match=r"average.net.0.bias is \[16\] .* but \[17\]"):
        Run(config(), state=first.saved[3]).train(wide)


def test_damaged_bytes_are_refused() -> None:
    first = Run(config(), stop_after=1)
    first.train(Denoise())
    with pytest.raises(CheckpointMismatch, match="cannot be read"):
        checkpoint.load(first.saved[1][:-5])


def test_phases_are_found_by_arithmetic() -> None:
    recipe = config()
    assert [recipe.phase_at(step).batch_size for step in (0, 6, 7, 11)] == [8, 8, 4, 4]
    assert [recipe.images_after(steps) for steps in (0, 7, 8, 12)] == [0, 56, 60, 76]


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint_every": 3, "log_every": 2},
        {"warmup_steps": 12},
        {"ema": {"decay": 0.9, "every": 1, "start": 12}},
        {"phases": []},
        {"momentum": 0.9},
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        config(**changes)


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"phases.1.batch_size=4 does not divide among workers=3"):
        config(
            phases=[{"steps": 1, "batch_size": 6, "size": 64}, {"steps": 4, "batch_size": 4, "size": 64}],
            ema=None,
            warmup_steps=0,
        ).require_divisible(3)


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    run = Run(config(), stop_after=9)
    if rank == 1:
        run.logged[0] = {}  # rank 1 logs nothing, so only rank 0 asks to stop: both must
    outcome = run.train(Denoise(dropout=0.0, norm=False), rank=rank, world=2)
    assert outcome == Outcome(9, finished=False)
    assert max(run.saved) == 9  # of each a part
    if rank == 0:
        torch.save({step: values["loss"] for step, values in run.logged.items()}, folder / "losses.pt")
    torch.save(weighed(rank, world=2), folder / f"weights-{rank}.pt")
    dist.barrier()  # neither rank leaves while the other still talks to it
    dist.destroy_process_group()


def weighed(rank: int = 0, world: int = 1) -> Tensor:
    """What adaptive weights know after three batches, of which a rank saw its share."""
    weight = AdaptiveWeight()
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        abar, errors = torch.rand(2, ROWS, generator=generator).chunk(world, dim=1)[rank]
        weight(abar, errors)
    return weight.running


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left behind."""
    folder = tmp_path_factory.mktemp("ranks")
    together(_rank, (folder,), 2)
    return folder


@pytest.mark.xdist_group("ranks")
def test_two_ranks_see_the_losses_of_one(two_ranks: Path) -> None:
    both = torch.load(two_ranks / "losses.pt", weights_only=True)
    alone = Run(config(), stop_after=9)
    alone.train(Denoise(dropout=0.0, norm=False))
    assert both == pytest.approx({step: values["loss"] for step, values in alone.logged.items()}, rel=1e-5)


@pytest.mark.xdist_group("ranks")
def test_all_ranks_learn_the_same_adaptive_weights_as_one(two_ranks: Path) -> None:
    first, second = (torch.load(two_ranks / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, weighed())
    assert (first != 1).any()
