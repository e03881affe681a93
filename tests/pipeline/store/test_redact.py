"""What nobody else gets to see: secrets by their keys, in URLs, and from the environment; and what stays."""

import json
import logging
import pickle
import subprocess
import sys

import pytest

from datasets.files import storage
from pipeline.run.record import Record
from pipeline.settings import compose
from pipeline.store import log_files, redact
from pipeline.store.artifacts import Fingerprint, Store
from pipeline.store.redact import holds_password, redact_line, redact_text


@pytest.fixture(autouse=True)
def hidden(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What this process has hidden so far, which is nothing."""
    found: set[str] = set()
    monkeypatch.setattr(redact, "_from_environment", found)
    return found


@pytest.mark.parametrize(
    "key",
    ["token", "hub_token", "hubToken", "hub-token", "api.key", "secretKey", "secrets", "passphrase", "aws_access_key"],
)
def test_values_of_telling_keys_are_left_out_and_all_below_them(key):
    assert redact.redact({key: "x", "a": {key: {"b": ["x", 1]}}, "c": [{key: 2}]}) == {
        key: "***",
        "a": {key: {"b": ["***", "***"]}},
        "c": [{key: "***"}],
    }
    assert redact_text(f"{key}=x") == f"{key}=***"
    assert redact.redact({key: None}) == {key: None}


@pytest.mark.parametrize("key", ["tokenizer", "tokens", "key", "keys", "monkey", "secretary", "passed"])
def test_other_keys_keep_theirs(key):
    assert redact.redact({key: "x"}) == {key: "x"}
    assert redact_text(f"{key}=x") == f"{key}=x"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("s3://KEY:SECRET@bucket/x", "s3://***@bucket/x"),
        ("s3://KEY:SEC/RET@bucket/x", "s3://***@bucket/x"),
        ("see https://u@h/a?X-Amz-Signature=s#top, or http://h:80/b", "see https://***@h/a?***#top, or http://h:80/b"),
        ("http://proxy:8080/a@b", "http://proxy:8080/a@b"),
        ("what? a@b.c", "what? a@b.c"),
    ],
)
def test_of_urls_passwords_and_queries_are_left_out(text, left):
    assert redact_line(text) == left
    assert redact.redact({"a": [text]}) == {"a": [left]}


@pytest.mark.parametrize(
    ("value", "held"),
    [("s3://K:S@b/x", True), (["a", {"b": "http://u:p@h"}], True), ("http://h:80/a@b", False), (7, False)],
)
def test_a_password_in_a_uri_is_found_however_deep(value, held):
    assert holds_password(value) is held


def test_what_the_environment_gives_to_a_config_is_in_nothing_that_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", "canary-7")
    word = "data.download.user_agent='agent ${oc.env:CANARY} ${oc.env:NONE,of old}'"
    config = compose.load("stage_a", ["scale=micro", word])
    said = config.data.download.user_agent
    assert said == "agent canary-7 of old"  # for the servers that it is meant for
    error = ValueError(f"{said} is refused at s3://b/x?signature=canary-8")

    record = Record(str(tmp_path), {"id": "one", "config": redact.redact(config.model_dump(mode="json"))})
    record.end(error)
    path, warnings = log_files.of_step(str(tmp_path), "one", "images"), list[str]()
    undo = log_files.attached(log_files.LogFile(path, warnings.append), "pipeline")
    logging.getLogger("pipeline.run").info("%s", error)
    undo()
    print_ = Fingerprint("download", 1, {"agent": said, "token": "canary-9"}, {})
    store, place = Store(str(tmp_path)), Store(str(tmp_path)).path("images", print_.digest)
    files = {"file": storage.publish(b"x", f"{place}/file")}
    facts = {"files": files, "timed": [], "rows": 1, "created": "now", "notes": {"list": "s3://b/x?key=canary-10"}}
    store.commit("images", print_, facts)

    kept = {str(file): file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    assert len(kept) == 4
    assert [file for file, content in kept.items() if "canary" in content] == []
    assert "agent *** of old is refused at s3://b/x?***" in kept[path]
    (artifact,) = store.finished()
    assert artifact.manifest["settings"] == {"agent": "agent *** of old", "token": "***"}
    assert json.loads(kept[record.path])["config"]["data"]["download"]["user_agent"] == "agent *** of old"


ELSEWHERE = """
import logging, pickle, sys
from types import SimpleNamespace
from pipeline.cluster.board import HeardActor, heard
from pipeline.store import log_files

board = SimpleNamespace(post=SimpleNamespace(remote=print))
hidden = pickle.load(sys.stdin.buffer)

def work(path, text):
    undo = log_files.attached(log_files.LogFile(path, print), "pipeline")
    logging.getLogger("pipeline.models").info("%s", text)
    undo()

if sys.argv[1] == "task":
    heard(board, hidden, work, *sys.argv[2:])
else:
    HeardActor(board, hidden, lambda: lambda shard: work(*sys.argv[2:]))({"shard": [pickle.dumps(None)]})
"""


@pytest.mark.parametrize("kind", ["task", "actor"])
def test_a_process_that_works_for_the_driver_hides_what_that_has_hidden(kind, tmp_path):
    redact.hide("canary-7")
    path = tmp_path / "rank.log"
    command = [sys.executable, "-c", ELSEWHERE, kind, str(path), "agent canary-7 is refused"]
    subprocess.run(command, input=pickle.dumps(redact.hidden()), check=True, timeout=120)
    assert "agent *** is refused" in path.read_text()
    assert "canary" not in path.read_text()


def test_numbers_places_and_short_words_from_there_are_told(tmp_path, monkeypatch, hidden):
    for value in ("12", "-0.5", "http://mlflow:5000", str(tmp_path), "", " "):
        redact.hide(value)
    assert hidden == set()
    redact.hide("tiny")
    assert redact.redact({"a": "tiny", "b": "a tiny word"}) == {"a": "***", "b": "a tiny word"}


def test_the_longest_of_hidden_values_goes_first():
    for value in ("secret", "secret-2"):
        redact.hide(value)
    assert redact_line("a secret-2 b secret c") == "a *** b *** c"
