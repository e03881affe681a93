"""The command line's edges: pipes that nobody reads, encodings without our letters, Ctrl-C at any moment."""

import json
import os
import re
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


def closing(*streams: int, words: list[str]) -> "subprocess.CompletedProcess[str]":
    """Called with some of the standard streams closed."""
    shut = " ".join(f"{number}{'<' if number == 0 else '>'}&-" for number in streams)
    command = ["sh", "-c", f'exec "$@" {shut}', "sh", sys.executable, "-m", "pipeline", *words]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)


@pytest.mark.parametrize("streams", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_streams_that_are_closed_take_nothing_and_end_nothing(tmp_path, streams):
    """Nor does a file get their numbers, and what was meant for them."""
    done = closing(*streams, words=[*PLAN, "--json", f"root={tmp_path}"])
    assert (done.returncode, done.stderr) == (0, "")
    assert 1 in streams or json.loads(done.stdout)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("words", [["status"], [*PLAN, "--json"], ["--version"]], ids=" ".join)
def test_an_answer_that_finds_no_room_ends_in_a_sentence(tmp_path, words):
    root = [] if words == ["--version"] else [f"root={tmp_path}"]
    command = [sys.executable, "-m", "pipeline", *words, *root]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=CHECKOUT, stdout=full, stderr=subprocess.PIPE, text=True)
    told = "error: a file, or stdout: no space is left there; make some and start the same command again\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_a_working_folder_that_is_gone_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(PLAN) == 2
    assert (
        capsys.readouterr().err == "error: the folder that this was started in is gone; change to one that is there\n"
    )


def test_letters_that_the_encoding_has_not_are_escaped(tmp_path):
    root = tmp_path / "Würstchen"
    for words in (["status", "--json"], PLAN):
        with start(*words, f"root={root}", PYTHONIOENCODING="ascii") as running:
            out, err = running.communicate()
        assert running.returncode == 0, err
        assert out.isascii()
        assert "--json" not in words or json.loads(out)["root"] == str(root)


@pytest.fixture(scope="module")
def plans_for_s(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds that a plan takes when it is left alone."""
    with start(*PLAN, f"root={tmp_path_factory.mktemp('calm')}") as calm:
        began = time.monotonic()
        calm.communicate()
    return time.monotonic() - began


# What Python makes of it in a callback of its own imports, before the first line of ours
IGNORED = r"Exception ignored in: <function _get_module_lock(.*\n)*?KeyboardInterrupt: ?\n"


@pytest.mark.xdist_group("ctrl_c")  # of which each worker would take the time anew
@pytest.mark.parametrize("moment", range(8))
def test_ctrl_c_at_any_moment_is_no_traceback(tmp_path, plans_for_s, moment):
    """The moments are spread over that time."""
    with start(*PLAN, f"root={tmp_path}") as running:
        time.sleep(plans_for_s * moment / 8)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate()
    err = re.sub(IGNORED, "", err)
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
