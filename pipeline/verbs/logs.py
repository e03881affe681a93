"""`logs STEP`: what a step of a run said, or a rank of its trainings, also while it says it."""

import re
import sys
import time

from datasets.files import storage
from pipeline.errors import UsageError, nearest
from pipeline.plan import recorded
from pipeline.settings.words import Words
from pipeline.store import log_files
from pipeline.terminal import printable

POLL_S = 2.0


def handle(words: Words) -> None:
    """Print a log; with `--follow` until its step has ended.

    Raises:
        UsageError: no such step, run or rank.
    """
    if len(words.rest) != 1:
        raise UsageError(
            "logs needs the name of a step or of its artifact, for example: python -m pipeline logs train_c, or logs "
            "stage_c, as `status` lists it"
        )
    root = storage.absolute(words.root)
    run, output = _found(root, words.rest[0], words.own.get("run"))
    tail = None
    while True:
        at_work = words.follow and _at_work(root, run, output)
        newest = _path(log_files.of_step(root, run, output), words.rank)
        if tail is None or newest != tail.path:  # another attempt has begun
            tail = log_files.Tail(newest)
        sys.stdout.write(printable(tail.read()))
        sys.stdout.flush()
        if not at_work:
            return
        time.sleep(POLL_S)


def _found(root: str, name: str, wanted: str | None) -> tuple[str, str]:
    """The last run with a step of this name, or that makes an artifact of this name; and the artifact's name."""
    runs = [recorded.record(root, wanted)] if wanted is not None else recorded.records(root)
    known: set[str] = set()
    for run in sorted(runs, key=lambda run: str(run["id"]), reverse=True):  # they are called by the time of their start
        for output, step in reversed(run["steps"].items()):
            if name in (output, step.get("step")):
                return run["id"], output
            known |= {output, str(step.get("step", output))}
    has = f"there are {', '.join(sorted(known))}" if known else "nothing has been run there yet"
    raise UsageError(f"logs {name}: no run in {root} has such a step{nearest(name, known)}; {has}")


def _path(step_log: str, rank: int | None) -> str:
    if rank is None:
        return step_log
    logs = {number: path for (_, number), path in sorted(log_files.ranks(step_log).items())}  # of the last attempt
    if rank not in logs:
        has = f"its ranks are {', '.join(map(str, logs))}" if logs else "it has no ranks, or they have not begun"
        raise UsageError(f"--rank {rank}: {re.sub('.*/', '', step_log)} has no such rank; {has}")
    return logs[rank]


def _at_work(root: str, run: str, output: str) -> bool:
    """Whether the step may still say something."""
    return recorded.record(root, run)["steps"].get(output, {}).get("state") == "running"
