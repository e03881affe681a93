"""Steps that go wrong, alone and among ranks: raised, skipped or rewound; what is measured of a training beside it."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from stages.draws import Draws
from stages.settings.training import BadStepsConfig, Phase, TrainingConfig
from stages.state_dicts import Serialized
from stages.training import activity, checkpoint
from stages.training.activity import Activity
from stages.training.bad_steps import BadSteps, BadStepsWatch
from stages.training.callbacks import Callbacks, Parts
from stages.training.loop import train
from stages.training.meter import means
from tests.ranks import together

ROWS, STEPS = 8, 12
Spoil = Callable[[int, np.ndarray], np.ndarray]


class Toy(nn.Module):
    """With BatchNorm, whose statistics a bad batch would spoil."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 6))

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch["x"]
        first = (draws.uniform() < 0.5).float()
        error = (self.net(x + 0.1 * draws.normal(6)) - x).square().mean(dim=1)
        return error.mean(), {"half": (first * error).mean(), "half/share": first.mean()}


class Run(Callbacks):
    """One training in memory, some of whose batches are spoiled."""

    key = "toy.train"

    def __init__(
        self,
        then: str,
        spoil: Spoil,
        state: bytes | None = None,
        rank: int = 0,
        world: int = 1,
        log_every: int = 2,
        checkpoint_every: int = 4,
        **bad: object,
    ):
        super().__init__()
        self.model = Toy()
        self.saved: dict[int, bytes] = {0: state} if state else {}
        self.logged: dict[int, dict[str, float]] = {}
        self.told: list[tuple[list[int], str]] = []
        self.spoil, self.rank, self.world, self.stop_after = spoil, rank, world, STEPS
        self.config = TrainingConfig.model_validate(
            {
                "phases": [{"steps": STEPS, "batch_size": ROWS, "size": 64}],
                "learning_rate": 0.01,
                "warmup_steps": 0,
                "precision": "fp32",
                "log_every": log_every,
                "checkpoint_every": checkpoint_every,
                "bad_steps": {"then": then, **bad},
            }
        )

    def read(self, step: int) -> dict[str, np.ndarray]:
        rows = np.random.default_rng(step).normal(size=(ROWS, 6)).astype(np.float32)
        return {"x": self.spoil(step, rows)[self.rank * ROWS // self.world : (self.rank + 1) * ROWS // self.world]}

    def train(self, stop_after: int = STEPS) -> "Run":
        self.stop_after = stop_after
        train(
            self.model,
            self.read,
            self.config,
            self,
            seed=0,
            device=torch.device("cpu"),
            rank=self.rank,
            world=self.world,
        )
        return self

    def should_stop(self) -> bool:
        return max(self.logged, default=0) >= self.stop_after

    def log(self, step: int, values: dict[str, float]) -> None:
        self.logged[step] = values

    def bad_steps(self, steps: list[int], done: str) -> None:
        self.told.append((steps, done))

    def flops_of(self, phase: Phase) -> float:
        return 1e9

    def newest_state(self) -> Parts | None:
        return [partial(bytes, self.saved[max(self.saved)])] if self.saved else None

    def save_state(self, step: int, data: Serialized) -> None:
        self.saved[step] = bytes(data)

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()


def clean(step: int, rows: np.ndarray) -> np.ndarray:
    return rows


def spoiled_at(*steps: int, by: float = math.nan) -> Spoil:
    """One row of some steps is `by` times as large."""

    def spoil(step: int, rows: np.ndarray) -> np.ndarray:
        if step in steps:
            rows[-1] *= by
        return rows

    return spoil


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_raising_keeps_the_weights_before_the_bad_step() -> None:
    run = Run("raise", spoiled_at(5))
    with pytest.raises(BadSteps) as raised:
        run.train()
    assert str(raised.value) == (
        "toy.train: step 6 went wrong (loss nan, gradient norm nan); "
        "lower toy.train.learning_rate, or set toy.train.bad_steps.then to skip or rewind"
    )
    assert run.told == [([5], "raise")]
    assert sorted(run.saved) == [4]
    learnt = {key: value for key, value in run.weights.items() if "running" not in key and "tracked" not in key}
    before = checkpoint.load(Run("raise", clean, log_every=1).train(stop_after=5).saved[5]).tensors
    assert all(torch.equal(before[f"model.{key}"], value) for key, value in learnt.items())


@pytest.mark.parametrize("by", [math.nan, math.inf])
def test_a_skipped_step_leaves_no_trace(by: float) -> None:
    run = Run("skip", spoiled_at(5, 6, by=by)).train()
    assert run.told == [([5], "skip"), ([6], "skip")]
    assert all(value.isfinite().all() for value in run.weights.values() if value.is_floating_point())
    assert run.logged[6]["bad_steps"] == 1
    assert run.logged[STEPS]["bad_steps"] == 2
    seen = [(run.logged[step]["images"], run.logged[step]["images_left_out"]) for step in (4, 6, STEPS)]
    assert seen == [(4 * ROWS, 0), (5 * ROWS, ROWS), ((STEPS - 2) * ROWS, 2 * ROWS)]
    assert math.isfinite(run.logged[6]["loss"])  # of the good step that it was logged with
    moments = checkpoint.load(run.saved[STEPS]).tensors
    assert moments["optimizer.net.0.weight.step"] == STEPS - 2
    each = Run("skip", spoiled_at(5, 6, by=by), log_every=1, checkpoint_every=1).train()
    five, seven = (checkpoint.load(each.saved[step]).tensors for step in (5, 7))
    assert same(dict(five), dict(seven))


def test_rewinding_goes_on_behind_the_bad_step_from_the_checkpoint() -> None:
    run = Run("rewind", spoiled_at(6)).train(stop_after=8)  # seen at 8; the checkpoint is of 4
    assert run.told == [([6], "rewind")]
    four, eight = (checkpoint.load(run.saved[step]) for step in (4, 8))
    assert same(dict(four.tensors), dict(eight.tensors))
    assert eight.notes["bad_steps"] == 1
    assert (run.logged[8]["images"], run.logged[8]["images_left_out"]) == (4 * ROWS, 4 * ROWS)  # of steps 5 to 8
    on = Run("rewind", clean, state=run.saved[8]).train()
    assert (on.logged[STEPS]["images"], on.logged[STEPS]["images_left_out"]) == (8 * ROWS, 4 * ROWS)


def test_a_jump_of_the_loss_is_rewound() -> None:
    run = Run("rewind", spoiled_at(7, by=1e3), jump=10.0).train()
    assert run.told == [([7], "rewind")]
    assert run.logged[STEPS]["loss"] < 3 * run.logged[2]["loss"]
    plain = Run("raise", spoiled_at(7, by=1e3)).train()
    assert plain.told == []


@pytest.mark.parametrize(
    ("then", "stops"),
    [("skip", (2, 4, 6, 8, 10)), ("rewind", (4, 8))],  # elsewhere the stop itself makes a checkpoint to rewind to
)
def test_resuming_anywhere_gives_the_straight_runs_bytes(then: str, stops: tuple[int, ...]) -> None:
    straight = Run(then, spoiled_at(5, 9)).train()
    for stop in stops:
        first = Run(then, spoiled_at(5, 9)).train(stop_after=stop)
        second = Run(then, spoiled_at(5, 9), state=first.saved[stop]).train()
        assert second.saved[STEPS] == straight.saved[STEPS]


def test_a_loss_that_is_not_finite_is_skipped_where_its_gradient_is() -> None:
    class Overflowing(Toy):
        def forward(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
            loss, parts = super().forward(batch, draws)
            return loss + (math.inf if draws.step == 5 else 0.0), parts

    run = Run("skip", clean, log_every=1, checkpoint_every=1)
    run.model = Overflowing()
    run.train()
    assert run.told == [([5], "skip")]
    five, six = (checkpoint.load(run.saved[step]).tensors for step in (5, 6))
    assert same(dict(five), dict(six))


def test_too_many_end_the_training() -> None:
    run = Run("skip", spoiled_at(4, 6, 8), at_most=2)
    too_many = r"step 9 .*; more did than toy.train.bad_steps.at_most=2 allows: lower toy.train.learning_rate$"
    with pytest.raises(BadSteps, match=too_many):
        run.train()
    stopped = Run("skip", spoiled_at(4, 6, 8), at_most=2).train(stop_after=8)
    with pytest.raises(BadSteps, match=r"step 9 "):  # those before it was resumed count too
        Run("skip", spoiled_at(4, 6, 8), stopped.saved[8], at_most=2).train()


def test_there_must_be_a_checkpoint_to_rewind_to() -> None:
    with pytest.raises(BadSteps, match=r"step 2 .*; there is no checkpoint .* a smaller toy.train.checkpoint_every "):
        Run("rewind", spoiled_at(1)).train()


@pytest.mark.parametrize("then", ["raise", "rewind"])
def test_who_has_done_no_good_step_is_not_told_to_skip(then: str) -> None:
    """As where the weights that it starts from are ruined."""
    run = Run(then, clean, at_most=5)
    torch.nn.init.constant_(run.model.net[3].weight, 1e30)
    with pytest.raises(BadSteps, match=r"^toy.train: step 1 .*; no step has gone well yet: look at ") as raised:
        run.train()
    assert "skip" not in str(raised.value)


def test_whose_weights_are_ruined_is_not_told_to_skip() -> None:
    class Ruined(Toy):
        def forward(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
            if draws.step == 5:
                torch.nn.init.constant_(self.net[0].weight, math.nan)
            return super().forward(batch, draws)

    run = Run("raise", clean)
    run.model = Ruined()
    with pytest.raises(BadSteps, match=r"step 6 .*; its weights are not finite any more: lower toy.train.l\S+$"):
        run.train()


def test_a_training_that_raised_goes_on_with_another_policy() -> None:
    run = Run("raise", spoiled_at(5))
    with pytest.raises(BadSteps):
        run.train()
    assert Run("skip", spoiled_at(5), state=run.saved[4]).train().told == [([5], "skip")]


def test_a_jump_is_measured_against_the_usual_loss() -> None:
    watch = BadStepsWatch(BadStepsConfig(then="rewind", jump=2.0))
    assert watch.find([5.0], [1.0]) == []  # nothing is usual yet
    assert watch.usual_loss == 5.0
    assert watch.find([11.0, 9.0, math.nan, 1.0, 9.7], [1.0, math.inf, 1.0, 1.0, 1.0]) == [0, 1, 2, 4]
    assert watch.usual_loss == pytest.approx(5.0 - 0.05 * 4.0)
    with pytest.raises(ValidationError, match="jump needs then=rewind"):
        BadStepsConfig(jump=3.0)


class SharedRun(Run):
    """A rank's; parts of states are files that all can read."""

    folder: Path

    def newest_state(self) -> Parts | None:
        found = sorted(self.folder.iterdir())
        return [path.read_bytes for path in found[-2:]] or None

    def save_state(self, step: int, data: Serialized) -> None:
        (self.folder / f"{step:02d}-{self.rank}").write_bytes(bytes(data))


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for then in ("skip", "rewind"):
        run = SharedRun(then, spoiled_at(6), rank=rank, world=2)  # the last row is the second rank's
        run.folder = folder / then
        run.folder.mkdir(exist_ok=True)
        run.train()
        torch.save({"weights": dict(run.model.named_parameters()), "told": run.told}, folder / f"{then}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left behind, of whose batches one rank's was bad."""
    folder = tmp_path_factory.mktemp("ranks")
    together(_rank, (folder,), 2)
    return folder


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("then", ["skip", "rewind"])
def test_what_one_rank_sees_all_ranks_decide_alike(two_ranks: Path, then: str) -> None:
    first, second = (torch.load(two_ranks / f"{then}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(first["weights"], second["weights"])
    assert all(value.isfinite().all() for value in first["weights"].values())
    assert first["told"] == [([6], then)]
    assert second["told"] == []  # only the first rank tells


def test_the_speed_of_a_training_is_logged() -> None:
    run = Run("raise", clean).train()
    for step, values in run.logged.items():
        assert values["speed/images_per_second"] > 0
        assert values["speed/tflops"] == pytest.approx(values["speed/images_per_second"] * 1e9 / 1e12)
        assert 0 <= values["speed/waiting_for_data"] < 1
        assert 0 <= values["speed/saving"] < 1
        assert (values["speed/saving"] > 0) == (step - 2 in run.saved)  # the copy, by the entry after it
        assert values["speed/memory_gib"] > 0.05
        assert "speed/mfu" not in values  # nobody knows a CPU's peak


def test_a_scalar_with_a_share_is_the_mean_of_that_share() -> None:
    columns = {
        "loss": [1.0, 2.0, 9.0],
        "early": [0.2, 0.4, 7.0],
        "early/share": [0.5, 0.25, 1.0],
        "late/share": [0.0] * 3,
    }
    assert means({**columns, "late": [0.0] * 3}, bad=[2]) == pytest.approx({"loss": 1.5, "early": 0.6 / 0.75})
    assert means(columns, bad=[0, 1, 2]) == {}
    logged = Run("raise", clean).train().logged[2]
    assert logged["half"] > 0
    assert "half/share" not in logged


def test_activity_tells_where_the_time_went() -> None:
    doing = Activity()
    doing.begin(3, activity.READING)
    step, what, seconds = doing.now()
    assert (step, what) == (3, activity.READING)
    assert seconds >= 0
    doing.begin(3, activity.FORWARD)
    assert activity.READING in doing.take_seconds()
    assert doing.take_seconds() == {}
