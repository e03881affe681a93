"""What became of runs that could not say how they ended."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.store import claims
from pipeline.store.process import ProcessId
from pipeline.verbs import status
from tests.pipeline.verbs.test_gc import record

ELSEWHERE = {"host": "elsewhere", "pid": 1, "started": 0.0, "boot": "theirs", "namespace": "pid:[1]", "later": "field"}


def outcome(root: Path, capsys: pytest.CaptureFixture[str], process: dict[str, Any]) -> tuple[str, str]:
    step = {"state": "running", "log": "logs/1/images.log", "artifact": "artifacts/images/0"}
    record(root, 1, "run conf=stage_c", conf="stage_c", outcome="running", process=process, steps={"images": step})
    assert main(["status", f"root={root}", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    return run["outcome"], run["steps"]["images"]["state"]


def test_a_run_of_this_machine_is_known_by_its_process(tmp_path, capsys):
    own = vars(ProcessId.own())
    assert outcome(tmp_path, capsys, own) == ("running", "running")
    assert outcome(tmp_path, capsys, {**own, "pid": 2**22 - 1}) == ("killed", "killed")


def test_one_of_another_machine_by_the_sign_that_it_gives(tmp_path, capsys):
    assert outcome(tmp_path, capsys, ELSEWHERE) == ("killed", "killed")
    with claims.at_work(str(tmp_path), "1"):
        assert outcome(tmp_path, capsys, ELSEWHERE) == ("running", "running")
        old = time.time() - 601
        os.utime(tmp_path / "claims/runs/1.json", (old, old))
        assert outcome(tmp_path, capsys, ELSEWHERE) == ("silent for 10 minutes", "silent for 10 minutes")


def test_a_record_that_does_not_tell_its_process_ends_nothing(tmp_path, capsys):
    assert outcome(tmp_path, capsys, {}) == ("killed", "killed")


def test_who_follows_a_run_is_told_its_end(tmp_path, capsys, monkeypatch):
    """While it is at work, each line once."""
    step = {"state": "running", "log": "logs/1/images.log", "artifact": "artifacts/images/0"}
    monkeypatch.setattr(status.time, "sleep", lambda seconds: next(states, None))
    own = {"conf": "stage_c", "process": vars(ProcessId.own()), "steps": {"images": step}}

    def happen() -> Iterator[None]:
        for outcome, state in (("running", "running"), ("running", "done"), ("done", "done")):
            record(
                tmp_path,
                1,
                "run conf=stage_c",
                **{**own, "outcome": outcome, "steps": {"images": {**step, "state": state}}},
            )
            yield

    states = happen()
    next(states)
    assert main(["status", f"root={tmp_path}", "--follow"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split() for line in said[-3:]] == [
        ["images", "running"],
        ["images", "done"],
        ["run", "1", "conf=stage_c", "done"],
    ]
    assert next(states, "over") == "over"
