"""MLflow's own pages, as `ui` serves them."""

import contextlib
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.tracking.mlflow_store import MlflowStore, locate_store
from pipeline.verbs.ui import serve_ui
from tests.pipeline.tracking.tracked import tracking_of


def _free_port() -> int:
    """A port below those that the system gives out, so that nobody gets it between two uses."""
    for port in range(20000 + os.getpid() % 10000, 32768):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    pytest.fail("no free port")


def test_the_ui_answers_once_and_ends_with_its_verb(store: MlflowStore) -> None:
    with tracking_of(store):
        pass
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", _free_port()))
        port = probe.getsockname()[1]
        probe.listen()
        with pytest.raises(UsageError, match=f"port={port}: cannot be used"), serve_ui(store, port):
            pytest.fail("yielded a URL of somebody else's server")
    root = store.database.parent.parent
    verb = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "ui", f"root={root}", f"port={port}"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        assert verb.stderr is not None
        said = verb.stderr.readline()
        assert f"{url}/#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART" in said
        with serve_ui(store, 1) as open_already:  # whoever asks for another port gets the open one
            assert open_already == url
        with urllib.request.urlopen(url, timeout=30) as page:
            assert b"MLflow" in page.read()
        verb.terminate()
        assert verb.wait(60) == 0
    finally:
        verb.kill()
        verb.wait()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=30)


def test_the_ui_of_an_empty_root_is_refused(tmp_path: Path) -> None:
    empty = locate_store(str(tmp_path), None)
    with pytest.raises(UsageError, match=r"no MLflow store .*run something first"), serve_ui(empty, 5000):
        pytest.fail("served nothing")
    assert list(tmp_path.iterdir()) == []
