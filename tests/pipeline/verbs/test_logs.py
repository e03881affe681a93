"""`logs`: what a step said, as it may be shown."""

import json
from pathlib import Path

import pytest

from datasets.files import storage
from pipeline.__main__ import main
from pipeline.store import log_files

RUN = "20260101-000000-abcd"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root of one run, whose download's log has what a server said, in part of no encoding."""
    steps = {"images": {"step": "download", "state": "done", "artifact": "a/b/c", "log": "l/r/x"}}
    record = {"id": RUN, "conf": "stage_a", "command": "", "outcome": "done", "started": "2026-01-01T00:00:00Z"}
    record["steps"] = steps
    storage.publish(json.dumps(record).encode(), f"{tmp_path}/invocations/{RUN}.json")
    storage.publish(b"404 \x1b[2Jgone\xff\n", log_files.of_step(str(tmp_path), RUN, "images"))
    return tmp_path


@pytest.mark.parametrize("name", ["download", "images"])
def test_a_log_cannot_drive_the_terminal_whoever_wrote_it(root, capsys, name):
    assert main(["logs", name, f"root={root}"]) == 0
    assert capsys.readouterr().out == "404 \\x1b[2Jgone\ufffd\n"


def test_without_a_name_it_says_which_names_it_takes(root, capsys):
    assert main(["logs", f"root={root}"]) == 2
    assert "the name of a step or of its artifact, for example" in capsys.readouterr().err


def test_a_step_that_is_not_there_is_named_with_those_that_are(root, capsys):
    assert main(["logs", "downlaod", f"root={root}"]) == 2
    assert "has such a step (did you mean download?); there are download, images" in capsys.readouterr().err
