"""Where the time of a lease went: phases, which sum to all of it.

The first rank of a training tells how many seconds went where since its process began. Steps that an attempt before had
already done are `repeated`, with all that went with them. What nobody told of is `other`: so nothing is lost, and
nothing counts twice.
"""

from collections.abc import Mapping

STARTUP, READING, STEPS, VALIDATION, SAVING = "startup", "reading", "steps", "validation", "saving"
REPEATED, OTHER = "repeated", "other"
PHASES = (STARTUP, READING, STEPS, VALIDATION, SAVING, REPEATED, OTHER)


class Phases:
    """Seconds of one lease by phase, added up from what is told of its job."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._told: Mapping[str, float] = {}
        self._at: dict[str, int] = {}
        self._reached: dict[str, int] = {}

    def goes_on(self, training: str, step: int, reached: int) -> None:
        """A training begins after `step` steps, of which an attempt before had done `reached`."""
        self._at[training], self._reached[training] = step, reached

    def add(self, training: str, step: int, told: Mapping[str, float]) -> None:
        """A training has done `step` steps, and its job has spent so many seconds by phase since its process began."""
        begun = self._at.get(training, 0)
        again = min(step, self._reached.get(training, 0)) - begun
        share = max(0, again) / (step - begun) if step > begun else 0.0
        for phase, seconds in told.items():
            new = max(0.0, seconds - self._told.get(phase, 0.0))
            lost = 0.0 if phase == STARTUP else share * new
            self._seconds[phase] = self._seconds.get(phase, 0.0) + new - lost
            self._seconds[REPEATED] = self._seconds.get(REPEATED, 0.0) + lost
        self._told, self._at[training] = dict(told), step

    def told(self) -> dict[str, float]:
        """Seconds by phase so far, to the millisecond; those of which nothing was told are left out."""
        return {phase: round(self._seconds[phase], 3) for phase in PHASES if self._seconds.get(phase)}


def split(held_s: float, told: Mapping[str, float]) -> dict[str, float]:
    """All of `held_s` seconds by phase: as told, but in all no more than was held; the rest is `other`.

    In whole milliseconds, as they are written, so that they sum to `held_s` exactly.
    """
    left, found = round(1000 * held_s), dict[str, int]()
    for phase in PHASES[:-1]:
        found[phase] = min(left, max(0, round(1000 * told.get(phase, 0.0))))
        left -= found[phase]
    found[OTHER] = left
    return {phase: milliseconds / 1000 for phase, milliseconds in found.items() if milliseconds}
