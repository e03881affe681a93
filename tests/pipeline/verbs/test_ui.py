"""`ui` where the server is somebody else's: it says where, and ends."""

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.store.process import ProcessId
from tests.postgres import free_port

REMOTE = "root=s3://bucket/prefix"


class Answers(BaseHTTPRequestHandler):
    """What an MLflow server says of its health and of an experiment."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"experiment": {"experiment_id": "7"}}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("conf", [[], ["conf=stage_c"]])
def test_a_server_of_others_is_told_and_not_waited_for(url, conf, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    for words in (["tracking=server"], ["tracking=server", f"tracking.uri={url}"], [f"tracking.uri={url}"]):
        assert main(["ui", *conf, REMOTE, *words]) == 0
        said = capsys.readouterr().err
        assert f"MLflow: {url}/#/experiments/7/runs" in said
        assert "Ctrl-C" not in said


def test_one_that_another_process_has_opened_on_this_root_too(tmp_path: Path, url: str, capsys) -> None:
    """But not the one on another root, of which this one is a copy."""
    (tmp_path / "root/mlflow").mkdir(parents=True)
    told = {"url": url, "database": str(tmp_path / "root/mlflow/mlflow.db"), **vars(ProcessId.own())}
    (tmp_path / "root/mlflow/ui.json").write_text(json.dumps(told))
    assert main(["ui", f"root={tmp_path}/root"]) == 0
    assert f"MLflow: {url}/#/experiments/7/runs" in capsys.readouterr().err
    shutil.copytree(tmp_path / "root", tmp_path / "copy")
    assert main(["ui", f"root={tmp_path}/copy"]) == 2
    assert f"there is no MLflow store {tmp_path}/copy/mlflow/mlflow.db yet" in capsys.readouterr().err


def test_one_that_does_not_answer_is_refused(capsys):
    uri = f"http://127.0.0.1:{free_port()}"
    assert main(["ui", REMOTE, f"tracking.uri={uri}"]) == 2
    assert f"tracking.uri={uri}: no MLflow server answers there (" in capsys.readouterr().err


def test_a_remote_root_without_one_is_told_which_words_name_it(capsys):
    assert main(["ui", REMOTE]) == 2
    assert "give tracking.uri=http://... of an MLflow server, or tracking=server where" in capsys.readouterr().err
