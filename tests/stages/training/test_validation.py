"""Held-out samples: never trained on, always measured alike, and without a trace in the training."""

import itertools
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from datasets.buckets import Frame
from datasets.config import DataError
from datasets.files import storage
from datasets.formats import shards
from datasets.formats.shard_table import Shards
from datasets.formats.shards import Clock, ImageRow
from datasets.planning.plan import key_of
from datasets.reading import holdout, views
from datasets.reading.batches import Batches, Source
from datasets.reading.bucket_batches import BucketBatches, Span
from pipeline.cluster.ranks.checkpoints import Checkpoints
from pipeline.errors import UsageError
from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.settings import compose
from pipeline.steps import select
from stages.draws import Draws
from stages.models.discriminator import Discriminator
from stages.models.stage_a import StageA, StageAObjective
from stages.settings.losses import StageALoss
from stages.settings.training import TrainingConfig
from stages.state_dicts import Serialized
from stages.training import checkpoint
from stages.training.callbacks import Callbacks, Parts
from stages.training.checkpoint import Best
from stages.training.loop import Outcome, train
from stages.training.meter import SPEED
from stages.training.parallel import Replica
from stages.training.validation import SampleDraws, Validation

CPU = torch.device("cpu")
ROWS, STEPS, HELD = 8, 12, 40


# ---------------------------------------------------------------------------------------------------- samples

KEYS = [[key_of(f"http://x.invalid/{shard}-{row}", "caption") for row in range(20)] for shard in range(3)]
BUCKETS = ("128x256", "256x128", "128x256")


def hold_out(share: float) -> views.View:
    rows = [[(key, f"http://x.invalid/{n}-{row}", None) for row, key in enumerate(KEYS[n])] for n in range(3)]
    return holdout.hold_out(enumerate(rows), share)


def chosen(view: views.View) -> set[str]:
    return {KEYS[shard][place] for shard in range(3) for place in view.places(shard)}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """`text` of three shards in two aspect-ratio buckets."""
    for shard, keys in enumerate(KEYS):
        rows = [ImageRow(number, key, "", "", "png", b"") for number, key in enumerate(keys)]
        content = shards.write_tensors(rows, "text", np.zeros((len(keys), 2), np.float16))
        name = shards.tensor_name(shard)
        entries = {name: storage.publish(content, storage.join(str(tmp_path), name))}
        clock, bucket = Clock(), BUCKETS[shard]
        shards.publish_receipt(str(tmp_path), shard, rows_in=20, rows_out=20, files=entries, clock=clock, bucket=bucket)
    return Source("text", Shards.gathered(str(tmp_path)))


def seen(batches: Iterable[dict[str, np.ndarray]]) -> set[str]:
    return {bytes(key).hex() for batch in batches for key in batch["key"]}


def test_views_of_what_is_held_out_are_complements() -> None:
    few, more = hold_out(0.1), hold_out(0.3)
    assert chosen(few) < chosen(more)
    assert 0 < few.rows < more.rows < 30
    assert chosen(~more) == {key for keys in KEYS for key in keys} - chosen(more)
    assert chosen(more & ~few) == chosen(more) - chosen(few)
    assert chosen(views.read(views.dump(more))) == chosen(more)


@pytest.mark.parametrize("world", [1, 2])
def test_no_rank_ever_reads_what_is_held_out(source: Source, world: int) -> None:
    held = hold_out(0.3)
    squares = Batches([source], seed=1, view=~held)
    assert squares.rows == 60 - held.rows
    share = ROWS // world
    starts = range(0, 4 * 60, share)
    assert seen(squares.read(start, share) for start in starts) == chosen(~held)
    assert seen([Batches([source], seed=0, window=1, view=held).read(0, held.rows)]) == chosen(held)

    spans = [Span(0, 240, ROWS)]
    buckets = BucketBatches([source], Frame(128, 2.0), 1, spans, view=~held)
    assert sum(buckets.bucket_rows.values()) == squares.rows
    assert seen(buckets.read(start, share) for start in range(0, 240, share)) <= chosen(~held)
    largest = BucketBatches([source], Frame(128, 2.0), 0, [], view=held).largest
    assert seen([largest.read(0, largest.rows)]) <= chosen(held)


def test_a_bucket_of_which_all_is_held_out_is_left_out(source: Source) -> None:
    bits = {bucket: np.packbits([bucket == "256x128"] * 20).tobytes() for bucket in BUCKETS}
    wide = views.View({shard: (20, bits[bucket]) for shard, bucket in enumerate(BUCKETS)})
    assert list(BucketBatches([source], Frame(128, 2.0), 1, [Span(0, 64, ROWS)], view=~wide).bucket_rows) == ["128x256"]


@pytest.mark.parametrize("rows", [0, 3, 10])
def test_the_step_warns_where_nothing_is_held_out_and_refuses_to_hold_out_all(rows: int) -> None:
    warnings: list[str] = []
    build: Any = SimpleNamespace(
        config=compose.load("stage_c", ["scale=micro", "data.holdout=0.2"]),
        inputs={"images": SimpleNamespace(manifest={"rows": 10}), "metadata": None},
        path="",
        call=lambda *_: (storage.entry_of(b""), rows, [], 1),
        report=SimpleNamespace(warning=warnings.append),
    )
    if rows == 10:
        with pytest.raises(DataError, match=r"data.holdout=0.2 holds out all of 10 pictures: lower it, or set it to 0"):
            select.hold_out(build)
    else:
        assert select.hold_out(build).rows == rows
        told = ["data.holdout=0.2 holds out none of 10 pictures: no training is validated"]
        assert warnings == ([] if rows else told)


# ------------------------------------------------------------------------------------------------ config and DAG


def prints(*words: str) -> dict[str, str]:
    config = compose.load("stage_c", ["scale=micro", *words])
    found = fingerprints(order(table(config), config.targets), config.lookup)
    return {name: fingerprint.digest for name, fingerprint in found.items()}


def test_what_is_held_out_makes_the_trainings_stale_and_no_data() -> None:
    before, after = prints(), prints("data.holdout=0.2")
    assert after.keys() - before.keys() == {"held_out", "samples_held_out"}
    changed = {name for name in before if before[name] != after[name]}
    assert {"stage_a", "stage_b", "stage_c"} <= changed
    assert changed.isdisjoint({"metadata", "images", "text_tiny"})


def test_only_a_validation_that_chooses_the_weights_leaves_a_trace() -> None:
    watching = ["data.holdout=0.2", "stage_c.train.validation.every=4", "stage_c.train.panel_every=2"]
    off = ["data.holdout=0.2", "stage_c.train.validation=null"]
    assert prints("data.holdout=0.2") == prints(*watching) == prints(*off)
    best = prints(*watching, "stage_c.train.validation.keep=best")
    assert best["stage_c"] != prints(*watching)["stage_c"]
    assert best["stage_b"] == prints(*watching)["stage_b"]
    fewer = prints(*watching, "stage_c.train.validation.keep=best", "stage_c.train.validation.samples=8")
    assert fewer["stage_c"] != best["stage_c"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stage_c.train.validation.keep=best"], "keep=best needs pictures that no training sees"),
        (["data.holdout=1"], "data.holdout"),
        (["compressor.warmup.train.panel_every=2"], "the warm-up makes no pictures"),
        (
            ["data.holdout=0.2", "stage_c.loss.weight=adaptive", "stage_c.train.validation.keep=best"],
            "adaptive weights change the scale",
        ),
        (
            ["stage_c.train.log_every=2", "stage_c.train.panel_every=3"],
            r"panel_every \(3\) must be a multiple of log",
        ),
        (
            ["data.holdout=0.2", "stage_c.train.validation={every: 1, keep: best}"],
            "must be a multiple of checkpoint",
        ),
        (["stage_c.train.panel_every=2", "workers=2", "stage_c.train.shard=2"], "panel_every must be null"),
    ],
)
def test_what_cannot_be_validated_or_shown_is_refused(words: list[str], told: str) -> None:
    with pytest.raises((ValidationError, UsageError), match=told):
        compose.load("stage_c", ["scale=micro", *words])


# ------------------------------------------------------------------------------------------------------- draws


def keys(rows: int) -> list[bytes]:
    return [bytes([row]) * 16 for row in range(rows)]


def test_the_noise_of_a_sample_is_its_own_and_uniform_numbers_are_spread_evenly() -> None:
    whole = SampleDraws(keys(10), 0, 10, CPU)
    noise, times, coins = whole.normal(3), whole.uniform(), whole.shared_uniform()
    for numbers in (times, coins):
        torch.testing.assert_close(numbers.sort().values, (torch.arange(10) + 0.5) / 10)
    assert not torch.equal(times, coins)
    part = SampleDraws(keys(10)[4:7], 4, 10, CPU)
    assert torch.equal(part.normal(3), noise[4:7])
    assert torch.equal(part.uniform(), times[4:7])
    assert not torch.equal(whole.normal(3), noise)


# ------------------------------------------------------------------------------------------------- the training


class Toy(nn.Module):
    """What validation could disturb: BatchNorm's statistics, dropout, and numbers of torch's own generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 6))

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        noise, times = draws.normal(6), draws.uniform()
        error = (self.net(batch["x"] + noise * times[:, None]) - batch["x"]).square().mean(dim=1)
        early = (times < 0.5).float()
        return error.mean(), {"early": (early * error.detach()).mean(), "early/share": early.mean()}


def samples(first: int, rows: int) -> dict[str, np.ndarray]:
    """Held-out samples, of which the training's are not: what it learns soon makes them worse."""
    x = -3 - np.random.default_rng(0).normal(size=(HELD, 6)).astype(np.float32)
    numbers = np.arange(HELD, dtype=np.uint8)[:, None].repeat(16, axis=1)
    return {"x": x[first : first + rows], "key": numbers[first : first + rows]}


class Run(Callbacks):
    """A training in memory, with its states, its log, and what it was shown as."""

    def __init__(self, validation: dict[str, object] | None, states: dict[int, bytes] | None = None, stop: int = STEPS):
        super().__init__()
        values = {
            "phases": [{"steps": STEPS, "batch_size": ROWS, "size": 64}],
            "learning_rate": 0.02,
            "warmup_steps": 2,
            "precision": "fp32",
            "ema": {"decay": 0.5, "every": 1, "start": 1},
            "log_every": 1,
            "checkpoint_every": 1,
            "validation": validation,
            "panel_every": 4 if validation else None,
        }
        self.config = TrainingConfig.model_validate(values)
        self.states, self.stop = dict(states or {}), stop
        self.newest = max(self.states, default=None)
        self.validation = Validation(samples, HELD)
        self.logged: dict[int, dict[str, float]] = {}
        self.shown: list[tuple[int, str, bytes]] = []
        self.objective = Toy()

    def train(self) -> Outcome:
        def read(step: int) -> dict[str, np.ndarray]:
            return {"x": 3 + np.random.default_rng(step).normal(size=(ROWS, 6)).astype(np.float32)}

        return train(self.objective, read, self.config, self, seed=0, device=CPU)

    def newest_state(self) -> Parts | None:
        return None if self.newest is None else self.state_after(self.newest)

    def state_after(self, step: int) -> Parts:
        return [partial(bytes, self.states[step])]

    def save_state(self, step: int, data: Serialized) -> None:
        self.states[step] = bytes(data)

    def should_stop(self) -> bool:
        return max(self.logged) >= self.stop

    def show(self, step: int, weights: str) -> None:
        torch.rand(3)  # whatever is drawn here, the training has numbers of its own
        self.shown.append((step, weights, bytes_of(self.objective)))

    def log(self, step: int, values: dict[str, float]) -> None:
        timed = (SPEED, "validation_seconds")
        self.logged[step] = {name: value for name, value in values.items() if not name.startswith(timed)}


def bytes_of(module: nn.Module) -> bytes:
    return b"".join(value.numpy().tobytes() for value in module.state_dict().values())


def tensors(state: bytes, kind: str = "") -> dict[str, Tensor]:
    return {key: value for key, value in checkpoint.load(state).tensors.items() if key.startswith(kind)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_validation_and_panels_leave_no_trace_in_the_training() -> None:
    plain, validated = Run(None), Run({"every": 3, "samples": HELD})
    plain.train()
    validated.train()
    assert bytes_of(plain.objective) == bytes_of(validated.objective)
    for step, state in plain.states.items():
        assert same(tensors(state), tensors(validated.states[step]))
        assert plain.logged[step]["loss"] == validated.logged[step]["loss"]
    assert [step for step, values in validated.logged.items() if "validation_loss" in values] == [3, 6, 9, 12]
    assert not any("validation_loss" in values for values in plain.logged.values())
    assert not plain.shown


def test_panels_show_the_weights_and_then_their_average() -> None:
    run = Run({"every": STEPS})
    run.train()
    assert [(step, name) for step, name, _ in run.shown] == list(itertools.product((0, 4, 8, 12), ("weights", "ema")))
    begun = {shown for step, _, shown in run.shown if step == 0}
    assert len(begun) == 1  # before the first step they are the same
    for step, name, shown in run.shown[2:]:
        kind = {"weights": "model.", "ema": "average."}[name]
        state = {key.removeprefix(kind): value for key, value in tensors(run.states[step], kind).items()}
        assert shown == b"".join(state[key].numpy().tobytes() for key in run.objective.state_dict())


@pytest.mark.parametrize("keep", ["last", "best"])
def test_resumed_after_every_step_it_ends_with_the_same_losses_best_and_weights(keep: str) -> None:
    validation = {"every": 2, "samples": HELD, "keep": keep}
    straight = Run(validation)
    outcome = straight.train()
    losses = {step: values["validation_loss_ema"] for step, values in straight.logged.items() if step % 2 == 0}
    best = min(losses, key=lambda step: losses[step])
    assert best < STEPS, "or this test could not tell best from last"
    assert outcome == Outcome(STEPS, finished=True, best=Best(best, losses[best]))
    kept = tensors(straight.states[best if keep == "best" else STEPS], "average.")
    assert bytes_of(straight.objective) == b"".join(
        kept[f"average.{key}"].numpy().tobytes() for key in straight.objective.state_dict()
    )
    for stop in range(1, STEPS):
        first = Run(validation, stop=stop)
        first.train()
        second = Run(validation, states=first.states)
        assert second.train() == outcome
        assert bytes_of(second.objective) == bytes_of(straight.objective)
        assert second.states[STEPS] == straight.states[STEPS]
        assert first.logged | second.logged == straight.logged


def test_the_loss_is_that_of_the_samples_in_evaluation_mode() -> None:
    run = Run({"every": STEPS, "samples": 20})
    run.train()
    state = {key.removeprefix("model."): value for key, value in tensors(run.states[STEPS], "model.").items()}
    toy = Toy().eval()
    toy.load_state_dict(state)
    batch = {name: torch.from_numpy(values) for name, values in samples(0, 20).items()}
    with torch.no_grad():
        loss, parts = toy(batch, SampleDraws([bytes(key) for key in batch["key"].numpy()], 0, 20, CPU))
    logged = run.logged[STEPS]
    assert logged["validation_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert logged["validation_early"] == pytest.approx(parts["early"].item() / 0.5, rel=1e-6)  # of the half it is of
    assert not any("/share" in name for name in logged)


def test_stage_a_is_validated_without_its_discriminator() -> None:
    torch.manual_seed(0)
    stage_a = compose.load("stage_a", ["scale=micro"]).stage_a.model
    objective = StageAObjective(StageA(stage_a), StageALoss(adversarial=1.0), Discriminator())
    config = Run({"every": 1, "samples": 2}).config
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 128, 128), np.uint8)
    batch = {"image": image, "key": np.zeros((2, 16), np.uint8)}
    validation = Validation(lambda first, rows: batch, 2)
    losses = validation.losses(Replica(objective, CPU, 0, 1, 1, ["fp32"]), None, config, rank=0)
    assert losses["validation_loss"] == pytest.approx(losses["validation_mse"] + losses["validation_vq"])
    assert "validation_discriminator" not in losses


# -------------------------------------------------------------------------------------------------- checkpoints


def test_the_best_of_each_kept_checkpoint_is_kept(tmp_path: Path) -> None:
    states = Checkpoints(str(tmp_path), pytest.fail)
    best = {10: 10, 20: 20, 30: 20, 40: 20, 50: 50, 60: 50, 70: 50}
    left = []
    for step, marked in best.items():
        states.save(step, b"%d" % step, {}, marked)
        left.append({int(name.split("-")[0]) for name in storage.listing(str(tmp_path)) if name.endswith("tensors")})
    assert left == [{10}, {10, 20}, {20, 30}, {20, 30, 40}, {20, 40, 50}, {50, 60}, {50, 60, 70}]
    assert [read() for read in states.after(50).parts] == [b"50"]
    with pytest.raises(storage.CorruptFile, match="has lost the checkpoint of step 40"):
        states.after(40)
