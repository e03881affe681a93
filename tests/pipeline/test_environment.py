"""What libraries find around them: a name, a home, a folder short enough for Ray's sockets, and no leave to report."""

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from pipeline import environment
from pipeline.environment import QUIET, SOCKET_ROOM, home_folder, ray_folder
from pipeline.errors import UsageError

CHECKOUT = Path(__file__).parents[2]
NOBODY = """
import os, sys
from pathlib import Path
import getpass
from pipeline import environment
from pipeline.store.process import user_name
os.setgid(54321), os.setuid(54321)  # without an entry among the users
for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
    os.environ.pop(name, None)
print(user_name())
environment.name_and_home()
print(getpass.getuser(), Path.home(), os.access(Path.home(), os.W_OK))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without a name")
def test_a_user_without_name_and_home_gets_both():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own folders are closed to others
        os.chmod(folder, 0o1777)
        command = [sys.executable, "-c", NOBODY]
        environ = {**os.environ, "TMPDIR": folder, "PYTHONPATH": str(CHECKOUT)}
        done = subprocess.run(command, cwd=CHECKOUT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, told = done.stdout.splitlines()
    assert name == "user 54321"
    assert told == f"user-54321 {folder}/wuerstchen-home-54321 True"


def test_who_has_a_name_and_a_home_keeps_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USER", "ada")
    monkeypatch.setenv("LOGNAME", "ada")
    environment.name_and_home()
    assert (os.environ["HOME"], os.environ["USER"], home_folder()) == (str(tmp_path), "ada", tmp_path)


def test_a_home_that_cannot_be_written_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    assert home_folder() == Path(tempfile.gettempdir(), f"wuerstchen-home-{os.getuid()}")


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_short_folder_is_taken_as_it_is(monkeypatch, name):
    for other in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(other, raising=False)
    short = "/" + "x" * (SOCKET_ROOM - 1)
    monkeypatch.setenv(name, short)
    assert ray_folder() == f"{short}/ray"
    socket = f"{short}/ray/session_2026-11-29_16-27-05_123456_4194304/sockets/plasma_store"  # the largest pid
    assert len(socket) <= (103 if sys.platform == "darwin" else 107)


@pytest.mark.parametrize("long", ["/" + "x" * SOCKET_ROOM, "/" + "ü" * (SOCKET_ROOM // 2 + 1)])
def test_a_long_folder_has_a_short_one_in_its_place_or_is_refused(monkeypatch, tmp_path, long):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", long)
    assert ray_folder() == "/tmp/ray"
    monkeypatch.setattr(environment, "SHORT_FOLDERS", ("/none", "/of these"))
    with pytest.raises(
        UsageError, match=r"TMPDIR=.* is too long for the names of Ray's sockets .* set RAY_TMPDIR to a"
    ):
        ray_folder()


def test_libraries_are_told_not_to_report_home() -> None:
    """Each library's own check, in a process without the marks of a test run, which silence some of them."""
    program = """
        from pipeline.environment import quiet_environment
        quiet_environment()
        from huggingface_hub import constants
        from mlflow.telemetry.utils import is_telemetry_disabled
        from ray._common.usage.usage_lib import usage_stats_enabled
        assert is_telemetry_disabled()
        assert not usage_stats_enabled()
        assert constants.HF_HUB_DISABLE_TELEMETRY and constants.HF_HUB_DISABLE_UPDATE_CHECK
    """
    marks = {"PYTEST_CURRENT_TEST", "CI", "GITHUB_ACTIONS", *QUIET}
    environment = {name: value for name, value in os.environ.items() if name not in marks}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, env=environment)
