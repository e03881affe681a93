"""Attempts at a step: what is tried again, how often, and what is told in the end."""

import errno
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from datasets.files.errors import StoreAway, StoreRefuses
from datasets.files.fence import unfenced
from pipeline.errors import (
    ClaimLost,
    InfrastructureError,
    Interrupted,
    Preempted,
    RetriesExhausted,
    exit_code,
)
from pipeline.run import attempts
from pipeline.run.step_log import StepReporter
from pipeline.steps import fetch
from pipeline.steps.build import Build


def attempt(
    monkeypatch: pytest.MonkeyPatch,
    failures: list[Exception],
    signal_number: int | None = None,
    finish: Any = lambda facts: facts,
    fence: Any = unfenced,
    reached: Sequence[int] = (),
) -> int:
    """Attempts that `fetch` took when it fails with these errors first, and a signal comes meanwhile; each of them has
    `reached` so many steps."""
    monkeypatch.setattr(attempts, "pause", lambda *_: None)
    calls = 0

    def fails_first(build: Build) -> str:
        nonlocal calls
        calls += 1
        if calls <= len(reached):
            build.report.progress(reached[calls - 1], 1000, "steps")
        if calls <= len(failures):
            raise failures[calls - 1]
        return "facts"

    monkeypatch.setattr(fetch, "fetch", fails_first)
    build = object.__new__(Build)
    object.__setattr__(build, "stopped", lambda: signal_number and Interrupted(signal_number))
    object.__setattr__(build, "interruptions", SimpleNamespace(preemptions=0, write=lambda _: None))
    object.__setattr__(build, "path", "")
    object.__setattr__(build, "claim", SimpleNamespace(fence=fence))
    object.__setattr__(build, "report", StepReporter(SimpleNamespace(done=0, update=lambda *_: None), None, []))
    assert attempts.until_done("fetch:fetch", build, finish, retries=2) == "facts"
    return calls


def test_a_failure_of_the_infrastructure_is_tried_again_and_stands_in_the_log(monkeypatch, caplog):
    assert attempt(monkeypatch, [InfrastructureError("node died"), OSError("disk gone")]) == 3
    assert [line.getMessage() for line in caplog.records] == [f"attempt {n} of fetch:fetch failed" for n in (1, 2)]
    assert [str(line.exc_info[1]) for line in caplog.records if line.exc_info] == ["node died", "disk gone"]


def test_a_commit_that_fails_or_finds_files_missing_is_an_attempt_that_failed(monkeypatch):
    errors = iter([OSError("the store is away"), InfrastructureError("a file is missing")])

    def finish(facts: Any) -> Any:
        if error := next(errors, None):
            raise error
        return facts

    assert attempt(monkeypatch, [], finish=finish) == 3


def test_a_run_whose_claim_is_lost_does_not_try_again(monkeypatch):
    """A rank that noticed it first may have failed with something else."""
    fences = iter([None, ClaimLost("gone")])

    def fence() -> None:
        if error := next(fences):
            raise error

    with pytest.raises(ClaimLost) as caught:
        attempt(monkeypatch, [InfrastructureError("a rank ended")] * 2, fence=fence)
    assert exit_code(caught.value) == 4
    with pytest.raises(ClaimLost):
        attempt(monkeypatch, [ClaimLost("gone")])


def test_a_node_taken_away_with_notice_is_no_failure_but_is_told(monkeypatch, caplog):
    assert attempt(monkeypatch, [InfrastructureError("again")] + [Preempted("away")] * 5 + [OSError("again")]) == 8
    assert caplog.text.count("fetch:fetch was preempted: away") == 5


def test_a_signal_ends_the_attempts(monkeypatch):
    with pytest.raises(Interrupted):
        attempt(monkeypatch, [InfrastructureError("the stop hit a rank")], signal_number=15)


def test_too_many_failures_end_with_exit_code_5(monkeypatch):
    with pytest.raises(RetriesExhausted, match="failed 3 times; the last error was: again") as caught:
        attempt(monkeypatch, [InfrastructureError("again")] * 3)
    assert exit_code(caught.value) == 5


def test_the_users_own_errors_are_never_tried_again(monkeypatch):
    with pytest.raises(ValueError, match="wrong"):
        attempt(monkeypatch, [ValueError("wrong"), AssertionError("must not be reached")])


def test_a_disk_without_room_is_not_tried_again(monkeypatch):
    full = StoreRefuses(errno.ENOSPC, "no space is left there", "/root/x")
    with pytest.raises(StoreRefuses) as caught:
        attempt(monkeypatch, [full, AssertionError("must not be reached")])
    assert exit_code(caught.value) == 2


def test_a_store_that_stays_away_uses_up_the_attempts(monkeypatch):
    away = StoreAway(None, "the storage kept failing", "s3://bucket/x")
    with pytest.raises(RetriesExhausted, match="the last error was: s3://bucket/x: the storage kept failing"):
        attempt(monkeypatch, [away] * 3)
    assert exit_code(away) == 5


def again(count: int) -> list[Exception]:
    return [InfrastructureError(f"failure {number}") for number in range(count)]


def test_a_step_that_gets_further_between_failures_is_tried_for_as_long_as_it_does(monkeypatch):
    """In weeks there are more failures than anybody would allow in a row."""
    assert attempt(monkeypatch, again(20), reached=range(10, 210, 10)) == 21
    with pytest.raises(RetriesExhausted, match="failed 3 times"):
        attempt(monkeypatch, again(20), reached=[10, 20, 30, 30, 25, 40])  # 30 again, and less: the third in a row


def test_what_is_done_again_is_not_further(monkeypatch):
    """Shards with a receipt are told anew by each attempt."""
    report = StepReporter(
        SimpleNamespace(done=0, update=lambda done, *_: setattr(report.screen, "done", done)), None, []
    )
    for further in (True, False, False):
        report.begin_attempt()
        report.advance(60, 100, "images")
        assert report.got_further() == further
    report.advance(10, 100, "images")
    assert report.got_further()


def test_the_first_error_is_told_beside_the_last(monkeypatch):
    """Those after it may only come of it."""
    errors = [InfrastructureError("the disk of node 3 died"), *again(2)]
    told = "failed 3 times; the last error was: failure 1; the first: the disk of node 3 died"
    with pytest.raises(RetriesExhausted, match=told) as caught:
        attempt(monkeypatch, errors)
    assert caught.value.__cause__ is errors[0]
