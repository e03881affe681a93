"""The first Ctrl-C: heard in pauses, and not held up by a store that is away."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from datasets.files import retrying
from datasets.files.errors import StoreAway
from pipeline.errors import Interrupted, exit_code
from pipeline.run.stopping import STOPPING_S, Stop, pause, signals


def test_a_signal_ends_a_pause(monkeypatch):
    asked = []

    def stopped() -> Interrupted | None:
        asked.append(True)
        return Interrupted(signal.SIGINT) if len(asked) == 3 else None

    pause(3600, stopped)
    assert len(asked) == 3


def test_a_pause_that_nobody_ends_takes_its_time(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr("pipeline.run.stopping.time.sleep", pauses.append)
    monkeypatch.setattr("pipeline.run.stopping.time.monotonic", lambda: sum(pauses))
    pause(1.5, lambda: None)
    assert sum(pauses) == pytest.approx(1.5)


def test_a_stop_shortens_the_wait_for_a_store_and_is_what_is_told():
    with pytest.raises(Interrupted) as caught, retrying.patient(300), signals():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        assert retrying.patience_s() == STOPPING_S
        raise StoreAway(None, "the storage kept failing", "s3://bucket/x")
    assert exit_code(caught.value) == 128 + signal.SIGTERM


@pytest.fixture
def terminal() -> Iterator[None]:
    """As a shell starts it, also where these tests were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("terminal")
def test_a_closed_terminal_asks_for_a_clean_end_unless_nohup_keeps_it_away():
    with pytest.raises(Interrupted) as caught, signals() as stop:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGHUP)
        stop.raise_if_asked()
    assert exit_code(caught.value) == 128 + signal.SIGHUP
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop() is None


def test_without_a_stop_the_store_is_what_is_told():
    with pytest.raises(StoreAway), retrying.patient(300), signals():
        raise StoreAway(None, "the storage kept failing", "s3://bucket/x")


def test_handlers_are_put_back_and_other_threads_have_none():
    before = signal.getsignal(signal.SIGINT)
    with signals() as stop:
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    found: list[Stop] = []

    def elsewhere() -> None:
        with signals() as stop:
            found.append(stop)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found[0]() is None
    assert stop() is None


def test_where_nothing_is_worth_saving_the_first_signal_ends_it_whatever_a_library_makes_of_it(capsys):
    def swallows() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException as error:
            raise ValueError("a library's own") from error

    def passes_over() -> None:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGINT)

    for work in (lambda: os.kill(os.getpid(), signal.SIGINT), swallows, passes_over):
        with pytest.raises(Interrupted) as caught, signals() as stop, stop.at_once():
            work()
        assert exit_code(caught.value) == 130
    assert capsys.readouterr().err == ""  # the error is the one sentence


def test_a_signal_of_before_is_heard_there_and_one_of_after_waits(capsys):
    with pytest.raises(Interrupted), signals() as stop:  # noqa: PT012
        with stop.at_once():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert "saving and stopping" in capsys.readouterr().err
        with stop.at_once():
            pytest.fail("it has been asked to stop")


def test_other_errors_of_such_a_block_stay_what_they_are():
    for error in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, signals() as stop, stop.at_once():
            raise error
        assert caught.value is error
