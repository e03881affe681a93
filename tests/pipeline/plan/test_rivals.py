"""What is wrong with prompts and rivals is found before anything is drawn; a run of the root can be a rival."""

import json
from pathlib import Path

import pytest
from PIL import Image

from datasets.config import DataError
from datasets.files import storage
from datasets.reading.prompts import Prompt
from pipeline.errors import UsageError
from pipeline.plan import obstacles
from pipeline.plan.rivals import remarks, with_runs
from pipeline.plan.wanted import planned_steps
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.settings.selection import Selection
from pipeline.steps.build import Facts
from pipeline.store.artifacts import Look
from tests.pipeline.in_process import Root

TEXTS = [f"prompt {number}" for number in range(10)]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A prompt set in which two come again, and a rival that has a picture for each but the last."""
    (tmp_path / "mine.txt").write_text("\n".join([*TEXTS, *TEXTS[:2]]))
    (tmp_path / "w.safetensors").write_text("weights")
    (tmp_path / "rival").mkdir()
    for text in TEXTS[:-1]:
        Image.new("RGB", (64, 64)).save(tmp_path / f"rival/{Prompt(text).key}.png")
    return tmp_path


def load(files: Path, *words: str) -> Config:
    named = (f"eval.prompts.mine={files}/mine.txt", f"eval.scorers.clip_h={files}/w.safetensors")
    return compose.load("evaluate", ["scale=micro", *named, *words])


def told(config: Config, root: Path) -> list[str]:
    return remarks(config, planned_steps(config, Look(str(root)), Selection()))


def test_prompts_that_come_again_are_told(files):
    repeated = f"eval.prompts.mine: 2 of 12 prompts at {files}/mine.txt come again and count once"
    assert told(load(files), files / "root") == [repeated]


def test_places_without_a_prompt_are_told(files):
    (files / "mine.tsv").write_text("Prompt\tCategory\na cat\tAnimals\n\tAnimals\n \tAnimals\n")
    blank = f"eval.prompts.mine: 2 places in {files}/mine.tsv have no prompt and are left out, the first line 3"
    assert told(load(files, f"eval.prompts.mine={files}/mine.tsv"), files / "root") == [blank]


@pytest.mark.parametrize("key", ["eval.prompts.other", "eval.rivals.other", "eval.distances.references.mine"])
def test_what_is_not_there_is_told_once(files, key):
    (files / "mine.txt").write_text("a cat")
    words = (f"eval.distances.inception={files}/w.safetensors", f"{key}={files}/nowhere.txt")
    config = load(files, *words)
    planned = planned_steps(config, Look(str(files / "root")), Selection())
    assert obstacles.every(config, planned, None)[0].startswith(f"{key}: there is nothing at {files}/nowhere.txt")
    assert remarks(config, planned) == []


def test_a_rival_that_lacks_pictures_is_refused_beforehand_or_told(files):
    rival = f"eval.rivals.other={files}/rival"
    with pytest.raises(DataError, match=r"^eval\.rivals\.other: of 10 .* at \S*rival, 1 missing \('prompt 9'\)"):
        told(load(files, rival), files / "root")
    allowed = told(load(files, rival, "eval.allow_missing=0.1"), files / "root")
    assert allowed[1] == "eval.rivals.other: of 10 pictures for mine, 1 missing ('prompt 9'); 9 are compared"
    elsewhere = told(load(files, f"eval.rivals.other.mine={files}/rival", "eval.allow_missing=0.1"), files / "root")
    assert elsewhere[1].startswith("eval.rivals.other.mine: ")
    for picture in (files / "rival").iterdir():
        picture.rename(picture.with_stem(f"not {picture.stem}"))
    with pytest.raises(DataError, match=r"of 10 pictures .* 10 missing \(.*\); mend them$"):
        told(load(files, rival, "eval.allow_missing=1"), files / "root")


def test_a_rival_for_captions_of_the_data_is_held_to_those_that_are_drawn(files):
    rival = [f"eval.rivals.other={files}/rival", f"eval.scorers.clip_h={files}/w.safetensors"]
    root = Root(files / "root", "targets=[scores]", *rival)
    assert told(root.config, files / "root") == []  # which captions these are is not known
    build = root.build("samples")
    drawn = json.dumps([{"key": f"{number:09}", "caption": text} for number, text in enumerate(TEXTS)])
    entry = storage.publish(drawn.encode(), storage.join(build.path, "captions.json"))
    root.commit(build, Facts({"captions.json": entry}, rows=10, call="", workers=[]))
    with pytest.raises(
        DataError, match=r"^eval\.rivals\.other: of 10 .* set training at \S*rival, 1 missing \('prompt 9'"
    ):
        told(root.config, files / "root")


def test_nothing_is_looked_through_where_nothing_is_to_be_evaluated(files):
    (files / "mine.txt").write_text("")
    config = load(files, "targets=[stage_c]")
    assert told(config, files / "root") == []
    with pytest.raises(DataError, match="holds no prompt"):
        told(load(files), files / "root")


@pytest.mark.parametrize("target", ["samples_mine", "null_samples_mine", "scores", "features_mine-ours"])
def test_whatever_reads_prompts_has_them_looked_through_beforehand(files, target):
    words = [f"targets=[{target}]", f"eval.distances.inception={files}/w.safetensors"]
    assert told(load(files, *words), files / "root")[0].startswith("eval.prompts.mine: 2 of 12 prompts")
    (files / "mine.txt").write_text("")
    with pytest.raises(DataError, match=r"^eval\.prompts\.mine: \S+ holds no prompt"):
        told(load(files, *words), files / "root")


def test_only_what_a_step_to_do_reads_is_looked_through(files):
    """Drawing reads no rival; features of a rival's pictures, and real ones, are asked for without scores too."""
    (files / "none").mkdir()
    words = [f"eval.rivals.other={files}/none", f"eval.distances.references.mine={files}/none"]
    words += [f"eval.distances.inception={files}/w.safetensors"]
    assert len(told(load(files, *words, "targets=[samples_mine]"), files / "root")) == 1
    for key, target in (
        ("rivals.other", "features_mine-other"),
        ("distances.references.mine", "features_mine-reference"),
    ):
        with pytest.raises(DataError, match=rf"^eval\.{key}: \S+ holds no picture"):
            told(load(files, *words, f"targets=[{target}]"), files / "root")


def test_another_run_of_the_root_is_a_rival_by_its_samples(files):
    root = Root(files / "root", "targets=[scores]")
    build = root.build("samples")
    entry = storage.publish(b"x", storage.join(build.path, "captions.json"))
    samples = root.commit(build, Facts({"captions.json": entry}, rows=1, call="", workers=[]))
    record = {"id": "1-early", "conf": "evaluate", "command": "", "outcome": "done", "started": "2026-01-01T00:00:00Z"}
    record["fingerprints"] = {"samples": samples.manifest["fingerprint"]}
    storage.publish(json.dumps(record).encode(), str(files / "root/invocations/1-early.json"))
    config = compose.load("evaluate", ["scale=micro", "eval.rivals.before='run=early'"])
    resolved = with_runs(config, str(files / "root"))
    assert resolved.eval.rivals == {"before": {"training": samples.path}}
    assert with_runs(resolved, str(files / "root")) is resolved
    unknown = compose.load("evaluate", ["scale=micro", "eval.rivals.before='run=none'"])
    with pytest.raises(UsageError, match=r"^eval\.rivals\.before=run=none: run=none: root=\S+ has no run of that ID"):
        with_runs(unknown, str(files / "root"))
    (files / "root/invocations/torn.json").write_text('{"id": "torn", "fin')
    torn = compose.load("evaluate", ["scale=micro", "eval.rivals.before='run=torn'"])
    with pytest.raises(UsageError, match=r"^eval\.rivals\.before=run=torn: run=torn: .* the last runs: 1-early "):
        with_runs(torn, str(files / "root"))
    with pytest.raises(UsageError, match="that run has drawn none of the prompt sets mine"):
        with_runs(load(files, "eval.rivals.before='run=early'"), str(files / "root"))
