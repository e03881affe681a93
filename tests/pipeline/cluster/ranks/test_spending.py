"""Where a rank's time goes, by phase."""

import pytest

from pipeline.cluster.ranks.spending import Spending
from pipeline.store.phases import READING, STARTUP, STEPS
from stages.training import activity
from stages.training.activity import Activity


def test_seconds_go_to_phases_over_several_trainings(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    spending = Spending()
    age = spending.age
    for _ in range(2):
        doing = Activity()
        spending.follow(doing)
        for what, seconds in (
            (activity.READING, 2),
            (activity.FORWARD, 3),
            (activity.COMPARING, 4),
            (activity.LOGGING, 9),
        ):
            now[0] += 1  # of what came before
            doing.begin(0, what)
            now[0] += seconds
    found = spending.seconds()
    # Each activity has its own seconds and the second before the next; starting comes first.
    assert found == pytest.approx({STARTUP: age + 2, READING: 6, STEPS: 18})
    assert spending.age == pytest.approx(age + 44)
