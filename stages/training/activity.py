"""What a rank of a training does at the moment, and where its time went."""

import time
from collections import defaultdict

STARTING = "starting"
READING = "waiting for the batch"
ENCODING = "encoding the batch"
FORWARD = "forward pass"
BACKWARD = "backward pass, and exchanging gradients"
UPDATING = "updating the weights"
COMPARING = "waiting for the device and the other ranks"
VALIDATING = "validating"
SHOWING = "drawing the panel"
SAVING = "saving the state"
LOGGING = "logging"


class Activity:
    """Told by the training loop what it begins to do; asked by it where the time went, and by others what it does."""

    def __init__(self) -> None:
        self._now = (0, STARTING, time.monotonic())  # replaced as a whole: another thread reads it
        self._saved_more = 0.0
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._in_all: defaultdict[str, float] = defaultdict(float)

    def begin(self, step: int, doing: str) -> None:
        """Begin to do something for the step that comes after `step` steps."""
        now = time.monotonic()
        _, before, since = self._now
        self._seconds[before] += now - since
        self._in_all[before] += now - since
        self._now = (step, doing, now)

    def now(self) -> tuple[int, str, float]:
        """Steps done, what is being done, and for how many seconds; of saving, since it last got further."""
        step, doing, since = self._now
        return step, doing, time.monotonic() - (max(since, self._saved_more) if doing == SAVING else since)

    def saves_more(self) -> None:
        """A thread that saves the state has got further."""
        self._saved_more = time.monotonic()

    def seconds_in_all(self) -> dict[str, float]:
        """Seconds by what was done since it was made, with those of what is being done."""
        _, doing, since = self._now
        return {**self._in_all, doing: self._in_all.get(doing, 0.0) + time.monotonic() - since}

    def take_seconds(self) -> dict[str, float]:
        """Seconds by what was done since the last call; what is being done counts when it is over."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken
