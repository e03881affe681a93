"""The command line's edges: pipes that nobody reads, encodings without our letters, Ctrl-C at any moment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import __main__
from pipeline.__main__ import NO_READER, main

CHECKOUT = Path(__file__).parents[2]
PLAN = ["plan", "conf=stage_c", "scale=micro"]


def start(*words: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *words],
        cwd=CHECKOUT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("words", [[*PLAN, "--json"], PLAN, ["config", "list"]], ids=" ".join)
def test_a_pipe_that_nobody_reads_ends_an_answer(tmp_path, words):
    root = [] if words[0] == "config" else [f"root={tmp_path}"]
    with start(*words, *root) as running:
        assert running.stdout
        assert running.stderr
        running.stdout.close()
        err = running.stderr.read()
    assert running.returncode == NO_READER == 141
    assert "Traceback" not in err
    assert "Exception ignored" not in err


def test_letters_that_the_encoding_has_not_are_escaped(tmp_path):
    root = tmp_path / "Würstchen"
    for words in (["status", "--json"], ["status"], [*PLAN, "--json"], PLAN):
        with start(*words, f"root={root}", PYTHONIOENCODING="ascii") as running:
            out, err = running.communicate()
        assert running.returncode == 0, err
        assert out.isascii()
        if "--json" in words:
            json.loads(out)
    with start("status", "--json", f"root={root}", PYTHONIOENCODING="ascii") as running:
        assert json.loads(running.communicate()[0])["root"] == str(root)


@pytest.mark.parametrize("moment", range(8))
def test_ctrl_c_at_any_moment_is_no_traceback(tmp_path, moment):
    """The moments are spread over the time that the command takes when it is left alone."""
    with start(*PLAN, f"root={tmp_path}") as calm:
        began = time.monotonic()
        calm.communicate()
    seconds = time.monotonic() - began
    with start(*PLAN, f"root={tmp_path}") as running:
        time.sleep(seconds * moment / 8)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate()
    assert running.returncode in (130, -signal.SIGINT, 0)  # before the first line of ours, and when it was over
    if running.returncode == -signal.SIGINT:
        assert "pipeline" not in err
    else:
        assert "Traceback" not in err


def test_ctrl_c_counts_as_such_whatever_a_library_makes_of_it(monkeypatch, capsys):
    def verb(words: object) -> None:
        try:
            __main__._stop()
        except KeyboardInterrupt:
            raise IndexError("list index out of range") from None

    monkeypatch.setattr(__main__, "_stopped", [])
    monkeypatch.setattr(__main__, "_handle", verb)
    assert main(["status"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_place_that_the_system_refuses_is_a_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["status", f"root={tmp_path}/{'x' * 300}"]) == 2
    assert "the name is too long" in capsys.readouterr().err
