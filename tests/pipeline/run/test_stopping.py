"""The first Ctrl-C: heard in pauses, and not held up by a store that is away."""

import os
import signal
import threading

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
