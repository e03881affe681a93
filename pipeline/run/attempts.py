"""A step's attempts: failures of the infrastructure are tried again, for as long as it gets further between them."""

import importlib
import logging
from collections.abc import Callable
from typing import TypeVar

from datasets.files.errors import StoreRefuses
from pipeline.errors import Grows, InfrastructureError, Preempted, RetriesExhausted
from pipeline.run.stopping import pause
from pipeline.steps.build import Build, Facts
from pipeline.terminal import console

log = logging.getLogger(__name__)
T = TypeVar("T")


def until_done(call: str, build: Build, finish: Callable[[Facts], T], retries: int) -> T:
    """Call the step's function (`module:function`), and `finish` with what it returns.

    Failures of the infrastructure are tried again, `retries` times in a row at most and with a growing pause. Where the
    step got further than ever before since the last one, they are counted anew: in weeks there are many, and each is
    got over. Nodes that were taken away with notice do not count: the step goes on at once on those that are left.

    Raises:
        RetriesExhausted: it failed too often in a row; the message tells the first of these errors, and the last.
    """
    module, function = call.split(":")
    failures: list[Exception] = []
    while True:
        try:
            build.claim.fence()
            build.report.begin_attempt()
            return finish(getattr(importlib.import_module(f"pipeline.steps.{module}"), function)(build))
        except StoreRefuses:  # no room, no rights: somebody has to do something first
            raise
        except Grows as error:
            log.info("%s begins again: %s", call, error)
            console.print(f"{function}: {error}", style="yellow", markup=False)
        except Preempted as error:
            log.warning("%s was preempted: %s", call, error)
            build.interruptions.preemptions += 1
            build.interruptions.write(build.building)
            console.print(f"{function}: {error}; going on elsewhere", style="yellow", markup=False)
        except (InfrastructureError, OSError) as error:
            if build.report.got_further():
                failures.clear()
            failures.append(error)
            log.exception("attempt %d of %s failed", len(failures), call)
            if len(failures) > retries:
                raise RetriesExhausted(f"{function} failed {_told(failures)}") from failures[0]
            seconds = 2.0 ** (len(failures) - 1)
            console.print(f"{function}: {error}; trying again in {seconds:.0f} s", style="yellow", markup=False)
            pause(seconds, build.stopped)
        build.raise_if_stopped()


def _told(failures: list[Exception]) -> str:
    """How often, and why: later errors may only come of the first."""
    first, last = str(failures[0]), str(failures[-1])
    return f"{len(failures)} times; the last error was: {last}" + (f"; the first: {first}" if first != last else "")
