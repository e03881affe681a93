"""Trying again what can pass: a busy store, a broken connection, a server that is away for a while.

Each time is told (`notices.Retry`). How long one waits is the process's own, and its children's: a person at a prompt
wants to hear soon, a run of weeks must outlast a store that is started again.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from datasets.files import notices
from datasets.files.errors import StorageError, StoreAway, may_pass, reason_of, told, whose

T = TypeVar("T")
PATIENCE = "WUERSTCHEN_STORAGE_PATIENCE_S"  # the environment variable that workers inherit
AT_A_PROMPT_S = 10.0
TRIES = 3  # at least, however long each of them takes
FIRST_PAUSE_S, MOST_PAUSE_S = 0.2, 5.0
_dice = random.Random()  # not the shared one, of which a seed may make something


def patience_s() -> float:
    """Seconds from a request's first failure after which it is given up."""
    return float(os.environ.get(PATIENCE, AT_A_PROMPT_S))


def set_patience(seconds: float) -> None:
    """Set it for this process and those that it starts from now on."""
    os.environ[PATIENCE] = f"{seconds:g}"


def environment() -> dict[str, str]:
    """What tells it to workers on other machines."""
    return {PATIENCE: f"{patience_s():g}"}


@contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Set it for the time of the block."""
    before = os.environ.get(PATIENCE)
    set_patience(seconds)
    try:
        yield
    finally:
        if before is None:
            del os.environ[PATIENCE]
        else:
            os.environ[PATIENCE] = before


def persistently(path: str, request: Callable[[], T]) -> T:
    """What `request` returns, made again while it fails for a reason that may pass; it must not mind being made twice.

    Pauses grow from 0.2 s to 5 s, each between half and all of that, so that many workers do not come back at once.

    Raises:
        StoreAway: it failed for longer than `patience_s`, and at least three times.
        StorageError: it failed for a reason that will not pass.
    """
    tries, began = 0, 0.0
    while True:
        try:
            return request()
        except StorageError:  # of a request within this one, which has been waited for
            raise
        except OSError as error:
            if not may_pass(error):
                raise told(error, path) from error
            tries, began = tries + 1, began or time.monotonic()
            waited = time.monotonic() - began
            if tries >= TRIES and waited >= patience_s():
                reason = (
                    f"the storage kept failing for {waited:.0f} s ({tries} tries): {reason_of(error)}{whose(path)}; "
                    "start the same command again once it works"
                )
                raise StoreAway(error.errno, reason, path) from error
            pause = _dice.uniform(0.5, 1) * min(MOST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(tries - 1, 10))
            pause = min(pause, max(0.0, patience_s() - waited))
            notices.tell(notices.Retry(path, reason_of(error), pause))
        time.sleep(pause)
