"""What nobody else gets to see: secrets by their keys, in URLs, and from the environment; and what stays."""

import json
import logging
import pickle
import subprocess
import sys
from typing import Any

import pytest
from rich.table import Table

from datasets.files import filesystems, notices, storage
from pipeline import __main__ as main
from pipeline import terminal
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
    [
        "token",
        "hub_token",
        "hubToken",
        "hub-token",
        "api.key",
        "secretKey",
        "secrets",
        "passphrase",
        "aws_access_key",
        "X-Amz-Signature",
        "x-amz-credential",
        "sig",
        "AWSAccessKeyId",
        "db_pwd",
        "Authorization",
        "secret_names_key",
        "name_of_token",
    ],
)
def test_values_of_telling_keys_are_left_out_and_all_below_them(key):
    assert redact.redact({key: "x", "a": {key: {"b": ["x", 1]}}, "c": [{key: 2}]}) == {
        key: "***",
        "a": {key: {"b": ["***", "***"]}},
        "c": [{key: "***"}],
    }
    assert redact_text(f"{key}=x") == f"{key}=***"
    assert redact.redact({key: None}) == {key: None}


@pytest.mark.parametrize(
    "key",
    [
        "tokenizer",
        "tokens",
        "key",
        "keys",
        "monkey",
        "secretary",
        "passed",
        "signal",
        "significant",
        "secret_name",
        "pullSecretName",
    ],
)
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
        ("HTTPS://USER:PW@HOST/A?X-AMZ-SIGNATURE=S", "HTTPS://***@HOST/A?***"),
        (
            "http://u:p@ss@h/x, http://u:q@h/y?a=1 and s3://K:S/E@C@b/z",
            "http://***@h/x, http://***@h/y?*** and s3://***@b/z",
        ),
        ("https://h/#access_token=s", "https://h/#access_token=***"),
        ("hub_token=s: no such thing", "hub_token=*** no such thing"),
        ("s3://b/x%3FX-Amz-Signature=s&a=1&sig=s", "s3://b/x%3FX-Amz-Signature=***&a=1&sig=***"),
        (
            "h/?to=https%3A%2F%2Fu%3Ap%40h%2Fx%3FX-Amz-Signature%3Ds%26a%3D1",
            "h/?to=https%3A%2F%2F***%40h%2Fx%3FX-Amz-Signature%3D***%26a%3D1",
        ),
        ("a%252F%252Fu%253Ap%2540h%253Fsig%253Ds", "a%252F%252F***%2540h%253Fsig%253D***"),
        ('{"uri": "https://h/x?k=1", "rows": 2}', '{"uri": "https://h/x?***", "rows": 2}'),
        ("s3://b/a?b/artifacts/stage_c/0123456789abcdef/w", "s3://b/a?***"),
        ("https://h/x?to=/artifacts/a&k=canary", "https://h/x?***"),
        ("http://[::1]:9000/b/a@b", "http://[::1]:9000/b/a@b"),
        ("PWD=/srv/me ok", "PWD=/srv/me ok"),
        ("hub_token='can ary' ok", "hub_token=*** ok"),
        ('f(token="canary", n=1)', "f(token=***, n=1)"),
        ("f(token=can,ary,n, seed=1)", "f(token=***, seed=1)"),
        ("password=can&ary;x,y; password=can,ary", "password=***; password=***"),
        ("sig=can&ary&seed=1&sig=s%26ary%26seed%3D1", "sig=***&seed=1&sig=***%26seed%3D1"),
        ("{'password': 'can ary', 'n': 1}", "{'password': ***, 'n': 1}"),
        ('{"hub_token": "canary"}', '{"hub_token": ***}'),
        ('token="secret=can ary" ok', "token=*** ok"),
        ("Authorization: Bearer canary", "Authorization: Bearer ***"),
        ("data.token: there is no such key", "data.token: there is no such key"),
        ("http://127.0.0.1:5000/#/runs?compareRunsMode=CHART", "http://127.0.0.1:5000/#/runs?compareRunsMode=CHART"),
    ],
)
def test_of_urls_passwords_and_queries_are_left_out(text, left):
    assert redact_line(text) == left
    assert redact.redact({"a": [text]}) == {"a": [left]}


@pytest.mark.parametrize(
    ("path", "left"),
    [
        ("/s/lr=1,sig=5/runs/artifacts/stage_c/0123456789abcdef/w", None),
        ("s3://b/a?token=1/artifacts/stage_c/0123456789abcdef/w", None),
        ("s3://K:canary@b/w", "s3://***@b/w"),
        ("https://u:canary@h/w?X-Amz-Signature=canary", "https://***@h/w?***"),
    ],
)
def test_a_path_keeps_its_names(path, left):
    assert redact.redact_path(path) == (left or path)


@pytest.mark.parametrize(
    ("value", "held"),
    [("s3://K:S@b/x", True), (["a", {"b": "http://u:p@h"}], True), ("http://h:80/a@b", False), (7, False)],
)
def test_a_password_in_a_uri_is_found_however_deep(value, held):
    assert holds_password(value) is held


def test_a_command_line_is_told_for_a_shell_without_secrets():
    assert (
        redact.redact_command("run 'out=a b' sig=s from='https://u:p@h/x?y=1'")
        == "run 'out=a b' 'sig=***' 'from=https://***@h/x?***'"
    )


@pytest.mark.parametrize("call", [storage.read, storage.listing, storage.content_tag])
@pytest.mark.parametrize(
    "uri",
    [
        "s3://nowhere/x?X-Amz-Signature=canary&sig=canary", "S3://canary:canary@nowhere/x", "nothing://u:canary@h/x?canary",
        "http://canary:canary@127.0.0.1:1/x.parquet?X-AMZ-SIGNATURE=canary",
    ],
)  # fmt: skip
def test_errors_of_all_clients_are_told_without_secrets(call, uri, monkeypatch, capsys, caplog):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://u:canary@127.0.0.1:1")
    monkeypatch.setenv("WUERSTCHEN_STORAGE_PATIENCE_S", "0")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    filesystems.forget_clients()
    with pytest.raises(Exception) as caught, notices.heard_by(terminal.Notices()):  # noqa: PT011 -- of any library
        call(uri)
    filesystems.forget_clients()
    terminal.console.print(f"error: {caught.value}", markup=False)
    terminal.out.print(f"a run would stop at once: {caught.value}")
    lines = Table("found")
    lines.add_row(str(caught.value))
    terminal.print_table(lines)
    main._show_traceback(caught.type, caught.value, caught.tb)
    said = capsys.readouterr()
    assert "error: " in said.err
    assert "Traceback" in said.err
    assert "***" in said.err + said.out
    assert "canary" not in (said.err + said.out).lower()


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


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"hub_token": "x", "tokens": 77, "tokenizer": "bpe"},
            {"hub_token": "***", "tokens": 77, "tokenizer": "bpe"},
        ),
        (
            {"aws": {"secretAccessKey": "x", "region": "eu"}},
            {"aws": {"secretAccessKey": "***", "region": "eu"}},
        ),
        ({"credentials": {"user": "me", "pass": "x"}}, {"credentials": {"user": "***", "pass": "***"}}),
        ({"password": None, "api-key": ["x", "y"]}, {"password": None, "api-key": ["***", "***"]}),
        ({"urls": ("https://a.b/c?X-Amz-Signature=x#top",)}, {"urls": ["https://a.b/c?***#top"]}),
        ({"uri": "postgresql://me:x@host/db"}, {"uri": "postgresql://***@host/db"}),
        ({"prompt": "what's this, (a) cat? 5 @ a time"}, {"prompt": "what's this, (a) cat? 5 @ a time"}),
    ],
)
def test_secrets_are_taken_out(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert redact.redact(config) == expected
