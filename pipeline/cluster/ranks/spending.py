"""Where a rank's time goes, by the ledger's phases."""

import time

import psutil

from pipeline.store.phases import READING, SAVING, STARTUP, STEPS, VALIDATION
from stages.training import activity
from stages.training.activity import Activity

PHASES = {
    activity.STARTING: STARTUP,
    activity.READING: READING,
    activity.ENCODING: STEPS,
    activity.FORWARD: STEPS,
    activity.BACKWARD: STEPS,
    activity.UPDATING: STEPS,
    activity.COMPARING: STEPS,  # where the device catches up with what it was given
    activity.VALIDATING: VALIDATION,
    activity.SHOWING: VALIDATION,
    activity.SAVING: SAVING,
}


class Spending:
    """Seconds of this process by phase, over the trainings that it does one after the other."""

    def __init__(self) -> None:
        self._made = time.monotonic()
        self._age = max(0.0, time.time() - psutil.Process().create_time())  # when this was made
        self._before = {STARTUP: self._age}
        self._doing: Activity | None = None

    @property
    def age(self) -> float:
        """Seconds since the process began."""
        return self._age + time.monotonic() - self._made

    def follow(self, doing: Activity) -> None:
        """A training begins, which tells what it does."""
        self._before = self.seconds()
        self._doing = doing

    def seconds(self) -> dict[str, float]:
        """By phase so far; what belongs to none is left out."""
        found = dict(self._before)
        for doing, seconds in (self._doing.seconds_in_all() if self._doing else {}).items():
            if doing in PHASES:
                found[PHASES[doing]] = found.get(PHASES[doing], 0.0) + seconds
        return found
