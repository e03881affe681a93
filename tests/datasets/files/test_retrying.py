"""Trying again: what may pass, for as long as one is patient, and told each time; what will not is told at once."""

import errno
import os

import pytest

from datasets.files import notices, retrying
from datasets.files.errors import (
    ENDPOINTS,
    PASSING_ERRNOS,
    REMEDIES,
    NothingThere,
    StorageError,
    StoreAway,
    StoreRefuses,
)
from datasets.files.notices import Notice, PassedOver, Retry
from datasets.files.retrying import MOST_PAUSE_S, PATIENCE, TRIES, persistently

SLOW_DOWN = "When uploading object: AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate."


class Request:
    """Fails with these errors, one after the other, and then succeeds."""

    def __init__(self, *failures: Exception) -> None:
        self.made = 0
        self._failures = list(failures)

    def __call__(self) -> str:
        self.made += 1
        if self._failures:
            raise self._failures.pop(0)
        return "answer"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses so far; nobody waits for them."""
    pauses: list[float] = []
    monkeypatch.setattr(retrying.time, "sleep", pauses.append)
    monkeypatch.setattr(retrying.time, "monotonic", lambda: 1000 + sum(pauses))
    return pauses


@pytest.fixture
def heard() -> list[Notice]:
    return []


@pytest.mark.parametrize("number", sorted(PASSING_ERRNOS))
def test_what_may_pass_is_tried_again_and_told(clock, heard, number):
    request = Request(OSError(number, os.strerror(number)), OSError(SLOW_DOWN), ConnectionResetError("reset"))
    with notices.heard_by(heard.append):
        assert persistently("s3://bucket/x", request) == "answer"
    assert request.made == 4
    assert [(type(notice), notice.path) for notice in heard] == [(Retry, "s3://bucket/x")] * 3
    assert "SLOW_DOWN (Please reduce your request rate)" in str(heard[1])


@pytest.mark.parametrize("number", sorted(REMEDIES))
def test_what_will_not_pass_is_one_sentence_at_once(clock, heard, number):
    request = Request(OSError(number, os.strerror(number)))
    with notices.heard_by(heard.append), pytest.raises(StoreRefuses) as caught:
        persistently("/root/x", request)
    assert (request.made, clock, heard) == (1, [], [])
    assert caught.value.errno == number
    assert str(caught.value) == f"/root/x: {REMEDIES[number]}"


def test_a_missing_file_is_missing(clock):
    with pytest.raises(FileNotFoundError, match="/root/x: there is no such file") as caught:
        persistently("/root/x", Request(FileNotFoundError(errno.ENOENT, "No such file", "/root/x")))
    assert isinstance(caught.value, NothingThere)


def test_an_error_of_the_program_is_left_alone(clock):
    with pytest.raises(ValueError, match="a bug"):
        persistently("/root/x", Request(ValueError("a bug")))


@pytest.mark.parametrize("patience", [1.0, 10.0, 300.0])
def test_patience_has_an_end(clock, monkeypatch, patience):
    monkeypatch.setenv(PATIENCE, str(patience))
    request = Request(*[OSError(SLOW_DOWN) for _ in range(1000)])
    with pytest.raises(StoreAway, match=rf"x: .* kept failing for {patience:.0f} s \({'[0-9]+'} tries\): SLOW_DOWN"):
        persistently("x", request)
    assert sum(clock) == pytest.approx(patience)
    assert len(clock) == request.made - 1


@pytest.mark.parametrize(
    ("path", "endpoint", "hinted"),
    [("s3://b/x", None, True), ("s3://b/x", "http://store:8333", False), ("/root/x", None, False)],
)
def test_who_has_not_said_whose_store_it_is_hears_that_amazon_was_asked(clock, monkeypatch, path, endpoint, hinted):
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    refused = OSError("When listing: AWS Error ACCESS_DENIED during ListObjectsV2 operation: Access Denied.")
    for request in (Request(*[OSError(SLOW_DOWN) for _ in range(1000)]), Request(refused)):
        with pytest.raises(StorageError) as caught:
            persistently(path, request)
        assert ("since AWS_ENDPOINT_URL is not set" in str(caught.value)) == hinted


def test_even_who_has_no_patience_tries_thrice(clock, monkeypatch):
    monkeypatch.setenv(PATIENCE, "0")
    request = Request(*[OSError(SLOW_DOWN) for _ in range(9)])
    with pytest.raises(StoreAway):
        persistently("x", request)
    assert (request.made, sum(clock)) == (TRIES, 0)


def test_pauses_grow_and_differ(clock, monkeypatch):
    monkeypatch.setenv(PATIENCE, "1000")
    every = []
    for _ in range(20):
        persistently("x", Request(*[OSError(SLOW_DOWN) for _ in range(8)]))
        every.append(clock.copy())
        clock.clear()
    for number, pauses in enumerate(zip(*every, strict=True)):
        most = min(MOST_PAUSE_S, 0.2 * 2**number)
        assert all(most / 2 <= pause <= most for pause in pauses)
        assert len(set(pauses)) > 10  # so that those who failed together do not come back together


def test_requests_in_a_request_are_waited_for_once(clock, monkeypatch):
    monkeypatch.setenv(PATIENCE, "10")
    inner = Request(*[OSError(SLOW_DOWN) for _ in range(1000)])
    with pytest.raises(StoreAway):
        persistently("outer", lambda: persistently("inner", inner))
    assert sum(clock) == pytest.approx(10)


def test_who_hears_may_end_the_wait(clock):
    def tired(notice: Notice) -> None:
        raise KeyboardInterrupt

    with notices.heard_by(tired), pytest.raises(KeyboardInterrupt):
        persistently("x", Request(OSError(SLOW_DOWN)))


def test_a_notice_that_nobody_hears_is_logged(clock, caplog):
    persistently("s3://bucket/x", Request(OSError(SLOW_DOWN)))
    notices.tell(PassedOver("/root/.DS_Store", "none of our files"))
    assert "s3://bucket/x: SLOW_DOWN" in caplog.text
    assert "passed over /root/.DS_Store: none of our files" in caplog.text


def test_patience_is_for_the_time_of_a_block_and_for_children(monkeypatch):
    monkeypatch.delenv(PATIENCE, raising=False)
    with retrying.patient(300):
        assert retrying.patience_s() == 300
        assert retrying.environment() == {PATIENCE: "300"}
        assert os.environ[PATIENCE] == "300"
    assert PATIENCE not in os.environ
    monkeypatch.setenv(PATIENCE, "7")
    with pytest.raises(StorageError), retrying.patient(300):
        raise StorageError(None, "over", "x")
    assert retrying.patience_s() == 7
