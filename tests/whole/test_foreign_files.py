"""What other programs and people leave anywhere under a root stops no verb: it is passed over, counted and named."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from datasets.files import storage
from pipeline.__main__ import main
from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.settings import compose
from pipeline.store import ledger
from pipeline.store.artifacts import Store
from pipeline.tracking.mlflow_store import connect, locate_store

MICRO = ["conf=stage_a", "scale=micro"]
LITTER = {
    ".DS_Store": b"\0\0\0\1Bud1",
    "._notes.json": b"\0\5\x16\7",
    "empty.json": b"",
    "torn.json": b'{"id": "x", "sta',
    "list.json": b"[1]",
    "object.json": b"{}",
    "empty.jsonl": b"",
    "torn.jsonl": b'{"event": "lease_open"\n7\n\xff\n',
    "notes.txt": b"ask me before you delete this",
    "foreign/deep/1.json": b"{",
}
PLACES = ["", "invocations", "ledger", "forgotten", "forgotten/done", "logs", "claims", "claims/runs", "artifacts"]
PLACES += ["artifacts/stage_a", "mlflow", "mlflow/unsent", "mlflow/artifacts"]


@pytest.fixture
def root(tmp_path: Path, empty_mlflow: Path) -> Path:
    """A root with a finished artifact of every step, a run, device-hours, and MLflow's store."""
    loaded, root = compose.load("stage_a", ["scale=micro"]), tmp_path / "root"
    store = Store(str(root))
    for name, found in fingerprints(order(table(loaded), loaded.targets), loaded.lookup).items():
        entry = storage.publish(name.encode(), storage.join(store.path(name, found.digest), "file"))
        facts = {"files": {"file": entry}, "timed": [], "rows": 1, "metrics": {}, "seconds": 1.0, "notes": {}}
        store.commit(name, found, {**facts, "device_seconds": 2.0, "created": "2026-01-01T00:00:00+00:00"})
    with ledger.Writer(str(root), "one").lease("train_a", "0" * 16, 1, "cpu"):
        pass
    record = {"id": "20260101-000000-abcd", "conf": "stage_a", "command": "python -m pipeline run conf=stage_a"}
    record |= {"outcome": "done", "steps": {}, "started": "2026-01-01T00:00:00+00:00"}
    storage.publish(json.dumps(record).encode(), f"{root}/invocations/{record['id']}.json")
    (root / "mlflow").mkdir()
    shutil.copy(empty_mlflow, root / "mlflow/mlflow.db")
    connect(locate_store(str(root), None), "wuerstchen")
    return root


VERBS = [
    ["status", "--json"],
    ["status"],
    ["plan", *MICRO, "--json"],
    ["show", *MICRO, "artifact=stage_a", "--json"],
    ["report", "hours", "--json"],
    ["gc", "--json", "days=0"],
    ["data", "verify", *MICRO, "--json"],
    ["run", *MICRO, "--json"],
]


def said(capsys: pytest.CaptureFixture[str], root: Path, line: list[str]) -> tuple[int, str, str]:
    code = main([*line, f"root={root}"])
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.mark.parametrize("line", VERBS, ids=" ".join)
def test_verbs_answer_as_if_it_were_not_there_and_name_it(root, capsys, line, monkeypatch):
    monkeypatch.setattr("pipeline.terminal.NAMED", 1000)
    code, clean, _ = said(capsys, root, line)
    for place in PLACES:
        for name, content in LITTER.items():
            file = root / place / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        (root / place / os.fsdecode(b"no-\xff-utf8.json")).write_bytes(b"{}")
        (root / place / os.fsdecode(b"nor-\xfe-this.jsonl")).mkdir()
    found = said(capsys, root, line)
    torn = re.compile(r'"torn_lines": \d+')  # which `report hours` counts, and does say
    assert (found[0], torn.sub("", found[1])) == (code, torn.sub("", clean))
    assert "Traceback" not in found[2]
    if line[0] in ("status", "gc", "report"):
        assert "passed over " in found[2]
        places = [f"{root}/{place}" for place in ("invocations", "ledger", "artifacts")]
        assert any(f"{place}/empty.json: " in found[2] for place in places)
        assert any(f"{place}/no-\\xff-utf8.json: its name is no UTF-8" in found[2] for place in places)


def test_gc_deletes_nothing_that_is_not_ours(root, capsys):
    for name, content in LITTER.items():
        for place in ("artifacts", "artifacts/stage_a", "claims", "invocations"):
            file = root / place / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    before = {path for path in root.rglob("*") if path.name in {Path(name).name for name in LITTER}}
    assert main(["gc", "--yes", f"root={root}"]) == 0
    assert {path for path in before if not path.exists()} == set()


def test_gc_deletes_nothing_while_a_runs_record_is_damaged(root, capsys):
    (root / "invocations/20260102-000000-abcd.json").write_bytes(b"")
    assert main(["gc", f"root={root}"]) == 0
    assert main(["gc", "--yes", "days=0", f"root={root}"]) == 2
    assert "20260102-000000-abcd.json is damaged: it is empty; so nobody knows" in capsys.readouterr().err
    assert len(list(Store(str(root)).finished())) == 3


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "na', b"[]", b'{"format": 1}'], ids=repr)
def test_an_artifact_with_a_damaged_manifest_is_not_done_and_that_is_said(root, capsys, content):
    (artifact,) = Store(str(root)).finished("stage_a")
    Path(artifact.path, "manifest.json").write_bytes(content)
    _, out, err = said(capsys, root, ["plan", *MICRO, "--json"])
    states = {step["step"]: step["state"] for step in json.loads(out)["steps"]}
    assert states["train_a"] in ("run", "resume")
    assert states["fetch"] == "done"
    assert f"passed over 1 file: {artifact.path}/manifest.json: damaged: " in err
    code, out, _ = said(capsys, root, ["status", "--json"])
    assert (code, [one["name"] for one in json.loads(out)["artifacts"]]) == (0, ["images", "metadata"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"seconds": ["x"]},
        {"device_seconds": "x"},
        {"shards": 1e308},
        {"metrics": [1]},
        {"notes": None},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "line", [["status"], ["status", "--json"], ["gc"], ["show", *MICRO, "artifact=stage_a"]], ids=" ".join
)
def test_a_manifest_that_says_something_else_stops_no_verb(root, capsys, line, wrong):
    (artifact,) = Store(str(root)).finished("stage_a")
    told = json.dumps({**artifact.manifest, **wrong})
    Path(artifact.path, "manifest.json").write_text(told)
    _, _, err = said(capsys, root, line)
    assert f"{artifact.path}/manifest.json: damaged: its {next(iter(wrong))} is " in err


FURTHER_DOWN: list[tuple[dict[str, Any], str]] = [
    ({"notes": {"rejected": {"url": "1"}}}, "its notes.rejected.url is '1'"),
    ({"notes": {"rejected": [1]}}, "its notes.rejected is "),
    ({"notes": {"read": "64"}}, "its notes.read is '64'"),
    ({"notes": {"lost": {"timeout": None}}}, "its notes.lost.timeout is 'None'"),
    ({"notes": {"sources": [{"name": "x"}]}}, "it has no notes.sources.0."),
    ({"notes": {"columns": {"url": 7}}}, "its notes.columns.url is '7'"),
    ({"notes": {"prompts": {"all": {"n": "4"}}}}, "notes.prompts."),
    ({"metrics": {"loss": []}}, "its metrics.loss is '[]'"),
    ({"versions": {"torch": {}}}, "its versions.torch is '{}'"),
    ({"parents": {"images": 7}}, "its parents.images is '7'"),
    ({"files": {"file": {"bytes": 1, "sha256": "0", "more": 1}}}, "it has a files.file.more"),
]


@pytest.mark.parametrize("line", [["data", "funnel"], ["data", "lost"], ["report", "out=x.html"], ["plan"]], ids=str)
def test_nor_does_one_that_says_so_further_down(root, capsys, line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    manifests = {artifact.path: artifact.manifest for artifact in Store(str(root)).finished()}
    for wrong, told in FURTHER_DOWN:
        for path, manifest in manifests.items():
            Path(path, "manifest.json").write_text(json.dumps(manifest | wrong))
        _, _, err = said(capsys, root, [*line, *MICRO])
        assert re.search(f"{root}/artifacts/[^ ]*/manifest.json: damaged: .*{re.escape(told)}", err)


def test_a_run_does_not_download_what_a_damaged_request_may_have_named(root, capsys):
    (root / "forgotten").mkdir()
    (root / "forgotten/2026-01-01T000000+0000-abcdef.json").write_bytes(b"{")
    for artifact in Store(str(root)).finished():
        Path(artifact.path, "manifest.json").unlink()
    assert main(["run", *MICRO, f"root={root}"]) == 2
    assert "abcdef.json is damaged: " in capsys.readouterr().err
    assert main(["status", f"root={root}"]) == 0
