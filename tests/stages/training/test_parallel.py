"""One training on several ranks, real processes over gloo: spread or copied, cut into pieces, resumed by others."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from stages.models.stage_c import StageC, StageCObjective
from stages.settings.losses import StageCLoss
from stages.settings.models import StageCConfig
from stages.settings.training import TrainingConfig
from stages.state_dicts import Serialized
from stages.training import checkpoint
from stages.training.callbacks import Callbacks, Parts
from stages.training.loop import Outcome, train
from stages.training.parallel import Replica, pieces
from stages.training.validation import Validation
from tests.ranks import together

pytestmark = pytest.mark.xdist_group("ranks")  # which start once
WORLD = 4
ROWS = 12
STEPS = 12
# A bias of attention's keys has no effect, so Adam scales up what rounding leaves of its gradient.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def recipe(**changes: object) -> TrainingConfig:
    values = {
        "phases": [{"steps": STEPS, "batch_size": ROWS, "size": 128}],
        "learning_rate": 0.003,
        "warmup_steps": 2,
        "precision": "fp32",
        "ema": {"decay": 0.5, "every": 2, "start": 4},
        "checkpoint_every": 1,
        "log_every": 1,
    }
    return TrainingConfig.model_validate(values | changes)


class Run(Callbacks):
    """A training of a tiny Stage C by one of `world` ranks; all ranks' saved states lie in one folder, as files."""

    def __init__(self, folder: Path, rank: int = 0, world: int = 1, **changes: object):
        super().__init__()
        self.folder, self.rank, self.world = folder, rank, world
        self.config = recipe(**changes)
        replica, place = divmod(rank, self.config.shard)
        self.part = f"{place * (world // self.config.shard) + replica}of{world}"
        self.resume: Sequence[Path] = ()
        self.stop_after, self.bytes_read = STEPS, 0
        if self.config.validation:
            self.validation = self.held_out()
        torch.manual_seed(0)
        model = StageC(StageCConfig(width=32, depth=2, heads=4, text_width=20, dropout=0.0))
        self.objective = StageCObjective(model, StageCLoss(), torch.zeros(7, 20))
        self.losses: dict[int, float] = {}

    def read(self, step: int) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(step)
        latents = generator.normal(size=(ROWS, 16, 3, 3)).astype(np.float32)
        text = generator.normal(size=(ROWS, 7, 20)).astype(np.float32)
        own = slice(self.rank * ROWS // self.world, (self.rank + 1) * ROWS // self.world)
        return {"latents_c": latents[own], "text": text[own]}

    def held_out(self) -> Validation:
        """Of 40 samples: three pieces, one of them smaller, so that some of four ranks have none."""
        generator = np.random.default_rng(99)
        batch = {
            "latents_c": generator.normal(size=(40, 16, 3, 3)).astype(np.float32),
            "text": generator.normal(size=(40, 7, 20)).astype(np.float32),
            "key": generator.integers(0, 256, (40, 16), np.uint8),
        }
        return Validation(
            lambda first, rows: {name: values[first : first + rows] for name, values in batch.items()}, 40
        )

    def validate(self) -> dict[str, float]:
        """Losses of the weights, and of an average that is not the same."""
        replica = Replica(self.objective, torch.device("cpu"), self.rank, self.world, self.config.shard, ["fp32"])
        average = {name: 1.5 * value for name, value in replica.state().items()}
        found = self.held_out().losses(replica, average, self.config, self.rank)
        return {name: value for name, value in found.items() if not name.endswith("seconds")}

    def train(self, resume: Sequence[Path] = (), stop_after: int = STEPS) -> dict[str, Tensor]:
        """Train, and return the weights."""
        self.folder.mkdir(exist_ok=True)
        self.resume, self.stop_after = resume, stop_after
        outcome = train(
            self.objective,
            self.read,
            self.config,
            self,
            seed=0,
            device=torch.device("cpu"),
            rank=self.rank,
            world=self.world,
        )
        assert outcome == Outcome(stop_after, finished=stop_after == STEPS, best=outcome.best)
        return self.objective.state_dict()

    def newest_state(self) -> Parts | None:
        return [partial(self.read_part, path) for path in self.resume] or None

    def read_part(self, path: Path) -> bytes:
        self.bytes_read += path.stat().st_size
        return path.read_bytes()

    def state_after(self, step: int) -> Parts:
        return [path.read_bytes for path in parts(self.folder, step)]

    def save_state(self, step: int, data: Serialized) -> None:
        (self.folder / f"{step}-{self.part}").write_bytes(bytes(data))

    def should_stop(self) -> bool:
        return max(self.losses, default=0) >= self.stop_after  # only rank 0 has losses

    def log(self, step: int, values: dict[str, float]) -> None:
        self.losses[step] = values["loss"]


def parts(folder: Path, step: int) -> list[Path]:
    return sorted(folder.glob(f"{step}-*"))


def _together(rank: int, world: int, folder: Path, name: str, work: Callable[[], dict[str, Tensor] | None]) -> None:
    """Do a piece of work with the first `world` ranks, and keep the weights that each has in the end."""
    if rank < world:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{name}.meet", rank=rank, world_size=world)
        weights = work()
        if weights is not None:
            torch.save(weights, folder / f"{name}.{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)

    def straight(name: str, world: int, **changes: object) -> None:
        run = Run(folder / name, rank, world, **changes)
        _together(rank, world, folder, name, run.train)
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(run.losses))

    def resumed(name: str, world: int, of: str, **changes: object) -> None:
        run = Run(folder / name, rank, world, **changes)
        _together(rank, world, folder, name, lambda: run.train(resume=parts(folder / of, 6)))
        (folder / f"{name}.{rank}.read").write_text(str(run.bytes_read))
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(run.losses))

    def validated(name: str, world: int, shard: int = 1) -> None:
        def work() -> None:
            run = Run(folder / name, rank, world, shard=shard, validation={"every": 1})
            run.objective.load_state_dict(weights(folder, "one"))
            (folder / f"{name}.{rank}.json").write_text(json.dumps(run.validate()))

        _together(rank, world, folder, name, work)

    def everywhere() -> None:
        for stop in range(1, STEPS):
            first = Run(folder / f"stopped-{stop}", rank, 2)
            first.train(stop_after=stop)
            dist.barrier()
            weights = Run(folder / f"again-{stop}", rank, 2).train(resume=parts(folder / f"stopped-{stop}", stop))
            torch.save(weights, folder / f"again-{stop}.{rank}.pt")

    straight("one", 1)
    straight("pieces", 1, micro_batch=3)
    straight("copied", 2)
    straight("copied_bf16", 2, reduce="bf16")
    straight("copied_pieces", 2, micro_batch=2)
    straight("spread", 2, shard=2)
    straight("spread_pieces", 2, shard=2, micro_batch=3)
    straight("hybrid", 4, shard=2)
    resumed("spread_resumed", 2, "spread", shard=2)
    resumed("by_one", 1, "spread")
    resumed("by_three", 3, "spread", shard=3)
    resumed("by_copies", 2, "spread")
    resumed("from_one", 4, "one", shard=4)
    resumed("copied_again", 2, "copied")
    resumed("hybrid_again", 4, "hybrid", shard=2)
    _together(rank, 2, folder, "everywhere", everywhere)
    validated("loss_of_one", 1)
    validated("loss_of_two", 2)
    validated("loss_of_spread", 4, shard=2)
    straight("copied_watched", 2, validation={"every": 3})
    straight("spread_best", 2, shard=2, validation={"every": 3, "keep": "best"})


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks left behind."""
    folder = tmp_path_factory.mktemp("ranks")
    together(_rank, (folder,), WORLD)
    return folder


def weights(folder: Path, name: str, rank: int = 0) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(folder / f"{name}.{rank}.pt", weights_only=True)
    return loaded


def losses(folder: Path, name: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize(
    ("name", "world"),
    [("pieces", 1), ("copied", 2), ("copied_pieces", 2), ("spread", 2), ("spread_pieces", 2), ("hybrid", 4)],
)
def test_however_it_is_spread_the_losses_and_weights_are_those_of_one_rank(ranks: Path, name: str, world: int) -> None:
    assert losses(ranks, name) == pytest.approx(losses(ranks, "one"), rel=1e-5)
    for rank in range(world):
        torch.testing.assert_close(weights(ranks, name, rank), weights(ranks, "one"), **CLOSE)
        assert all(torch.equal(weights(ranks, name, rank)[key], value) for key, value in weights(ranks, name).items())


def test_gradients_exchanged_in_bf16_are_rounded(ranks: Path) -> None:
    exact, rounded = losses(ranks, "copied"), losses(ranks, "copied_bf16")
    assert rounded == pytest.approx(exact, rel=1e-2)
    assert rounded != pytest.approx(exact, rel=1e-7)


def test_resumed_after_every_step_is_the_straight_run_to_the_bit(ranks: Path) -> None:
    for stop in range(1, STEPS):
        for rank in range(2):
            found = weights(ranks, f"again-{stop}", rank)
            assert all(torch.equal(found[key], value) for key, value in weights(ranks, "copied", rank).items()), stop
        again, straight = (parts(ranks / name, STEPS) for name in (f"again-{stop}", "copied"))
        assert [path.read_bytes() for path in again] == [path.read_bytes() for path in straight]
        assert len(straight) == 2


def test_a_spread_training_resumes_to_the_bit(ranks: Path) -> None:
    for there, here in zip(parts(ranks / "spread", STEPS), parts(ranks / "spread_resumed", STEPS), strict=True):
        assert there.read_bytes() == here.read_bytes()
    assert len(parts(ranks / "spread", STEPS)) == 2


@pytest.mark.parametrize("name", ["by_one", "by_three", "by_copies", "from_one"])
def test_another_number_of_ranks_goes_on_from_it(ranks: Path, name: str) -> None:
    rest = {step: loss for step, loss in losses(ranks, "one").items() if int(step) > 6}
    assert losses(ranks, name) == pytest.approx(rest, rel=1e-5)
    torch.testing.assert_close(weights(ranks, name), weights(ranks, "one"), **CLOSE)


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("spread_resumed", "spread"),
        ("by_one", "spread"),
        ("by_three", "spread"),
        ("by_copies", "spread"),
        ("from_one", "one"),
        ("copied_again", "copied"),
        ("hybrid_again", "hybrid"),
    ],
)
def test_all_ranks_together_read_each_byte_of_a_state_once(ranks: Path, name: str, of: str) -> None:
    read = [int((ranks / f"{name}.{rank}.read").read_text()) for rank in range(WORLD)]
    assert sum(read) == sum(path.stat().st_size for path in parts(ranks / of, 6))


@pytest.mark.parametrize("name", ["copied", "hybrid"])
def test_copies_save_a_part_each_and_resume_to_the_bit(ranks: Path, name: str) -> None:
    there, here = parts(ranks / name, STEPS), parts(ranks / f"{name}_again", STEPS)
    assert [path.read_bytes() for path in there] == [path.read_bytes() for path in here]
    largest = max(path.stat().st_size for path in there)
    (whole,) = parts(ranks / "one", STEPS)
    assert largest < whole.stat().st_size * {"copied": 0.6, "hybrid": 0.4}[name]  # names and shapes are in each


@pytest.mark.parametrize(("name", "world"), [("two", 2), ("spread", 4)])
def test_the_validation_loss_does_not_depend_on_the_ranks(ranks: Path, name: str, world: int) -> None:
    alone = losses(ranks, "loss_of_one.0")
    assert alone["validation_loss"] != pytest.approx(alone["validation_loss_ema"], rel=1e-3)
    for rank in range(world):
        assert losses(ranks, f"loss_of_{name}.{rank}") == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(("name", "alone"), [("copied_watched", "copied"), ("spread_best", "spread")])
def test_validation_leaves_the_training_of_several_ranks_alone_to_the_bit(ranks: Path, name: str, alone: str) -> None:
    assert losses(ranks, name) == losses(ranks, alone)
    for step in (6, STEPS):
        for watched, plain in zip(parts(ranks / name, step), parts(ranks / alone, step), strict=True):
            found, wanted = (checkpoint.load(path.read_bytes()).tensors for path in (watched, plain))
            assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_a_spread_training_gives_back_its_best_weights(ranks: Path) -> None:
    states = [checkpoint.load(path.read_bytes()) for path in parts(ranks / "spread_best", STEPS)]
    best = states[0].best
    assert best is not None
    assert best == states[1].best
    kept = [checkpoint.load(path.read_bytes()) for path in parts(ranks / "spread_best", best.step)]
    for key, value in weights(ranks, "spread_best").items():
        average = [part.tensors[f"average.{key}"] for part in kept]
        assert torch.equal(value, torch.cat(average) if f"average.{key}" in kept[0].rows else average[0])


@pytest.mark.parametrize("name", ["copied", "spread", "hybrid"])
def test_the_parts_of_a_checkpoint_hold_each_row_once(ranks: Path, name: str) -> None:
    (whole,) = [checkpoint.load(path.read_bytes()) for path in parts(ranks / "one", 6)]
    spread = [checkpoint.load(path.read_bytes()) for path in parts(ranks / name, 6)]
    held = sum(sum(tensor.numel() for tensor in part.tensors.values()) for part in spread)
    assert held < 1.1 * sum(tensor.numel() for tensor in whole.tensors.values())
    for key, rows in spread[0].rows.items():
        both = torch.cat([part.tensors[key] for part in spread])
        assert (rows.total, both.shape) == (len(whole.tensors[key]), whole.tensors[key].shape)
        torch.testing.assert_close(both, whole.tensors[key], **CLOSE)


def test_pieces_are_equal_and_cover_the_batch() -> None:
    assert pieces(6, None) == [slice(0, 6)]
    assert pieces(6, 8) == [slice(0, 6)]
    assert pieces(6, 2) == [slice(0, 2), slice(2, 4), slice(4, 6)]


@pytest.mark.parametrize(
    ("changes", "world", "named"),
    [
        ({"micro_batch": 4}, 2, "micro_batch=4 does not divide the 6 rows that each of 2 workers has"),
        ({"shard": 3}, 4, "shard=3 does not divide workers=4"),
    ],
)
def test_what_does_not_divide_is_refused(changes: dict[str, object], world: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        recipe(**changes).require_divisible(world)
