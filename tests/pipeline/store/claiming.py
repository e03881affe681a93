"""What tests of claims have in common: a claim, its files, and a clock."""

import json
import time
from collections.abc import Callable
from typing import Any

from datasets.files import storage
from pipeline.store import claims
from pipeline.store.artifacts import Fingerprint
from pipeline.store.claims import Pace

PRINT = Fingerprint("train_a", 1, {"lr": 0.1}, {})
WHAT = claims.artifact("stage_a", PRINT.digest)


class Time:
    """A clock that goes on when somebody sleeps, and what happens then."""

    def __init__(self, happens: Callable[[float], None] = lambda now: None):
        self.now, self.happens = 0.0, happens

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.happens(self.now)


def file_of(root: str, number: int) -> str:
    return f"{root}/claims/{WHAT}/{number:06d}.json"


def told(root: str, number: int) -> dict[str, Any]:
    return json.loads(storage.read(file_of(root, number)))


def hold(root: str, clock: Any = time, say: Callable[[str], Any] = print, **paces: float) -> Any:
    return claims.hold(root, WHAT, say, pace=Pace(clock=clock, **paces))
