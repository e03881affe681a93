"""The table of trainings: each that a config can want has its row, and what a row publishes is in its objective."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.cluster.ranks import trainings
from pipeline.cluster.ranks.trainings import PANEL, TRAININGS, Order
from pipeline.models import loading
from pipeline.settings import compose

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

    def __init__(self, payload: dict[str, Any]) -> None:
        self.told: list[Any] = payload["told"]

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
    monkeypatch.setattr(trainings, "Rank", AllSteps)
    monkeypatch.setattr(loading, "null_text", lambda _: torch.zeros(16, 32))
    trainings.run({"order": order, "told": told})
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
