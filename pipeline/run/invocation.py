"""A run: build what the targets need and is missing, in order, each step under a claim, a ledger and a tracker."""

import contextlib
import logging
import sys
import time
from functools import partial

from datasets.files import notices, retrying
from datasets.files.notices import Notice, Retry
from datasets.planning import preview
from pipeline.environment import private_ray, quiet_environment
from pipeline.errors import BudgetExceeded, UsageError
from pipeline.hours.table import beside_paper
from pipeline.plan import budget, obstacles, rivals, training_memory, weights
from pipeline.plan.dag import Planned
from pipeline.plan.wanted import names_of_inputs
from pipeline.run import building
from pipeline.run.last_screen import Summary
from pipeline.run.memory import PeakMemory
from pipeline.run.session import Session
from pipeline.run.stopping import signals
from pipeline.run.writable import check_writable
from pipeline.settings.config import Config
from pipeline.store import earlier
from pipeline.store.artifacts import Look
from pipeline.store.removal_list import check_carried_out
from pipeline.terminal import console

log = logging.getLogger(__name__)


def run(config: Config, conf: str, look: Look, planned: list[Planned], command: str) -> Summary:
    """Build every planned step that is not done; returns what the last screen shows. `look` is what the plan saw."""
    root = look.root
    training_memory.check(planned, config)
    counts = obstacles.ahead(config, planned)
    if found := obstacles.every(config, planned, counts):
        raise UsageError(found[0])
    weights.check(config, planned)
    for remark in rivals.remarks(config, planned):
        console.print(remark, style="yellow", markup=False)
    if counts and (beyond := preview.beyond_budget(counts)):
        raise BudgetExceeded(beyond)
    check_carried_out(root)
    check_writable(root, "root")
    earlier.keep(root, names_of_inputs(config, look, [item.step for item in planned]))
    quiet_environment()
    if config.cluster.address is None:
        private_ray()
    started = time.monotonic()
    summary = Summary(predicted_hours=budget.predicted(planned, config, look.finished(), counts))
    with (
        contextlib.redirect_stdout(sys.stderr),  # Ray tells there of dead workers, but stdout belongs to --json
        retrying.patient(config.cluster.patience_s),
        signals() as stopped,
        notices.heard_by(partial(_hear, summary)),
        PeakMemory() as memory,
        Session(config, conf, look, planned, command, memory, summary, stopped) as session,
    ):
        stopped.watch = session.books.over_budget
        todo = [item for item in planned if item.state != "done"]
        for place, item in enumerate(todo):
            stopped.raise_if_asked()
            if building.came_out_the_same(session, item):
                continue
            if told := obstacles.too_large_batches(config, todo[place:], session.artifacts):  # as far as data are made
                raise UsageError(told)
            building.build(session, item, f"[{place + 1}/{len(todo)}]")
        summary.take(session.artifacts)
        summary.paper = beside_paper(root, session.artifacts.values())
    summary.seconds = time.monotonic() - started
    summary.peak_bytes = memory.peak_bytes
    return summary


def _hear(summary: Summary, notice: Notice) -> None:
    """Log what the storage had to get over, and count it for the last screen."""
    log.warning("%s", notice)
    if isinstance(notice, Retry):
        summary.storage_tries += 1
        summary.storage_reason = notice.reason
