"""The command line: exit codes, what a user is told, what is on stdout, and that a refusal creates nothing."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from datasets.files import storage
from pipeline import __version__
from pipeline.__main__ import main
from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.settings.words import VERBS
from pipeline.store.artifacts import Store

CHECKOUT = Path(__file__).parents[3]
MICRO = ("conf=stage_c", "scale=micro")
LARGE = "stage_c.train.phases.0.batch_size=64"
TOO_LARGE = "a batch of 64 is larger than the data, which has at most 16 rows; lower batch_size of the training's"
REPORT_IMPORTS = """
import json, sys
from pipeline.__main__ import main
code = main(sys.argv[1:])
print(json.dumps([code, sorted({"torch", "ray", "mlflow"} & set(sys.modules))]), file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in: the default root, and whatever is written by mistake, would lie there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def process(code: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python on this checkout's packages in a process of its own, in another folder."""
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    return subprocess.run([sys.executable, *code], capture_output=True, text=True, cwd=folder, env=environment)


def build_all(root: Path | str, loaded: Config) -> None:
    """Commit an artifact of one small file for every step of a config."""
    store = Store(str(root))
    prints = fingerprints(order(table(loaded), loaded.targets), loaded.lookup)
    for name, found in prints.items():
        entry = storage.publish(name.encode(), storage.join(store.path(name, found.digest), "file"))
        facts = {"files": {"file": entry}, "timed": [], "rows": 16, "metrics": {}, "seconds": 1.0}
        store.commit(name, found, {**facts, "device_seconds": 2.0, "created": "2026-01-01T00:00:00+00:00"})


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["rnu", *MICRO], "there is no verb 'rnu' (did you mean run?)"),
        (["run", "scale=micro"], "run needs conf=NAME"),
        (["run", "conf="], "conf= is empty; name one of baseline_ldm, "),
        (["run", "conf=stage_d"], "conf=stage_d: there is no such conf (did you mean stage_"),
        (["run", *MICRO, "stage_c.train.learnign_rate=1"], "(did you mean stage_c.train.learning_rate?)"),
        (["run", *MICRO, "seed=abc"], "seed=abc: input should be a valid integer"),
        (["run", *MICRO, "stage_c.train.learning_rate=fast"], "stage_c.train.learning_rate=fast: input should be a"),
        (["run", *MICRO, "workers=3"], "batch_size=8 does not divide among workers=3; use workers=2 or 4"),
        (["run", *MICRO, "workers=9"], "batch_size=8 does not divide among workers=9; use workers=8"),
        (["run", *MICRO, LARGE], f"train_c: {TOO_LARGE} phases, or raise data.limit"),
        (["run", *MICRO, "root=/proc/x"], "root=/proc/x: cannot be written"),
        (["run", *MICRO, "root=file/below"], "/file/below: cannot be written"),
        (["run", *MICRO, "root="], "root= is empty"),
        (["run", *MICRO, "root=s3://bucket/x"], "tracking.uri: root=s3://bucket/x is remote"),
        (["run", *MICRO, "--only", "train_x"], "--only train_x: this run has no such step"),
        (["run", *MICRO, "--fast"], "run has no flag --fast"),
        (["run", *MICRO, "now"], "'now' is neither a flag nor key=value"),
        (["run", *MICRO, "eval=pickscore"], "eval.scorers.pickscore: a value is needed"),
        (
            ["run", *MICRO, "eval=pickscore", "eval.scorers.pickscore=w.safetensors", "eval.rivals.other=file"],
            "eval.scorers.pickscore: there is nothing at w.safetensors",
        ),
        (["run", "conf=stage_c", "scale=paper"], "data.metadata is not set"),
        (["run", "conf=stage_c", "scale=paper", "data=openmoji"], "text.clip_h.weights: there is nothing at weights/"),
        (["sample", *MICRO, "out=pictures"], 'sample needs prompt="..." and out=DIR'),
        (["sample", *MICRO, "prompt=red heart"], 'sample needs prompt="..." and out=DIR'),
        (
            ["sample", *MICRO, "prompt=red heart", "out=pictures", "run_seed=3", "data.limit=16"],
            "(no stage_a exists there at all); build it with: python -m pipeline run conf=stage_c scale=micro "
            "data.limit=16 seed=3",
        ),
        (["show", *MICRO, "artifact=baseline"], "run conf=stage_c scale=micro 'targets=[baseline]'"),
        (["sample", "prompt=red heart", "out=pictures"], "sample needs conf=NAME, or from=DIR with a release, for"),
        (["sample", *MICRO, "promt=x", "out=pictures"], "promt: there is no such word or key (did you mean prompt?)"),
        (["sample", *MICRO, "prompt=x", "out=pictures", "n=two"], "n=two: input should be a valid integer"),
        (["sample", *MICRO, "prompt=x", "out=pictures", "n=0"], "n=0: input should be greater than 0"),
        (["sample", *MICRO, "prompt=x", "out=pictures", "width=100"], "width=100: input should be a"),
        (["sample", *MICRO, "out=pictures", "image=file"], "image=file: no whole picture of the formats JPEG, PNG"),
        (["sample", *MICRO, "prompt=x", "out=pictures", "image=none.png"], "image=none.png: there is no such file"),
        (["sample", *MICRO, "prompt=x", "out=pictures", "strength=0.5"], "strength=0.5: how far to go from a picture"),
        (["sample", *MICRO, "image=x", "out=pictures", "strength=0.5"], "from image= to a prompt; give prompt=... too"),
        (["sample", *MICRO, "prompt=x", "out=pictures", "run_seed=x"], "seed=x: input should be a valid integer"),
        (["sample", "from=file", "prompt=x", "out=pictures"], "file/sampling.json is missing"),
        (
            ["sample", "from=file", "prompt=x", "out=pictures", "run_seed=3", "stage_c.text=x", "sample.batch=2"],
            "run_seed, stage_c.text: from=DIR draws with that release's own models and settings; leave them out",
        ),
        (
            ["config", *MICRO, "targets=[realease]"],
            "no step makes 'realease' (did you mean release?); there are",
        ),
        (["config", *MICRO, "stage_c.train"], "'stage_c.train' is not key=value; config takes"),
        (["run", *MICRO, "json"], "'json' is neither a flag nor key=value (did you mean --json?)"),
        (["status", "now"], "'now' is neither a flag nor key=value"),
        (["show", *MICRO, "artifact=nothing"], "artifact=nothing: there is no such artifact; this conf has metadata,"),
        (["show", *MICRO], "show needs artifact=NAME"),
        (["show", *MICRO, "artifact=stage_a"], "has no stage_a of exactly this conf"),
        (["export", *MICRO], "export needs out=DIR"),
        (["export", *MICRO, "out=release"], "has no release of exactly this conf"),
        (["report", "days"], "report knows one table"),
        (["report", *MICRO], "report needs out=FILE.html, or --json"),
        (["report", *MICRO, "out=report.pdf"], "out=report.pdf: the page is one file; give a name that ends in .html"),
        (["report", *MICRO, "out=report.html"], "has nothing of exactly this conf; the last runs: none"),
        (
            ["report", "run=1a2b", "out=report.html"],
            "run=1a2b: root=",
        ),
        (["report", "out=report.html"], "report needs conf=NAME"),
        (["report", "hours", "out=report.html"], "report hours takes no out="),
        (["show", "run=1a2b", "artifact=scores"], "has no run of that ID; the last runs: none"),
    ],
)
def test_a_refusal_is_one_sentence_exit_code_2_and_creates_nothing(line, told, elsewhere, capsys):
    (elsewhere / "file").write_text("not a folder")
    assert main(line) == 2
    output, message = capsys.readouterr()
    assert output == ""
    assert message.startswith("error: ")
    assert told in message
    assert message.count("\n") == 1
    assert [path.name for path in elsewhere.rglob("*")] == ["file"]


def test_the_process_ends_with_the_same_code_and_sentence(elsewhere):
    done = process(["-m", "pipeline", "plan", *MICRO, "stage_c.train.learnign_rate=1"], elsewhere)
    assert (done.returncode, done.stdout) == (2, "")
    sentence = "error: stage_c.train.learnign_rate: there is no such key (did you mean stage_c.train.learning_rate?)\n"
    assert done.stderr == sentence
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [
        ["sample", "prompt=red heart", "out=pictures"],
        ["show", "artifact=stage_a"],
        ["export", "out=release"],
        ["report", "out=report.html"],
        ["data", "funnel"],
        ["data", "verify"],
        ["data", "lost"],
        ["study", "build", "out=study.html", "eval=baseline"],
    ],
)
def test_what_does_not_record_a_run_does_not_ask_where_mlflow_is(line, capsys):
    assert main([*line, *MICRO, "root=memory://nothing"]) == 2
    assert "memory://nothing has no" in capsys.readouterr().err


@pytest.mark.parametrize("line", [["plan"], ["run"], ["data", "repair"], ["data", "retry"], ["data", "dedup"]])
def test_what_records_one_does(line, capsys):
    assert main([*line, *MICRO, "root=memory://nothing"]) == 2
    assert "tracking.uri: root=memory://nothing is remote" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        ["sample", *MICRO, "root=there", "prompt=red heart", "out=pictures"],
        ["show", *MICRO, "root=there", "artifact=stage_c"],
        ["export", *MICRO, "root=there", "out=release"],
    ],
)
def test_models_of_another_config_are_listed_and_the_nearest_is_explained(line, elsewhere, capsys):
    other = compose.load("stage_c", ["scale=micro", "stage_c.train.learning_rate=0.5"])
    build_all(elsewhere / "there", other)
    before = sorted(elsewhere.rglob("*"))
    assert main(line) == 2
    message = capsys.readouterr().err
    steps = order(table(other), other.targets)
    wanted = "release" if line[0] == "export" else "stage_c"
    assert f"has no {wanted} of exactly this conf" in message
    assert fingerprints(steps, other.lookup)[wanted].digest in message
    assert ("input stage_c changed" if wanted == "release" else "stage_c.train.learning_rate: 0.5 -> 0.002") in message
    assert sorted(elsewhere.rglob("*")) == before


def test_models_of_another_runs_seed_are_named_and_reached(elsewhere, capsys):
    other = compose.load("stage_c", ["scale=micro", "seed=3", "stage_c.train.learning_rate=0.5"])
    build_all(elsewhere / "runs", other)
    line = ["sample", *MICRO, "prompt=red heart", "seed=5", "out=pictures"]
    assert main(line) == 2
    message = capsys.readouterr().err
    assert "has no stage_a of exactly this conf" in message
    assert "(give run_seed=3 for its run's seed)" in message
    assert main([*line, "run_seed=3"]) == 2
    message = capsys.readouterr().err
    assert "has no stage_c of exactly this conf" in message
    assert "differs in stage_c.train.learning_rate: 0.5 -> 0.002" in message
    assert "run_seed" not in message


# ----------------------------------------------------------------------------------------------------- answers


def test_plan_as_json_is_one_document_and_writes_nothing(elsewhere, capsys):
    assert main(["plan", *MICRO, "--json"]) == 0
    output, message = capsys.readouterr()
    steps = json.loads(output)["steps"]
    assert message == ""
    assert [step["step"] for step in steps][:3] == ["fetch", "download", "encode_text"]
    assert {step["artifact"] for step in steps} >= {"stage_a", "stage_b", "stage_c", "samples", "scores", "release"}
    assert {step["state"] for step in steps} == {"run"}
    assert all(step["reason"] and step["cost"]["text"] for step in steps)
    assert list(elsewhere.iterdir()) == []


def test_plan_tells_what_is_done_and_why_something_is_not(elsewhere, capsys):
    build_all(elsewhere / "runs", compose.load("stage_c", ["scale=micro"]))
    assert main(["plan", *MICRO, "stage_c.train.learning_rate=0.5", "--json"]) == 0
    steps = {step["artifact"]: step for step in json.loads(capsys.readouterr().out)["steps"]}
    assert {name for name, step in steps.items() if step["state"] == "stale"} == {
        "stage_c", "samples", "scores", "release"
    }  # fmt: skip
    assert steps["stage_c"]["reason"] == "stage_c.train.learning_rate: 0.002 -> 0.5"
    assert steps["stage_b"]["cost"]["text"] == "spent 2 device-seconds"
    assert steps["stage_c"]["cost"]["work"] == 32


def test_plan_says_that_there_is_no_metadata(elsewhere, capsys):
    words = ["plan", *MICRO, "data.metadata=rows"]
    told = "data.metadata: there is no Parquet file at rows; give a file, a folder, a pattern or a URI\n"
    assert main(words) == 0
    assert capsys.readouterr().err == f"a run would stop at once: {told}"
    assert main(["run", *words[1:]]) == 2
    assert capsys.readouterr().err == f"error: {told}"
    assert not (elsewhere / "runs").exists()


@pytest.mark.parametrize("content", [b"", b"PAR1 and no footer"])
@pytest.mark.parametrize("key", ["metadata", "scores"])
def test_broken_parquet_is_refused_before_anything_is_created(elsewhere, capsys, content, key):
    (elsewhere / "rows.parquet").write_bytes(content)
    words = [*MICRO, f"data.{key}=rows.parquet"]
    told = f"data.{key}: {elsewhere}/rows.parquet cannot be read as LAION's Parquet ("
    assert main(["plan", *words]) == 0
    assert f"a run would stop at once: {told}" in capsys.readouterr().err
    assert main(["doctor", *words, "--json"]) == 2
    assert told in str(json.loads(capsys.readouterr().out)["findings"])
    assert main(["run", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {told}")
    assert said.endswith("); fetch it again, or give other files\n")
    assert not (elsewhere / "runs").exists()


def test_metadata_without_a_needed_column_are_refused_before_anything_is_created(elsewhere, capsys):
    table = pa.table({"URL": ["http://a.invalid/1"], "TEXT": ["a caption"]})
    pq.write_table(table, elsewhere / "rows.parquet")
    words = [*MICRO, "data.metadata=rows.parquet", "data.filters.min_side=8"]
    for verb in ("plan", "run"):
        assert main([verb, *words]) == 2
        assert "rows.parquet has no column WIDTH, HEIGHT" in capsys.readouterr().err
    assert not (elsewhere / "runs").exists()
    for name in ("WIDTH", "HEIGHT", "punsafe", "pwatermark", "AESTHETIC_SCORE"):
        table = table.append_column(name, [[9]])
    pq.write_table(table, elsewhere / "rows.parquet")
    assert main(["plan", *words]) == 0
    taken = "URL, TEXT, WIDTH, HEIGHT, punsafe, pwatermark, AESTHETIC_SCORE"
    missing = "similarity, LICENSE, ORIGINAL_URL"
    assert capsys.readouterr().err == f"data.metadata: columns taken: {taken}; not there: {missing}\n"


def test_plan_says_which_of_several_columns_are_taken(elsewhere, capsys):
    columns = {"image_url": ["http://a.invalid/1"], "caption": ["a cat"], "Original_Width": [900], "height": [900]}
    pq.write_table(pa.table(columns), elsewhere / "rows.parquet")
    pq.write_table(pa.table({"url": ["http://a.invalid/1"], "Aesthetic_Score": [6.0]}), elsewhere / "scores.parquet")
    nulls = (f"data.filters.max_{name}=null" for name in ("punsafe", "pwatermark"))
    words = [*MICRO, "data.metadata=rows.parquet", *nulls]
    assert main(["plan", *words, "data.scores=scores.parquet", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["columns"] == {
        "data.metadata": {"URL": "image_url", "TEXT": "caption", "WIDTH": "Original_Width", "HEIGHT": "height"},
        "data.scores": {"URL": "url", "AESTHETIC_SCORE": "Aesthetic_Score"},
    }
    assert "data.metadata: columns taken: URL from image_url, TEXT from caption, WIDTH from Original" in said.err
    assert "data.scores: columns taken: URL from url, AESTHETIC_SCORE from Aesthetic_Score; not there: TEXT" in said.err


def test_plan_says_that_a_batch_is_larger_than_the_data(elsewhere, capsys):
    def told(*words: str) -> str:
        assert main(["plan", *MICRO, *words]) == 0
        return capsys.readouterr().err

    stops = f"a run would stop at once: train_c: {TOO_LARGE} phases"
    assert told(LARGE) == f"{stops}, or raise data.limit\n"
    assert told(LARGE, "--until", "train_b") == ""  # whose batches fit
    assert told("baseline.train.phases.0.batch_size=64") == ""  # which this conf does not train
    everything = ["data.limit=null", "data.openmoji.captions=null"]
    assert told(LARGE, *everything) == ""
    build_all(elsewhere / "runs", compose.load("stage_c", ["scale=micro", *everything]))
    assert told(LARGE, *everything) == f"{stops}, or take more data\n"
    assert told(LARGE, *everything, "--force", "fetch") == ""
    build_all(elsewhere / "runs", compose.load("stage_c", ["scale=micro", LARGE]))
    assert told(LARGE) == ""


def test_plan_says_what_a_run_would_lack_and_what_has_changed(elsewhere, capsys):
    words = [*MICRO, "stage_c.weights=c.pt", "stage_c.train=null"]
    (elsewhere / "c.pt").write_bytes(b"the first")
    build_all(elsewhere / "runs", compose.load("stage_c", words[1:]))
    (elsewhere / "c.pt").rename(elsewhere / "d.pt")
    assert main(["plan", *words, "--json"]) == 0
    output, message = capsys.readouterr()
    steps = {step["artifact"]: step for step in json.loads(output)["steps"]}
    assert steps["stage_c"]["reason"].endswith(" -> nothing at c.pt")
    assert (
        message
        == "a run would stop at once: stage_c.weights: there is nothing at c.pt; put it there or change the key\n"
    )
    words[2] = f"stage_c.weights={elsewhere}/d.pt"
    assert main(["plan", *words, "--json"]) == 0
    assert {step["state"] for step in json.loads(capsys.readouterr().out)["steps"]} == {"done"}
    (elsewhere / "d.pt").write_bytes(b"the other")
    assert main(["plan", *words, "--json"]) == 0
    steps = {step["artifact"]: step for step in json.loads(capsys.readouterr().out)["steps"]}
    assert steps["stage_c"]["reason"].startswith("stage_c.weights: content changed, sha256 ")
    assert steps["samples"]["state"] == "stale"


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_neither_plan_nor_a_run_of_what_is_done_imports_torch_ray_or_mlflow(verb, elsewhere):
    weights = "stage_c.weights=c.pt"
    (elsewhere / "c.pt").write_bytes(b"hashed, and not looked into")
    build_all(elsewhere / "runs", compose.load("stage_c", ["scale=micro", weights]))
    if verb == "plan":  # which looks into the header of what it has not built yet
        weights = "stage_c.weights=new.safetensors"
        names = ("in_block.1.weight", "out_block.0.weight")
        save_file({name: np.zeros(1, np.float32) for name in names}, elsewhere / "new.safetensors")
    before = sorted(elsewhere.rglob("*"))
    done = process(["-c", REPORT_IMPORTS, verb, *MICRO, weights, "--json"], elsewhere)
    assert json.loads(done.stderr.splitlines()[-1]) == [0, []]
    answer = json.loads(done.stdout)
    if verb == "plan":
        assert "new.safetensors holds Stage A, not Stage C" in done.stderr
    else:
        assert answer["outcome"] == "nothing to do"
        assert "nothing to do: all 11 steps of conf=stage_c are done" in done.stderr
    assert sorted(elsewhere.rglob("*")) == before


def test_a_python_without_the_packages_is_told_in_one_sentence():
    done = subprocess.run(
        [sys.executable, "-S", "-m", "pipeline", "plan"], capture_output=True, text=True, cwd=CHECKOUT
    )
    assert done.returncode == 1
    assert done.stderr == "error: this Python lacks the packages: run `make setup`, then `source .venv/bin/activate`\n"


def test_config_list_names_every_conf_and_option(capsys):
    assert main(["config", "list"]) == 0
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert lines["confs"].split(", ") == compose.names()
    assert {"stage_a", "stage_b", "stage_c"} <= set(compose.names())
    assert {group: lines[group].split(", ") for group in compose.groups()} == compose.groups()
    assert {"data", "scale", "cluster", "tracking", "eval"} == set(compose.groups())


def test_config_shows_values_with_comments(capsys):
    assert main(["config", *MICRO, "seed=3"]) == 0
    assert "\nseed: 3  # Draws the plan" in capsys.readouterr().out


def test_version_is_that_of_the_project(capsys):
    assert main(["--version"]) == 0
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out == f"{__version__}\n" == f"{project['version']}\n"


@pytest.mark.parametrize("line", [[], ["--help"]])
def test_help_names_every_verb(line, capsys):
    assert main(line) == 0
    output = capsys.readouterr().out
    assert all(f"\n  {verb} " in output for verb in VERBS)


def test_the_status_of_a_moved_root_has_paths_that_are_there(elsewhere, capsys):
    log = "logs/20260101-000000-abcd/stage_a.log"
    steps = {"stage_a": {"state": "done", "log": f"/gone/runs/{log}", "artifact": "/gone/runs/artifacts/stage_a/0123"}}
    run = {"id": "20260101-000000-abcd", "conf": "stage_a", "outcome": "done", "steps": steps}
    run |= {"command": "python -m pipeline run conf=stage_a", "started": "2026-01-01T00:00:00+00:00"}
    storage.publish(json.dumps(run).encode(), str(elsewhere / "moved/invocations/20260101-000000-abcd.json"))
    assert main(["status", "root=moved"]) == 0
    assert f"log {elsewhere}/moved/{log}\n" in capsys.readouterr().out
    assert main(["status", "root=moved", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    assert told["steps"]["stage_a"]["artifact"] == f"{elsewhere}/moved/artifacts/stage_a/0123"


def test_an_empty_root_has_a_status(elsewhere, capsys):
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["artifacts"] == []
    build_all(elsewhere / "runs", compose.load("stage_a", ["scale=micro"]))
    assert main(["status", "--json"]) == 0
    artifacts = json.loads(capsys.readouterr().out)["artifacts"]
    assert [found["name"] for found in artifacts] == ["images", "metadata", "stage_a"]
    root = str(elsewhere / "runs")
    told = [(found["fingerprint"], found["created"], found["path"].removeprefix(f"{root}/")) for found in artifacts]
    assert main(["status"]) == 0
    said = capsys.readouterr().out
    assert f"all in {root}\n" in said
    assert all(fact in said for facts in told for fact in facts)
    assert main(["show", "conf=stage_a", "scale=micro", "artifact=stage_a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "stage_a"
