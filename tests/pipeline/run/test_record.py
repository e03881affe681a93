"""What a root tells of a run that goes on, and how `status` and `logs` show it."""

import json
import logging
from datetime import datetime
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.run import record
from pipeline.run.record import Record
from pipeline.run.step_log import logging_to
from pipeline.store import log_files, readers
from pipeline.store.artifacts import Store


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    monkeypatch.setattr(record, "EVERY_S", 0.0)
    return Record(str(tmp_path), {"id": "20260101-000000-abcd", "conf": "stage_c", "command": "run conf=stage_c"})


def test_status_tells_how_far_a_step_is(run, tmp_path, capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    run.begin("stage_c", "train_c", f"{tmp_path}/artifacts/stage_c/0")
    run.progress("stage_c", 64, 64, "workers found")
    for done in (100, 150, 200):
        run.progress("stage_c", done, 1000, "stage_c steps", 0.5)
        clock[0] += 50
    assert main(["status", f"root={tmp_path}"]) == 0
    told = capsys.readouterr().out
    # 100 steps in 100 s, and 50 s ago
    assert (
        "stage_c      running  200 of 1,000 stage_c steps, 1/s, 13.3 min left, 0.5 device-hours, told 50 s ago" in told
    )
    assert f"log {tmp_path}/logs/20260101-000000-abcd/stage_c.log" in told
    assert main(["status", f"root={tmp_path}", "--json"]) == 0
    (step,) = json.loads(capsys.readouterr().out)["runs"][0]["steps"].values()
    assert (step["progress"]["done"], step["progress"]["total"]) == (200, 1000)
    run.end_step("stage_c", "done")
    run.end(None)
    assert main(["status", f"root={tmp_path}", "--follow"]) == 0
    assert "conf=stage_c  done" in capsys.readouterr().out


def test_others_read_what_it_asks_for_and_that_it_is_at_work(run, tmp_path):
    run.begin("stage_c", "train_c", f"{tmp_path}/artifacts/stage_c/{'0' * 16}")
    (found,) = readers.runs(str(tmp_path), print)
    assert (found.id, found.live) == ("20260101-000000-abcd", True)
    assert readers.Wants(Store(str(tmp_path))).of([found]) == {("stage_c", "0" * 16)}
    run.end_step("stage_c", "failed")
    run.end(ValueError("no"))
    (found,) = readers.runs(str(tmp_path), print)
    assert (found.live, found.record["outcome"]) == (False, "ValueError: no")
    begun, ended = (datetime.fromisoformat(found.record[key]) for key in ("started", "ended"))
    assert begun <= ended == found.lived


def test_a_sign_that_cannot_be_given_ends_no_run(run, monkeypatch, caplog):
    def away(*_: object) -> None:
        raise OSError("the store is away")

    run.begin("stage_c", "train_c", "artifacts/stage_c/0")
    monkeypatch.setattr("datasets.files.storage.publish", away)
    run.progress("stage_c", 1, 2, "steps")
    assert "progress is not shown by `status`: the store is away" in caplog.text


def test_progress_is_written_now_and_then(tmp_path, monkeypatch):
    written: list[str] = []
    run = Record(str(tmp_path), {"id": "1"})
    run.begin("images", "download", "artifacts/images/0")
    monkeypatch.setattr("datasets.files.storage.publish", lambda content, path: written.append(path))
    for done in range(1000):
        run.progress("images", done, 1000, "pictures")
    assert written == []


def test_logs_shows_the_step_and_its_ranks_of_the_last_run(run, tmp_path, capsys):
    for step, output in (("encode_a", "latents_a"), ("train_c", "stage_c")):
        path = run.begin(output, step, f"{tmp_path}/artifacts/{output}/0")
        with logging_to(path, print):
            logging.getLogger("pipeline").info("%s begins", step)
        run.end_step(output, "done")
    for attempt, rank in ((1, 0), (1, 1), (2, 0), (2, 1)):
        with logging_to(log_files.of_rank(path, attempt, rank), print):
            logging.getLogger("pipeline").info("rank %d in attempt %d", rank, attempt)
    run.end(None)

    def said(*words: str, code: int = 0) -> str:
        assert main(["logs", *words, f"root={tmp_path}"]) == code
        told = capsys.readouterr()
        return told.out if code == 0 else " ".join(told.err.split())

    assert said("train_c").endswith("INFO train_c begins\n")
    assert said("latents_a", "--follow").endswith("INFO encode_a begins\n")
    assert said("stage_c", "--rank", "1").endswith("INFO rank 1 in attempt 2\n")
    assert said("train_c", "--rank=0", "run=20260101-000000-abcd").endswith("INFO rank 0 in attempt 2\n")
    assert "--rank 2: stage_c.log has no such rank; its ranks are 0, 1" in said("train_c", "--rank", "2", code=2)
    assert "it has no ranks, or they have not begun" in said("encode_a", "--rank", "0", code=2)
    assert "(did you mean train_c?); there are encode_a, latents_a, stage_c, train_c" in said("trian_c", code=2)
    assert "has no run of that ID" in said("train_c", "run=1", code=2)
    assert "logs needs the name of a step" in said(code=2)
    assert "--rank needs the number of a rank" in said("train_c", "--rank", "first", code=2)


def test_of_a_root_without_runs_there_are_no_logs(tmp_path, capsys):
    assert main(["logs", "train_c", f"root={tmp_path}"]) == 2
    assert "nothing has been run there yet" in " ".join(capsys.readouterr().err.split())
