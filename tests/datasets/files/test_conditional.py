"""Creating what must be new: of two who try, one; on local disks, and on stores with conditional writes and without."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import botocore.exceptions
import fsspec
import pytest

from datasets.files import conditional, s3, storage


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    return request.getfixturevalue("s3_root") if request.param == "s3" else f"memory://conditional-{tmp_path.name}"


def waits(monkeypatch: pytest.MonkeyPatch, meanwhile: Any = lambda: None) -> list[float]:
    """What a put without a condition waits, and what others do meanwhile."""
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        meanwhile()

    monkeypatch.setattr(conditional, "time", SimpleNamespace(sleep=sleep))
    return waited


def test_only_the_first_creates(folder, monkeypatch):
    waited = waits(monkeypatch)
    assert storage.create(b"mine", f"{folder}/a/claim")
    assert not storage.create(b"theirs", f"{folder}/a/claim")
    assert not storage.create(b"mine", f"{folder}/a/claim")
    assert storage.read(f"{folder}/a/claim") == b"mine"
    assert storage.listing(folder) == ["a/claim"]
    assert waited == []  # the condition is the store's


def test_who_comes_between_a_look_and_the_put_wins(folder, monkeypatch):
    """Both have seen that nothing is there."""
    if not storage.is_remote(folder):
        pytest.skip("locally, look and creation are one")
    exists = storage.exists

    def slowly(path: str) -> bool:
        found = exists(path)
        storage.publish(b"theirs", path)
        return found

    monkeypatch.setattr(storage, "exists", slowly)
    assert not storage.create(b"mine", f"{folder}/claim")
    assert storage.read(f"{folder}/claim") == b"theirs"


def test_what_is_there_is_never_overwritten_by_a_store_that_heeds_no_condition(folder, monkeypatch):
    monkeypatch.setattr(conditional, "put", lambda data, uri: pytest.fail("put without a look"))
    storage.publish(b"theirs", f"{folder}/claim")
    assert not storage.create(b"mine", f"{folder}/claim")


@pytest.mark.parametrize("theirs", [None, b"theirs"])
def test_without_conditions_a_second_look_after_a_while_tells_who_was_first(tmp_path, monkeypatch, theirs):
    """Another one who has looked at the same time puts theirs while we wait: it is theirs, and we see it."""
    path = f"memory://second-look-{tmp_path.name}/claim"

    def meanwhile() -> None:
        if theirs:
            storage.publish(theirs, path)

    waited = waits(monkeypatch, meanwhile)
    monkeypatch.setattr(conditional, "put", lambda data, uri: None)
    assert storage.create(b"mine", path) == (theirs is None)
    assert waited == [conditional.SETTLE_S]
    assert storage.read(path) == (theirs or b"mine")


def test_a_put_of_ours_whose_answer_was_lost_is_ours(folder, monkeypatch):
    put = conditional.put

    def twice(data: bytes, uri: str) -> bool | None:
        put(data, uri)
        return put(data, uri)

    monkeypatch.setattr(conditional, "put", twice)
    assert storage.create(b"mine", f"{folder}/claim")


def test_what_is_gone_again_was_not_created(tmp_path, monkeypatch):
    monkeypatch.setattr(conditional, "put", lambda data, uri: False)
    assert not storage.create(b"mine", f"memory://gone-{tmp_path.name}/claim")


def test_a_store_that_takes_a_condition_and_heeds_it_not_is_found_out(tmp_path, monkeypatch):
    uri, memory = f"memory://heedless-{tmp_path.name}/claim", fsspec.filesystem("memory")
    pipe = memory.pipe_file
    monkeypatch.setattr(type(memory), "pipe_file", lambda _, path, data, mode="overwrite": pipe(path, data))
    assert conditional.put(b"mine", uri) is None
    waited = waits(monkeypatch)
    assert storage.create(b"mine", f"{uri}2")
    assert waited == [conditional.SETTLE_S]


@pytest.mark.parametrize("error", [NotImplementedError, TypeError, ValueError])
def test_a_store_that_knows_no_condition_is_not_asked_twice(tmp_path, monkeypatch, error):
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", refuse)
    assert conditional.put(b"mine", f"memory://none-{tmp_path.name}/claim") is None


def test_googles_store_is_not_asked():
    assert conditional.put(b"mine", "gs://bucket/claim") is None


class Answers:
    """An S3 that answers puts with these, in their order."""

    def __init__(self, *answers: int | Exception):
        self.answers = list(answers)

    def put_object(self, **asked: Any) -> None:
        assert asked["IfNoneMatch"] == "*"
        assert (asked["Bucket"], asked["Key"], asked["Body"]) == ("bucket", "a/claim", b"mine")
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if answer != 200:
            code = {501: "NotImplemented", 400: "NotImplemented", 503: "SlowDown", 403: "AccessDenied"}.get(
                answer, "Other"
            )
            told = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": answer}}
            raise botocore.exceptions.ClientError(told, "PutObject")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answers", "put"),
    [
        ([200, 412], True),
        ([412], False),
        ([409, 200, 412], True),
        ([409, 412], False),
        ([200, 200], None),
        ([501], None),
        ([400], None),
    ],
)
def test_what_s3_answers_is_understood(monkeypatch, answers, put):
    client = Answers(*answers)
    monkeypatch.setattr(s3, "s3_client", lambda: client)
    assert conditional.put(b"mine", "s3://bucket/a/claim") is put
    assert client.answers == []


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ([503], ConnectionError),
        ([429], ConnectionError),
        ([409] * s3.PUTS, ConnectionError),
        ([botocore.exceptions.EndpointConnectionError(endpoint_url="http://x")], ConnectionError),
        ([403], OSError),
    ],
)
def test_what_s3_refuses_is_an_error_of_the_storage(monkeypatch, answers, kind):
    monkeypatch.setattr(s3, "s3_client", lambda: Answers(*answers))
    with pytest.raises(OSError, match=r"during PutObject|endpoint URL") as caught:
        conditional.put(b"mine", "s3://bucket/a/claim")
    assert isinstance(caught.value, ConnectionError) == (kind is ConnectionError)
