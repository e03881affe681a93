"""Of what a report is asked: a conf as typed, or a run by its ID; and what `show run=ID` shows."""

import json
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.plan.dag import order
from pipeline.plan.recorded import record
from pipeline.plan.table import table
from pipeline.plan.wanted import prints_of
from pipeline.settings import compose
from pipeline.settings.words import Words, parse
from pipeline.store.artifacts import Look
from pipeline.verbs import show
from pipeline.verbs.report import asked, command
from tests.experiment import BEFORE, RUN, Experiment, experiment
from tests.pipeline.verbs.test_cli import build_all

MICRO = ("conf=stage_c", "scale=micro")
OTHER = "20251230-000000-0000"
LEARNS = ["scale=micro", "stage_c.train.learning_rate=0.001"]


def words(*line: str, root: Path, verb: str = "report") -> Words:
    return parse([verb, *line, f"root={root}"])


def test_a_conf_takes_the_last_run_that_asked_for_just_that(tmp_path: Path) -> None:
    config = compose.load("stage_c", ["scale=micro"])
    build_all(tmp_path, config)
    steps = order(table(config), config.targets)
    prints = {name: one.digest for name, one in prints_of(config, Look(str(tmp_path)), steps).items()}
    of = Experiment(tmp_path)
    of.record(OTHER, fingerprints={**prints, "stage_c": "0" * 16})
    of.record(BEFORE, fingerprints=prints)
    of.record(RUN, fingerprints={**prints, "stage_c": "1" * 16})
    found, tracking = asked.subject(words(*MICRO, root=tmp_path))
    assert found.record is not None
    assert (found.record["id"], [one["id"] for one in found.earlier]) == (BEFORE, [OTHER])
    assert found.artifacts.keys() == prints.keys()
    assert tracking == config.tracking
    alone, _ = asked.subject(words(*MICRO, "stage_c.train.learning_rate=0.001", "targets=[stage_b]", root=tmp_path))
    assert alone.record is not None  # whatever of stage_b's all runs asked for
    assert "stage_c" not in alone.prints


def test_poor_manifests_make_a_report_all_the_same(tmp_path: Path) -> None:
    """As of earlier versions, which told less."""
    build_all(tmp_path / "root", compose.load("stage_c", ["scale=micro"]))
    command.handle(words(*MICRO, f"out={tmp_path}/page.html", root=tmp_path / "root"))
    told = json.loads((tmp_path / "page.json").read_text())
    assert told["run"] is None
    assert any("funnel" in sentence for sentence in told["missing"])
    assert told["verdict"]["headline"] == "Finished and scored"


def test_a_remote_root_needs_no_words_about_mlflow_and_says_what_is_missing_without(tmp_path: Path, capsys) -> None:
    root = f"memory://{tmp_path.name}"
    build_all(root, compose.load("stage_c", ["scale=micro"]))
    command.handle(parse(["report", *MICRO, f"root={root}", f"out={tmp_path}/page.html"]))
    (told,) = [one for one in json.loads((tmp_path / "page.json").read_text())["missing"] if "tracking.uri" in one]
    assert f"without curves and panels: {told}" in " ".join(capsys.readouterr().err.split())


def test_json_alone_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of = experiment(tmp_path / "root")
    before = sorted(tmp_path.rglob("*"))
    command.handle(words(f"run={RUN}", "--json", root=Path(of.root)))
    assert json.loads(capsys.readouterr().out)["run"]["id"] == RUN
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["conf=stage_b", f"run={RUN}"], "one of conf=stage_c, not of conf=stage_b"),
        (["scale=micro", f"run={RUN}"], "has a config of its own; leave scale=micro out"),
        (["run=nothing"], f"no run of that ID; the last runs: {RUN} \\(stage_c\\), {BEFORE}"),
        (["conf=previewer", "scale=micro"], f"nothing of exactly this conf; the last runs: {RUN} \\(stage_c\\)"),
    ],
)
def test_what_cannot_be_told_of_is_refused_in_a_sentence(line: list[str], told: str, tmp_path: Path) -> None:
    experiment(tmp_path)
    with pytest.raises(UsageError, match=told):
        asked.subject(words(*line, root=tmp_path))


def test_show_takes_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of = experiment(tmp_path)
    show.handle(words(f"run={RUN[-4:]}", "artifact=scores", root=tmp_path, verb="show"))
    said = capsys.readouterr().out
    assert "retrieval_top1_heldout" in said
    assert "same model, other seed" in said
    show.handle(words(f"run={RUN}", "artifact=stage_c", "--json", root=tmp_path, verb="show"))
    assert json.loads(capsys.readouterr().out)["content"] == of.artifacts["stage_c"].manifest["content"]
    with pytest.raises(UsageError, match=f"artifact=latents_c: run={RUN} has no such artifact; it has metadata"):
        show.handle(words(f"run={RUN}", "artifact=latents_c", root=tmp_path, verb="show"))
    of.record(fingerprints={"stage_b": "0" * 16})
    with pytest.raises(UsageError, match="has not finished it"):
        show.handle(words(f"run={RUN}", "artifact=stage_b", root=tmp_path, verb="show"))


def test_a_command_gives_its_config_unless_it_means_another_today(tmp_path: Path) -> None:
    config = compose.load("stage_c", LEARNS)
    steps = order(table(config), config.targets)
    prints = {name: one.digest for name, one in prints_of(config, Look(str(tmp_path)), steps).items()}
    of = Experiment(tmp_path)
    of.record(command=f"python -m pipeline run conf=stage_c root={tmp_path} {' '.join(LEARNS)}", fingerprints=prints)
    found = asked.config_of(record(of.root, RUN), of.root)
    assert found is not None
    assert found.stage_c.train is not None
    assert found.stage_c.train.learning_rate == 0.001
    of.record(command="python -m pipeline run conf=stage_c scale=micro", fingerprints=prints)
    assert asked.config_of(record(of.root, RUN), of.root) is None
    of.record(command="python -m pipeline run conf=gone", fingerprints=prints)
    assert asked.config_of(record(of.root, RUN), of.root) is None
