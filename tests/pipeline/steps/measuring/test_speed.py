"""time_drawing, in this process, with the models of the micro scale: a line for each batch, eager and compiled."""

import json

import pytest

from pipeline.models import drawing_speed, loading
from pipeline.models.drawing_speed import Timing
from pipeline.steps.measuring import speed
from tests.pipeline.steps.test_sample import alone, prepared  # noqa: F401

WORDS = ("eval=speed", "eval.speed.batches=[1,2]", "eval.speed.repeats=1")


def test_a_line_for_each_number_of_pictures_eager_and_compiled(prepared, monkeypatch):  # noqa: F811
    root = prepared("root", *WORDS)
    build = root.build("speed")
    monkeypatch.setattr(loading, "require_compiler", lambda key: None)
    compiled = speed.measured(root.config, build.inputs, "cpu", backend="eager")
    assert [(line.mode, line.batch) for line in compiled] == [(m, n) for m in ("eager", "compiled") for n in (1, 2)]
    assert {(line.device, line.precision) for line in compiled} == {("cpu, 1 thread", "fp32")}
    assert all(min(line.stage_c, line.stage_b, line.stage_a) > 0 for line in compiled)


def test_the_artifact_holds_the_table_and_scores_name_its_figures(prepared):  # noqa: F811
    root = prepared("root", *WORDS, "eval.speed.compiled=false")
    build = root.build("speed")
    made = root.commit(build, speed.time_drawing(build))
    lines = drawing_speed.read({"speed": made})
    assert [line.batch for line in lines] == [1, 2]
    assert json.loads(made.read(drawing_speed.FILE))[0]["precision"] == "fp32"
    line = Timing("eager", 4, "cpu", "fp32", 3.0, 2.0, 1.0)
    assert drawing_speed.metrics([line])["seconds_a_picture/eager/batch_4/stage_b"] == 2.0
    assert "speed" in next(step for step in root.steps if step.output == "scores").inputs


def test_without_a_compiler_nothing_is_compiled(prepared, monkeypatch):  # noqa: F811
    root = prepared("root", *WORDS)
    monkeypatch.setattr(loading.shutil, "which", lambda name: None)
    with pytest.raises(loading.UsageError, match=r"^eval\.speed\.compiled=true needs a C\+\+ compiler"):
        speed.measured(root.config, root.build("speed").inputs, "cpu")
