"""Phases: a training goes through sizes and views, keeps the weights after each, and ends between two of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from datasets.files import storage
from datasets.formats import shards
from datasets.formats.shard_table import Shards
from datasets.formats.shards import Clock, ImageRow
from datasets.reading import views
from datasets.reading.batches import Batches, Source
from pipeline.cluster.ranks.checkpoints import Checkpoints
from pipeline.errors import UsageError
from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.settings import compose
from pipeline.settings.config import Config
from stages.settings.training import TrainingConfig
from stages.state_dicts import Serialized
from stages.training import checkpoint
from stages.training.callbacks import Callbacks, Parts
from stages.training.checkpoint import Checkpoint, Rows
from stages.training.loop import Outcome, train
from tests.stages.training.test_loop import Denoise

PICTURES = 12
HALVES = [
    {"steps": 7, "batch_size": 8, "size": 64},
    {"steps": 6, "batch_size": 6, "size": 128},
    {"steps": 5, "batch_size": 4, "size": 128, "view": "even"},
]
ENDS = (7, 13, 18)
FINE = (
    "data.views={fine: {min_aesthetic: 5.0}}",
    "stage_c.train.phases=[{steps: 2, batch_size: 8, size: 128}, {steps: 2, batch_size: 4, size: 128, view: fine}]",
)


def recipe(phases: int = 3) -> TrainingConfig:
    """The first phases of the training; saved states lie apart from the phases' ends."""
    return TrainingConfig.model_validate(
        {
            "phases": HALVES[:phases],
            "learning_rate": 0.01,
            "warmup_steps": 2,
            "precision": "fp32",
            "ema": {"decay": 0.5, "every": 1, "start": 2},
            "checkpoint_every": 4,
            "log_every": 2,
        }
    )


@pytest.fixture(scope="module")
def stretches(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str | None], Batches]:
    """Batches by size and view, of shards on the disk; the values tell the sizes apart."""
    found = {}
    bits = np.packbits(np.arange(PICTURES) % 2 == 0).tobytes()
    for size in (64, 128):
        folder, name = str(tmp_path_factory.mktemp(f"at{size}")), shards.tensor_name(0)
        rows = [ImageRow(row, f"{row:032x}", "", "", "png", b"") for row in range(PICTURES)]
        values = np.random.default_rng(size).normal(size=(PICTURES, 6)).astype(np.float32)
        entry = storage.publish(shards.write_tensors(rows, "x", values), storage.join(folder, name))
        shards.publish_receipt(folder, 0, rows_in=PICTURES, rows_out=PICTURES, files={name: entry}, clock=Clock())
        for view in (None, "even"):
            chosen = views.View({0: (PICTURES, bits)}) if view else None
            found[size, view] = Batches([Source("x", Shards.gathered(folder))], seed=0, view=chosen)
    return found


def trained(
    stretches: dict[tuple[int, str | None], Batches],
    folder: Path,
    config: TrainingConfig,
    stop_after: int | None = None,
) -> tuple[Outcome, dict[str, Tensor], Checkpoints]:
    """Train, or go on training, with states in a folder; the outcome, the weights, the states."""
    objective, kept = Denoise(), Kept(folder, config, stop_after)

    def read_batch(step: int) -> dict[str, np.ndarray]:
        phase = config.phase_at(step)
        batch = stretches[phase.size, phase.view].read(config.images_after(step), phase.batch_size)
        return {"x": batch["x"]}

    outcome = train(objective, read_batch, config, kept, seed=0, device=torch.device("cpu"))
    return outcome, objective.state_dict(), kept.states


warnings: list[str] = []


class Kept(Callbacks):
    """States in a folder, and the step after which the training is asked to stop."""

    def __init__(self, folder: Path, config: TrainingConfig, stop_after: int | None) -> None:
        super().__init__()
        self.states = Checkpoints(str(folder), warnings.append, milestones=config.phase_ends)
        self.recipe, self.stop_after, self.done = config.recipe(0), stop_after, 0

    def newest_state(self) -> Parts | None:
        newest = self.states.newest()
        return newest.parts if newest else None

    def save_state(self, step: int, data: Serialized) -> None:
        self.states.save(step, data, self.recipe)

    def should_stop(self) -> bool:
        return self.stop_after is not None and self.done >= self.stop_after

    def log(self, step: int, values: dict[str, float]) -> None:
        self.done = step


def weights_after(states: Checkpoints, step: int) -> dict[str, Tensor]:
    return checkpoint.final_weights(checkpoint.load(read()) for read in states.after(step).parts)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("stop", [2, 6, 7, 8, 12, 13, 14, 16])
def test_stopped_on_either_side_of_a_border_it_ends_with_the_same_bytes(stretches, tmp_path, stop):
    _, straight, calm = trained(stretches, tmp_path / "straight", recipe())
    first, _, _ = trained(stretches, tmp_path / "stopped", recipe(), stop_after=stop)
    assert first == Outcome(stop, finished=False)
    second, resumed, states = trained(stretches, tmp_path / "stopped", recipe())
    assert second == Outcome(18, finished=True)
    assert_same(resumed, straight)
    for end in ENDS:
        assert_same(weights_after(states, end), weights_after(calm, end))


def test_the_states_after_each_phase_are_kept_beside_the_newest(stretches, tmp_path):
    _, final, states = trained(stretches, tmp_path, recipe())
    steps = sorted(int(name[:9]) for name in storage.listing(str(tmp_path)) if name.endswith(".json"))
    assert steps == [7, 13, 16, 18]
    assert_same(weights_after(states, 18), final)


@pytest.mark.parametrize("phases", [1, 2])
def test_the_weights_after_a_phase_are_those_of_a_training_that_ends_there(stretches, tmp_path, phases):
    _, _, states = trained(stretches, tmp_path / "whole", recipe())
    _, alone, _ = trained(stretches, tmp_path / "alone", recipe(phases))
    assert_same(weights_after(states, ENDS[phases - 1]), alone)


def test_weights_are_put_together_from_the_rows_of_all_parts():
    whole = torch.arange(15.0).reshape(5, 3)
    parts = [
        Checkpoint(
            step=1,
            recipe={},
            tensors={"model.a": whole[start:end] - 1, "average.a": whole[start:end], "average.b": torch.tensor(start)},
            rows={key: Rows(start, 5) for key in ("model.a", "average.a")},
        )
        for start, end in ((0, 2), (2, 4), (4, 5), (5, 5))
    ]
    found = checkpoint.final_weights(checkpoint.load(bytes(checkpoint.dump(part))) for part in parts)
    assert_same(found, {"a": whole, "b": torch.tensor(0)})


# ------------------------------------------------------------------------------------------------ interpolation


def loaded(*words: str) -> Config:
    return compose.load("stage_c", ["scale=micro", "targets=[stage_c]", *words])


def digests(config: Config) -> dict[str, str]:
    steps = order(table(config), config.targets)
    return {
        step.name: found.digest for step, found in zip(steps, fingerprints(steps, config.lookup).values(), strict=True)
    }


def test_another_share_costs_no_training():
    half, third, without = (digests(loaded(*FINE, *words)) for words in (HALF, (*HALF, "interpolate.share=0.3"), ()))
    assert half["train_c"] == third["train_c"] == without["train_c"]
    assert half["interpolate"] != third["interpolate"]
    assert "interpolate" not in without


HALF = ("interpolate={first: 1, second: 2}",)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["interpolate={first: 1, second: 3}"],
            "interpolate.second=3 is a phase of stage_c.train, which has 2; give an",
        ),
        (["interpolate={first: 0, second: 1}"], "interpolate.first"),
        (
            ["interpolate={first: 1, second: a.pt}", "stage_c.train=null"],
            "interpolate.first=1 is a phase of stage_c.train, which is null",
        ),
    ],
)
def test_a_phase_that_does_not_exist_is_refused_by_key(words, told):
    with pytest.raises(UsageError, match=told):
        loaded(*FINE, *words)


def test_existing_weights_in_place_of_the_training_leave_its_phases_without_meaning():
    steps = digests(loaded(*HALF, "stage_c.train=null", "stage_c.weights=c.pt"))
    assert "import_c" in steps
    assert "interpolate" not in steps


def test_the_paper_ends_halfway_between_its_last_two_phases():
    config = compose.load("stage_c", ["scale=paper", "data.metadata=rows.parquet"])
    assert config.between is not None
    assert (config.between.phases, config.between.share) == ({"interpolate.first": 3, "interpolate.second": 4}, 0.5)
    third, fourth = config.stage_c.train.phases[2:]
    assert (third.max_aspect, fourth.view, len(config.stage_c.train.phases)) == (2.0, "aesthetic", 4)
    assert {"train_c", "interpolate"} <= digests(config).keys()
