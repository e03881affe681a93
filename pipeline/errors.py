"""What can go wrong for a user, and the exit code each kind ends with.

0  done
2  UsageError, and every other ValueError: bad config, usage or input; StorageError: a place without room or rights
3  BudgetExceeded: more rows lost or quarantined than the config allows
4  LeaseHeld: another run is building the same artifact; ClaimLost: it has taken it over from this one
5  RetriesExhausted: a step kept failing, or Ray did not start; StoreAway: the root's storage did
6  BudgetSpent: the device-hours of `budget.hours` are used up; what was done is saved
129, 130, 143  Interrupted by SIGHUP, SIGINT or SIGTERM after a clean save; 141 where nobody reads stdout any more
"""

import difflib
from collections.abc import Iterable, Sequence

from datasets.files.errors import StorageError, StoreAway, refusal


class UsageError(ValueError):
    """The command line, the config or an input is wrong; the message names the key or path and the remedy."""


class NotBuilt(UsageError):
    """An artifact of exactly this conf is not there. The command line adds the words of a run that builds it: those of
    the invocation, and `override`."""

    def __init__(self, message: str, override: str | None = None):
        super().__init__(message)
        self.override = override


class BudgetExceeded(RuntimeError):
    """More rows were lost than the configured budget; nothing was committed, and what there is stays.

    The command line adds its words to each of `ways`, a remedy and an override that it needs.
    """

    def __init__(self, message: str, ways: Sequence[tuple[str, str | None]] = ()):
        super().__init__(message)
        self.ways = ways


class LeaseHeld(RuntimeError):
    """Another live process builds, repairs, deletes or reads this artifact; the message says whose it is."""


class ClaimLost(RuntimeError):
    """Another run has taken over what this one was building, as it heard nothing from it; the message says whose."""


class RetriesExhausted(RuntimeError):
    """A step failed more often than `cluster.retries` allows, or Ray did not start."""


class InfrastructureError(RuntimeError):
    """A worker, node or service failed through no fault of the config; worth another try."""


class Preempted(InfrastructureError):
    """A node was taken away, with notice; not a failure, so it is not counted against `cluster.retries`."""


class Grows(InfrastructureError):
    """A training that went on with fewer ranks has saved, for there is room for more; not a failure either."""


class Interrupted(RuntimeError):
    """A signal asked for the end; everything worth keeping has been saved."""

    def __init__(self, signal_number: int):
        super().__init__("interrupted; the same command goes on from here")
        self.exit_code = 128 + signal_number


STOPPED = (Interrupted, KeyboardInterrupt)  # what ends work because somebody asked for it: no failure


class BudgetSpent(Interrupted):
    """`budget.hours` is used up; everything worth keeping has been saved."""

    exit_code = 6

    def __init__(self, spent: float, budget: float):
        RuntimeError.__init__(
            self,
            f"budget.hours={budget:g} is used up: {spent:.4g} device-hours are spent, and what was done is saved; "
            "the same command with a larger budget.hours= goes on from here",
        )


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that is most like another one, if any is."""
    names = sorted(known)
    longer = [name for name in names if word and name.startswith(word)]  # `coco` of coco_captions
    found = longer[:1] or difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


def as_told(error: BaseException) -> BaseException:
    """The error as a person is told of it: in a sentence where the system has refused a file or folder."""
    return refusal(error) if isinstance(error, OSError) else error


def exit_code(error: BaseException) -> int | None:
    """The documented exit code of an error; None for a programming error, which shows its traceback."""
    if isinstance(error, Interrupted):
        return error.exit_code
    table = (
        (ValueError, 2),
        (BudgetExceeded, 3),
        (LeaseHeld, 4),
        (ClaimLost, 4),
        (RetriesExhausted, 5),
        (StoreAway, 5),
        (StorageError, 2),
        (KeyboardInterrupt, 130),
    )
    return next((code for kind, code in table if isinstance(error, kind)), None)
