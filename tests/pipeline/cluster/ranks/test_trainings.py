"""The table of trainings: each that a config can want has its row, what a row publishes is in its objective, and that
begins with the weights that the config names."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datasets.files.fence import unfenced
from pipeline.cluster.ranks import trainings
from pipeline.cluster.ranks.job import Job
from pipeline.cluster.ranks.trainings import PANEL, TRAININGS, Order
from pipeline.models import loading
from pipeline.models.training_data import Reading
from pipeline.settings import compose, config
from pipeline.store.artifacts import Artifact
from tests.existing_weights import STATES, dome272, loaded

JOB = Job("", "", unfenced, "", seed=0, stall_s=60.0, flops={}, bytes={})
BOARD: Any = None  # of which the stand-ins for a rank ask nothing
PUBLISHED = {
    "train_a": ["stage_a", PANEL],
    "train_b": ["stage_b", "compressor", PANEL],
    "train_c": ["stage_c"],  # whose panel shows codes alone: pictures are a matter of the steps after it
    "train_previewer": ["previewer", PANEL],
    "train_baseline": ["baseline", PANEL],
}


class AllSteps:
    """Stands in for a rank: trains nothing, and says that it is done."""

    device = torch.device("cpu")

    def __init__(self, told: list[Any]) -> None:
        self.told = told

    def logged(self) -> nullcontext[None]:
        return nullcontext()

    def sampled(self) -> nullcontext[None]:
        return nullcontext()

    def train(self, name: str, objective: nn.Module, *_: Any) -> bool:
        self.told.append((name, set(objective.state_dict())))
        return True

    def publish_model(self, name: str, model: nn.Module) -> None:
        self.told.append((name, {f"{name}.{key}" for key in model.state_dict()}))

    def publish(self, name: str, make: Any) -> None:
        self.told.append(name)

    def finish(self, rows: int) -> None:
        self.told.append(rows)


@pytest.mark.parametrize("step", PUBLISHED)
def test_what_is_published_is_what_was_trained(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose.load("stage_c", ["scale=micro"])
    wanted = config.trainings_of(step)
    *_, subject = wanted
    data = SimpleNamespace(largest=SimpleNamespace(rows=12))
    reading: Any = SimpleNamespace(loaded=lambda where: [], data=lambda training, online: data)
    reading.only = lambda fields: reading
    order = Order(
        trainings=wanted,
        settings=getattr(config, subject),
        compressor=config.compressor,
        stage_a_model=config.stage_a.model,
        stage_a=None,
        text=SimpleNamespace(),  # type: ignore[arg-type]
        reading=reading,
        seed=0,
    )
    told: list[Any] = []
    monkeypatch.setattr(trainings, "Rank", lambda job, board: AllSteps(told))
    monkeypatch.setattr(loading, "null_text", lambda _: torch.zeros(16, 32))
    trainings.run(order, JOB, BOARD)
    done, published = told[: len(wanted)], told[len(wanted) : -1]
    assert [name for name, _ in done] == list(wanted)
    assert [entry if entry == PANEL else entry[0] for entry in published] == PUBLISHED[step]
    trained = done[-1][1]
    assert all(keys <= trained for _, keys in (entry for entry in published if entry != PANEL))  # phases go by these
    assert told[-1] == 12


def test_stage_b_goes_on_with_the_compressor_of_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose.load("stage_c", ["scale=micro"])
    monkeypatch.setattr(loading, "null_text", lambda _: torch.zeros(16, 32))
    order: Any = SimpleNamespace(settings=config.stage_b, compressor=config.compressor, text=(), seed=0)
    where = torch.device("cpu")
    warmup = TRAININGS["compressor"].objective(order, where, None)
    assert TRAININGS["stage_b"].objective(order, where, warmup).compressor is warmup.compressor


class FirstStep:
    """Stands in for a rank: keeps the weights that each training begins with, and trains nothing."""

    begun: dict[str, dict[str, Tensor]]

    device = torch.device("cpu")

    def __init__(self, job: Job, board: Any) -> None:
        FirstStep.begun = {}

    def logged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def sampled(self) -> AbstractContextManager[None]:
        return nullcontext()

    def train(self, name: str, objective: nn.Module, *_: Any) -> bool:
        FirstStep.begun[name] = {key: value.clone() for key, value in objective.state_dict().items()}
        return False


@pytest.mark.parametrize("existing", [True, False])
def test_a_training_begins_with_the_weights(existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dome272(tmp_path)
    monkeypatch.setattr("pipeline.cluster.ranks.trainings.Rank", FirstStep)
    monkeypatch.setattr("pipeline.models.loading.null_text", lambda _: torch.zeros(16, 32))
    files = {"stage_a": "vqgan.pt", "stage_b": "stage_b.pt", "stage_c": "stage_c.pt"}
    settings = loaded(*(f"{stage}.weights={tmp_path}/{file}" for stage, file in files.items() if existing))
    reading = Reading((), [], {}, [], {}, None, seed=0, cache=settings.cluster.cache)
    for stage in config.STAGES:
        order = Order(
            trainings=settings.trainings_of(f"train_{stage[-1]}"),
            settings=getattr(settings, stage),
            compressor=settings.compressor,
            stage_a_model=settings.stage_a.model,
            stage_a=None,
            text=Artifact("text_tiny", "", {}),
            reading=reading,
            seed=0,
        )
        trainings.run(order, JOB, BOARD)
        parts = [stage, "compressor"] if stage == "stage_b" else [stage]
        if not existing and stage == "stage_b":
            assert FirstStep.begun.keys() == {"compressor"}  # its warm-up, which weights make superfluous
            continue
        assert FirstStep.begun.keys() == {stage}
        for part in parts:
            begun = FirstStep.begun[stage]
            same = [torch.equal(begun[f"{part}.{key}"], value) for key, value in STATES[part].items()]
            assert all(same) if existing else not all(same)
