"""MLflow's hours are the ledger's: after a success, a failure, a resume, a forced build, and kills."""

from typing import Any

import pytest

from pipeline.hours.spent import spent
from pipeline.store import ledger
from pipeline.store.phases import REPEATED, STEPS
from pipeline.tracking.projection import hours


def lease(
    name: str, run: str, build: str | None, seconds: float, outcome: str | None, **about: Any
) -> list[dict[str, Any]]:
    common = {"lease": name, "attempt": f"{run}/{about.pop('attempt', 0)}"}
    phases = {"phases": about.pop("phases")} if "phases" in about else {}
    opening = {"step": "train_c", "fingerprint": "abc", "kind": "cpu", "devices": 2, **about}
    start = {"event": "lease_open", **common, **opening, "held_s": 0.0, "time": about.get("opened", 1e9)}
    if build:
        start["build"] = build
    found = [start, {"event": "heartbeat", **common, "held_s": seconds, "time": 1e9 + seconds, **phases}]
    if outcome:
        found.append({"event": "lease_close", **common, "held_s": seconds, "time": 1e9, "outcome": outcome, **phases})
    return found


HISTORIES = {
    "success": lease("a", "1", "x", 3600, "done"),
    "failure and another try": lease("a", "1", "x", 1800, "failed") + lease("b", "1", "x", 3600, "done", attempt=1),
    "an interruption that goes on": lease("a", "1", "x", 60, "interrupted")
    + lease("b", "2", "x", 90, "done", opened=2e9),
    "a forced build": lease("a", "1", "x", 60, "done") + lease("b", "2", "y", 90, "done", opened=2e9),
    "a driver that was killed": lease("a", "1", "x", 60, None) + lease("b", "2", "x", 90, "done", opened=2e9),
    "one that is killed and never goes on": lease("a", "1", "x", 60, None),
    "a ledger that tells no builds": lease("a", "1", None, 60, "done") + lease("b", "2", None, 7, "done", opened=2e9),
}


@pytest.mark.parametrize("events", HISTORIES.values(), ids=HISTORIES)
def test_the_runs_of_commands_and_those_of_steps_add_up_to_the_ledger(events):
    leases = ledger.leases(events)
    total = spent(leases).total / 3600
    commands = [{"wst.kind": "pipeline", "wst.invocation": run} for run in ("1", "2")]
    of_commands = [hours(tags, {}, leases) for tags in commands]
    assert sum(told.get("hours/total", 0.0) for told in of_commands) == pytest.approx(total, rel=1e-12)
    steps = [({"wst.kind": "step", "wst.run": build, "wst.fingerprint": "abc"}, {}) for build in ("x", "y")]
    if all(lease.about.build is None for lease in leases):  # a run for each command, known by that alone
        steps = [({"wst.kind": "step", "wst.run": "?", "wst.fingerprint": "abc"}, parent) for parent in commands]
    of_steps = [hours(tags, parent, leases) for tags, parent in steps]
    assert sum(told.get("hours/total", 0.0) for told in of_steps) == pytest.approx(total, rel=1e-12)


def test_what_failed_and_what_was_repeated_is_told():
    events = lease("a", "1", "x", 3600, "failed") + lease(
        "b", "1", "x", 7200, "done", attempt=1, phases={STEPS: 3600.0, REPEATED: 1800.0}
    )
    told = hours({"wst.kind": "step", "wst.run": "x"}, {}, ledger.leases(events))
    assert told == {
        "hours/total": 6.0,
        "hours/failed": 2.0,
        "hours/repeated": 1.0,
        "hours/steps": 2.0,
        "hours/other": 3.0,
    }


def test_a_command_tells_of_each_training():
    leases = ledger.leases(lease("a", "1", "x", 3600, "done") + lease("b", "1", "z", 1800, "done", step="fetch"))
    told = hours({"wst.kind": "pipeline", "wst.invocation": "1"}, {}, leases)
    assert (told["hours/total"], told["hours/train_c"], "hours/fetch" in told) == (3.0, 2.0, False)


def test_a_run_for_which_nothing_was_held_has_none():
    assert hours({"wst.kind": "pipeline", "wst.invocation": "3"}, {}, ledger.leases(HISTORIES["success"])) == {}
