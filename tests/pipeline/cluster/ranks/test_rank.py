"""A rank's side of a training: what it reads, keeps for the next attempt, and tells the board."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from datasets.buckets import Frame
from datasets.files import storage
from datasets.files.fence import unfenced
from datasets.formats import shards
from datasets.formats.shard_table import Shards
from datasets.formats.shards import Clock, ImageRow
from datasets.reading.batches import Batches, Source
from pipeline.cluster.board import Board
from pipeline.cluster.interruptions import FILE
from pipeline.cluster.messages import Drawn, Logged, Message, Reached, Resumed, Warned
from pipeline.cluster.ranks.job import Job
from pipeline.cluster.ranks.rank import Rank, RankCallbacks
from pipeline.cluster.ranks.spending import Spending
from pipeline.cluster.ranks.training_files import checkpoints_of, log_of
from pipeline.models.panels import Panel
from pipeline.models.training_data import EncodedBatches, TrainingData
from pipeline.steps.build import Build
from pipeline.steps.train import _catch_up
from stages.draws import Draws
from stages.settings.training import BadStepsConfig, TrainingConfig
from stages.training import activity, loop
from stages.training.activity import Activity
from stages.training.loop import Outcome
from stages.training.meter import SPEED

T = TypeVar("T")
CPU = torch.device("cpu")
PICTURES, STEPS, ROWS = 12, 8, 4
HELD = 5.0  # less than any number of samples that are held out, more than those of a batch


class Toy(nn.Module):
    """With a batch of its own at every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(6, 6)

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        return (self.net(batch["x"]) - batch["x"]).square().mean(), {}


def recipe(**changes: object) -> TrainingConfig:
    values: dict[str, object] = {
        "phases": [{"steps": STEPS, "batch_size": ROWS, "size": 64}],
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "precision": "fp32",
        "log_every": 2,
        "checkpoint_every": 4,
    }
    return TrainingConfig.model_validate(values | changes)


def data(folder: Path, poor: int | None = None) -> TrainingData:
    """Twelve rows in a shard, one of which may not be finite."""
    name, frame = shards.tensor_name(0), Frame(64, 1.0)
    rows = [ImageRow(row, f"{row:032x}", "", "", "png", b"") for row in range(PICTURES)]
    values = np.random.default_rng(0).normal(size=(PICTURES, 6)).astype(np.float32)
    if poor is not None:
        values[poor, 3] = np.nan
    entry = storage.publish(shards.write_tensors(rows, "x", values), storage.join(str(folder), name))
    shards.publish_receipt(str(folder), 0, rows_in=PICTURES, rows_out=PICTURES, files={name: entry}, clock=Clock())
    stored = Batches([Source("x", Shards.gathered(str(folder)))], seed=0)
    return TrainingData({(frame, None): EncodedBatches(stored, frame, ("x",), [])}, held_out=None)


class Attempt(RankCallbacks):
    """An attempt at a training in this process, by the only rank of it, that is asked to stop after a step."""

    def __init__(self, folder: Path, config: TrainingConfig, poor: int | None = None, panel: Any = None) -> None:
        rank = Rank.__new__(Rank)  # whose making needs a job of Ray Train
        rank.rank, rank.world, rank.device = 0, 1, CPU
        rank.job = Job(str(folder), str(folder / "building"), unfenced, "", 0, 60.0, {"toy": {64: 1000}}, {1: 0})
        rank.spending, rank.metrics = Spending(), {"training_seconds": 0.0}
        board: Any = Board()
        rank.board = board
        super().__init__(rank, "toy", config, data(folder / "data", poor), panel, Activity())
        self.rank, self.board, self.config, self.objective = rank, board, config, Toy()

    def train(self, stop_after: int = STEPS) -> Outcome:
        self.stop_after = stop_after
        return loop.train(self.objective, self.read_batch, self.config, self, seed=0, device=CPU)

    def should_stop(self) -> bool:
        return self.measured.get("toy/images", 0) >= self.stop_after * ROWS

    def heard(self, kind: type[T]) -> list[T]:
        """Messages of a kind, which stay on the board."""
        return [message for message in self.board._messages if isinstance(message, kind)]


def test_the_board_hears_of_each_entry_and_each_checkpoint_has_its_log(tmp_path: Path) -> None:
    first = Attempt(tmp_path, recipe())
    assert first.train(stop_after=6) == Outcome(6, finished=False)
    assert first.heard(Resumed) == [Resumed("toy", 0)]
    assert first.heard(Reached) == [Reached(done, STEPS, "toy steps") for done in (2, 4, 6)]
    assert [message.step for message in first.heard(Logged)] == [2, 4, 6]
    metrics = {message.step: message.values for message in first.heard(Logged)}
    assert {name.partition("/")[0] for values in metrics.values() for name in values} == {"toy"}
    assert metrics[6][f"toy/{SPEED}tflops"] > 0
    assert first.measured == metrics[6]
    kept = {
        int(name.removesuffix(".json")): json.loads(storage.read(f"{log_of(first.rank.job.building, 'toy')}/{name}"))
        for name in storage.listing(log_of(first.rank.job.building, "toy"))
    }
    assert kept == {4: {"2": metrics[2], "4": metrics[4]}, 6: {"6": metrics[6]}}

    second, straight = Attempt(tmp_path, recipe()), Attempt(tmp_path / "straight", recipe())
    assert second.train() == straight.train() == Outcome(STEPS, finished=True)
    assert second.heard(Resumed) == [Resumed("toy", 6)]
    assert torch.equal(second.objective.net.weight, straight.objective.net.weight)
    third = Attempt(tmp_path, recipe())  # after a kill before what came out was published
    assert third.train() == Outcome(STEPS, finished=True)
    assert third.measured == second.measured
    assert storage.listing(checkpoints_of(second.rank.job.building, "toy"))


def test_a_driver_killed_after_any_message_leaves_no_step_unlogged(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, recipe())
    attempt.train(stop_after=6)
    logged: list[int] = []
    building = Path(attempt.rank.job.building)

    def driver(messages: list[Message]) -> Any:
        """A build whose board has these messages."""
        silent = dict.fromkeys(("progress", "saved"), lambda *told, **more: None)
        report = SimpleNamespace(metrics=lambda values, step: logged.append(step), **silent)
        cluster = SimpleNamespace(exchange=lambda stop: messages)
        config = SimpleNamespace(trainings_of=lambda name: ["toy"])
        claim, step = SimpleNamespace(raise_if_lost=lambda: None), SimpleNamespace(name="train_toy")
        parts: list[Any] = [config, step, str(building.parent), claim, {}, cluster, None, report, frozenset()]
        return Build(*parts, lambda: None)

    for heard in range(len(attempt.board._messages) + 1):
        logged.clear()
        (building / FILE).unlink(missing_ok=True)
        driver(attempt.board._messages[:heard]).tick()
        _catch_up(driver([]))
        assert logged == [2, 4, 6], heard


def test_what_panels_took_is_told_with_the_entry_that_follows(tmp_path: Path) -> None:
    """Weights and average come in one picture, from before the first step on."""
    shades = iter(range(0, 250, 30))

    def panel() -> Panel:
        return Panel(["a"], {}, {"drawn": [np.full((8, 8, 3), next(shades), np.uint8)]})

    drawn = Attempt(tmp_path, recipe(panel_every=4, ema={"decay": 0.5, "every": 1, "start": 1}), panel=panel)
    drawn.train()
    pictures = drawn.heard(Drawn)
    assert [(message.step, message.name) for message in pictures] == [(step, "toy panel") for step in (0, 4, STEPS)]
    with Image.open(io.BytesIO(pictures[-1].png)) as sheet:
        pixels = np.asarray(sheet)
    assert [int((pixels == shade).all(axis=2).sum()) > 8000 for shade in (90, 120, 150)] == [False, True, True]
    told = {message.step: "toy/panel_seconds" in message.values for message in drawn.heard(Logged)}
    assert told == {2: True, 4: True, 6: False, 8: True}


def test_a_panel_that_cannot_be_drawn_ends_no_training_and_is_told_once(tmp_path: Path) -> None:
    def panel() -> Panel:
        raise FileNotFoundError("the previewer was deleted")

    drawn = Attempt(tmp_path, recipe(panel_every=4), panel=panel)
    assert drawn.train().finished
    (told,) = drawn.heard(Warned)
    assert told.text.startswith("toy: the panel of step 0 could not be drawn, and no more are: the previewer was")
    assert drawn.heard(Drawn) == []


class Opposite(Toy):
    """What it learns about its batches makes it worse on the samples that are held out."""

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        wanted = -batch["x"] if "key" in batch and (batch["x"] > HELD).all() else batch["x"]
        return (self.net(batch["x"]) - wanted).square().mean(), {}


class HeldOut:
    """Samples that none of the batches has."""

    rows = 4

    def read(self, start: int, rows: int) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(1)
        x = HELD + generator.uniform(size=(self.rows, 6)).astype(np.float32)
        return {"x": x[start:][:rows], "key": np.zeros((rows, 16), np.uint8)}


def test_the_best_validated_weights_come_out_where_the_config_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RankCallbacks, "should_stop", lambda self: False)  # who would ask Ray
    monkeypatch.setattr("pipeline.cluster.ranks.rank.Watchdog", lambda *watched: nullcontext())  # its board is Ray's
    trained, metrics = {}, {}
    for keep in ("last", "best"):
        config = recipe(checkpoint_every=2, validation={"every": 2, "keep": keep})
        rank, objective = Attempt(tmp_path / keep, config).rank, Opposite()
        held_out: Any = HeldOut()
        assert rank.train("toy", objective, config, replace(data(tmp_path / keep / "data"), held_out=held_out))
        trained[keep], metrics[keep] = objective.net.weight, rank.metrics
    assert {keep: metrics[keep]["toy/best_step"] for keep in metrics} == {"last": 2, "best": 2}
    assert {keep: metrics[keep]["toy/kept_step"] for keep in metrics} == {"last": STEPS, "best": 2}
    early = Attempt(tmp_path / "early", recipe())
    early.train(stop_after=2)
    assert torch.equal(trained["best"], early.objective.net.weight)
    assert not torch.equal(trained["last"], trained["best"])


def test_a_rank_is_watched_where_ranks_settle_what_is_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that never comes there would otherwise be named by nobody."""
    standing, told = list[Activity](), list[str]()

    @contextmanager
    def watchdog(board: Any, number: int, doing: Activity, stall_s: float) -> Iterator[None]:
        standing.append(doing)
        yield
        standing.pop()

    def settling(rank: Rank, own: Any) -> list[Any]:
        told.append(standing[0].now()[1])
        return [own]

    monkeypatch.setattr(RankCallbacks, "should_stop", lambda self: False)
    monkeypatch.setattr("pipeline.cluster.ranks.rank.Watchdog", watchdog)
    monkeypatch.setattr(Rank, "told", settling)
    rank = Attempt(tmp_path, recipe()).rank
    assert rank.train("toy", Toy(), recipe(precision="auto"), data(tmp_path / "again"))
    assert told[0] == activity.STARTING
    assert not standing


@pytest.mark.parametrize("then", ["skip", "rewind"])
def test_the_rows_of_a_bad_step_are_named_and_nothing_counts_as_done_again(tmp_path: Path, then: str) -> None:
    config = recipe(phases=[{"steps": 6, "batch_size": 2, "size": 64}], bad_steps={"then": then})
    (batches,) = data(tmp_path / "asked").batches.values()
    poor = int(batches.read(10, 1)["key"][0, -1])  # of the last batch: there is a checkpoint to rewind to
    attempt = Attempt(tmp_path, config, poor)
    attempt.train()
    told = f"toy: step 6 went wrong ({then}); numbers that are not finite in {poor:032x}"
    assert attempt.heard(Warned) == [Warned(told)]
    assert len(attempt.heard(Resumed)) == 1


def test_figures_of_one_entry_alone_come_out(tmp_path: Path) -> None:
    """An entry whose steps were all skipped has no loss; that of an earlier one must not stand beside its images."""
    config = recipe(phases=[{"steps": 6, "batch_size": 2, "size": 64}], log_every=1, checkpoint_every=6)
    config = config.model_copy(update={"bad_steps": BadStepsConfig(then="skip")})
    (batches,) = data(tmp_path / "asked").batches.values()
    poor = int(batches.read(10, 1)["key"][0, -1])  # of the last batch
    attempt = Attempt(tmp_path, config, poor)
    attempt.train()
    last = attempt.heard(Logged)[-1]
    assert (last.step, "toy/loss" in last.values) == (6, False)
    assert attempt.measured == last.values
