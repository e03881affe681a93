"""Reading back what MLflow has of a step: its newest run, what earlier ones say before it, and its pictures."""

import io
from pathlib import Path

import pytest
from PIL import Image

from pipeline.tracking.mlflow_history import opened
from pipeline.tracking.mlflow_runs import Tracking
from pipeline.tracking.mlflow_store import MlflowStore, connect, locate_store

EXPERIMENT = "wuerstchen"


def test_curves_pictures_and_a_place_for_the_report(store: MlflowStore) -> None:
    pictures = []
    for shade in (0, 200):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (shade,) * 3).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    about = {"conf": "stage_c", "targets": ["stage_c"], "fingerprints": {}, "config": {}}
    for invocation, steps in (("one", (1, 2, 3)), ("two", (3, 4))):  # as a resume by an earlier version
        tracking = Tracking(store, EXPERIMENT, invocation=invocation, **about)  # type: ignore[arg-type]
        with tracking, tracking.step("train_c", "stage_c", "abc") as run:
            for step in steps:
                run.metrics({"stage_c/loss": step + (0.5 if invocation == "two" else 0), "other": 1.0}, step)
            run.image("stage_c panel", pictures[invocation == "two"], step=0)
    history = opened(store, EXPERIMENT, pytest.fail)
    assert history is not None
    points = history.curves("abc", lambda name: name.endswith("/loss"))
    assert points == {"stage_c/loss": [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5)]}
    (picture,) = history.pictures("abc")
    assert (picture.name, picture.step) == ("stage_c panel", 0)
    assert Image.open(io.BytesIO(picture.read())).getpixel((0, 0)) == (200, 200, 200)
    assert history.curves("def", lambda name: True) == {}
    assert history.keep("two", {"report.json": "{}"})
    assert not history.keep("three", {"report.json": "{}"})
    client, _ = connect(store, EXPERIMENT)
    assert store.artifacts is not None
    (kept,) = store.artifacts.rglob("report.json")
    assert client.get_run(kept.parts[-3]).data.tags["wst.invocation"] == "two"


def test_no_store_is_made_to_look_into_it(tmp_path: Path) -> None:
    said: list[str] = []
    assert opened(locate_store(str(tmp_path / "root"), None), EXPERIMENT, said.append) is None
    assert not (tmp_path / "root").exists()
    assert said[0].startswith("there is no MLflow store")
    (tmp_path / "mlflow.db").write_bytes(b"no database")
    assert opened(locate_store("", f"sqlite:///{tmp_path}/mlflow.db"), EXPERIMENT, said.append) is None
    assert "does not answer" in said[1]
