"""What a run and its steps tell of themselves in the end, also where they fail."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.run import telling
from pipeline.run.last_screen import Summary
from pipeline.store import ledger
from pipeline.store.artifacts import Artifact
from pipeline.store.ledger import About, Writer


class Told:
    """Takes what MLflow would."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.end: Any = None
        self.names: Any = None

    def describe(self, *told: Any) -> None:
        self.said.append(told)

    @contextlib.contextmanager
    def step(self, *names: Any, **about: Any) -> Any:
        self.names = names, about
        yield self


@pytest.fixture
def leases(tmp_path: Path) -> list[ledger.Lease]:
    with Writer(str(tmp_path), "one").lease("train_c", "abc", 2, "cpu", About(build="b", output="stage_c")):
        pass
    return ledger.read(str(tmp_path))[0]


def test_a_run_tells_its_scores_with_how_many_they_are_of(leases, tmp_path):
    files = {"grid.png": {"bytes": 1, "sha256": "x"}}
    metrics = {"retrieval_top1": 0.5, "n_training": 16}
    made = {
        "stage_c": Artifact(
            "stage_c", "/r/stage_c", {"files": {}, "metrics": {"stage_c/images": 512.0, "stage_c/loss": 0.25}}
        ),
        "samples": Artifact("samples", "/r/samples", {"files": files, "metrics": {}}),
        "scores": Artifact("scores", "/r/scores", {"files": {}, "metrics": metrics, "rows": 32}),
    }
    steps = {"stage_c": {"state": "done", "step": "train_c", "artifact": "/r/stage_c"}}
    tracking: Any = Told()
    record = {"steps": steps, "command": "python -m pipeline run conf=stage_c"}
    telling.of_run(tracking, Summary(devices="cpu"), record, made, leases, None)
    ((card, verdict),) = tracking.said
    assert verdict == {"retrieval_top1 of 16": 0.5, "images/stage_c": 512.0, "1 Loss/stage_c": 0.25}
    assert card.startswith("**retrieval_top1 0.5 of 16**")
    assert "| [train_c](run:stage_c) | stage_c | built |" in card
    assert "/r/samples/grid.png" in card


def test_a_step_that_fails_tells_its_error_its_hours_and_the_end_of_its_log(leases):
    tracking: Any = Told()
    fingerprint = SimpleNamespace(digest="abc", settings={"seed": 0})
    item: Any = SimpleNamespace(step=SimpleNamespace(name="train_c", output="stage_c"), fingerprint=fingerprint)
    with (
        pytest.raises(OSError, match="a node left"),
        telling.step_run(tracking, item, "train_c", "b", ["one", "two"], "cpu", lambda: leases),
    ):
        raise OSError("a node left")
    ((card,),) = tracking.said
    assert card.startswith("**a node left**")
    assert "cpu-hours" in card
    assert "one\ntwo" in card
    assert tracking.names == (
        ("train_c", "stage_c", "abc"),
        {"label": "train_c", "build": "b", "settings": {"seed": 0}},
    )
