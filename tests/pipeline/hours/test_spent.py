"""The ledger added up, whatever became of its lines; the hours of a run, of a build, and of all."""

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.hours.spent import by_step, overlapping, spent
from pipeline.store import ledger
from pipeline.store.phases import OTHER, PHASES, READING, REPEATED, STEPS

A100 = "cuda:A100"
BEAT = 10


def lines(
    lease: str,
    devices: float,
    beats: int,
    end: str | None = "done",
    phases: dict[str, float] | None = None,
    **about: Any,
) -> list[dict[str, Any]]:
    """A lease's events: one every ten seconds; where it has no end, it was killed after its last heartbeat."""
    opened = about.pop("opened", 1e9)
    common = {"lease": lease, "attempt": f"{about.pop('run', 'run')}/{about.pop('attempt', 0)}"}
    opening = {"step": "train_c", "fingerprint": "abc", "kind": A100, "devices": devices, **about}
    found = [{"event": "lease_open", **common, **opening, "held_s": 0.0, "time": opened}]
    for beat in range(1, beats + 1):
        told = {phase: seconds * beat / beats for phase, seconds in (phases or {}).items()}
        line = {"event": "heartbeat", **common, "held_s": float(BEAT * beat), "time": opened + BEAT * beat}
        found.append({**line, "phases": told} if told else line)
    if end:
        closing = {**found[-1], "event": "lease_close", "outcome": end}
        found.append({key: value for key, value in closing.items() if key not in opening})
    return found


@st.composite
def streams(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Leases of one step by several runs, with phases or without, ended or killed."""
    events: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 6))):
        beats = draw(st.integers(1, 50))
        left, phases = 1000 * BEAT * beats, {}
        for phase in draw(st.lists(st.sampled_from(PHASES[:-1]), unique=True)):
            phases[phase] = draw(st.integers(0, left)) / 1000
            left -= round(1000 * phases[phase])
        end = draw(st.sampled_from(["done", "failed", "interrupted", None]))
        devices = draw(st.sampled_from([1, 3, 0.25, 64]))
        about = {"build": draw(st.sampled_from(["x", "y"])), "run": f"run{number}", "opened": 1e9 + 1000 * number}
        events += lines(f"lease-{number}", devices, beats, end, phases, **about)
    return events


@given(streams())
def test_phases_sum_to_what_was_allocated(events):
    found = spent(ledger.leases(events))
    held = {event["lease"]: (0.0, 0.0) for event in events}
    for event in events:
        devices, longest = held[event["lease"]]
        held[event["lease"]] = (event.get("devices", devices), max(longest, event["held_s"]))
    assert sum(found.phases.values()) == found.total
    assert found.total == pytest.approx(sum(devices * seconds for devices, seconds in held.values()), rel=1e-12)
    (row,) = by_step(ledger.leases(events)).values()
    assert row.device_seconds == pytest.approx(found.total, rel=1e-12)


@given(streams(), st.randoms())
def test_replay_duplication_and_order_change_nothing(events, random: Random):
    before = ledger.leases(events)
    again = events + random.choices(events, k=5)
    random.shuffle(again)
    assert sorted(map(repr, ledger.leases(again))) == sorted(map(repr, before))
    assert spent(ledger.leases(again)).total == pytest.approx(spent(before).total, rel=1e-12)


@given(streams(), st.data())
def test_a_torn_tail_costs_at_most_a_heartbeat(events, data):
    """Of a file that ends before its last line."""
    last = [event for event in events if event["lease"] == events[-1]["lease"]]
    whole, cut = spent(ledger.leases(events)), spent(ledger.leases(events[:-1]))
    assert 0 <= whole.total - cut.total <= last[0]["devices"] * BEAT + 1e-6


@given(streams(), st.lists(st.sampled_from([-3600.0, 0.0, 3600.0]), min_size=60, max_size=60))
def test_a_clock_that_jumps_an_hour_changes_no_duration(events, jumps):
    jumped = [{**event, "time": event["time"] + jump} for event, jump in zip(events, jumps * 10, strict=False)]
    assert spent(ledger.leases(jumped)).total == spent(ledger.leases(events)).total


@given(streams())
def test_runs_add_up_to_the_ledger_and_so_do_builds(events):
    leases = ledger.leases(events)
    for key in (lambda lease: lease.run, lambda lease: lease.about.build):
        parts = {key(lease) for lease in leases}
        total = sum(spent(lease for lease in leases if key(lease) == part).total for part in parts)
        assert total == pytest.approx(spent(leases).total, rel=1e-12)


def test_an_old_ledger_reads_as_it_did():
    events = lines("a", 8, 3, "failed") + lines("b", 8, 2, "done", opened=2e9, attempt=1)
    (row,) = by_step(ledger.leases(events)).values()
    assert (row.attempts, row.failed_attempts, row.estimated) == (2, 1, False)
    assert row.device_seconds_by_kind == {A100: 400.0}
    found = spent(ledger.leases(events))
    assert (found.phases, found.failed, found.goodput) == ({OTHER: 400.0}, 240.0, None)


def test_an_attempt_that_failed_is_of_its_own_artifact():
    drawn, failed = (lines(name, 1, 4, end, output=name) for name, end in (("a", "done"), ("b", "failed")))
    assert spent(ledger.leases(drawn + failed)).failed == 4 * BEAT


def test_a_step_of_no_time_to_speak_of_has_its_kind_of_device():
    leases = ledger.leases(lines("a", 8, 0))
    (row,) = by_step(leases).values()
    assert (row.kind, row.device_seconds) == (A100, 0)
    assert spent(leases).by_kind == {}


def test_devices_that_were_waited_for_are_no_kind_beside_those_that_came():
    (row,) = by_step(ledger.leases(lines("a", 0, 3, kind="cuda:GPU") + lines("b", 8, 1, opened=2e9))).values()
    assert (row.kind, row.device_seconds) == (A100, 80)
    (row,) = by_step(ledger.leases(lines("a", 8, 0) + lines("b", 32, 1, kind=ledger.CPU, opened=2e9))).values()
    assert (row.kind, row.device_seconds) == (ledger.CPU, 320)


def test_goodput_is_the_share_of_steps_that_lasted():
    thrown = lines("a", 1, 10, phases={STEPS: 80.0}, build="first")
    kept = lines("b", 1, 10, phases={STEPS: 50.0, READING: 10.0, REPEATED: 20.0}, build="second", opened=2e9)
    found = spent(ledger.leases(thrown + kept))
    assert (found.total, found.discarded, found.repeated) == (200.0, 100.0, 20.0)
    assert found.goodput == 0.25


def test_what_an_earlier_version_has_begun_counts_with_the_build_that_goes_on_with_it():
    begun = lines("a", 1, 10, phases={STEPS: 80.0})
    ended = lines("b", 1, 10, phases={STEPS: 50.0}, build="second", opened=2e9)
    assert spent(ledger.leases(begun + ended)).discarded == 0.0


def test_the_cost_is_of_what_had_a_price_and_the_rest_is_told():
    dear, cheap, free = lines("a", 2, 360, price=3.0), lines("b", 1, 360, price=1.0), lines("c", 1, 36)
    assert spent(ledger.leases(dear + cheap)).money == "cost 7.00 by cluster.price_per_hour"
    later = spent(ledger.leases(dear + free))
    assert (later.cost, later.priced) == (6.0, 7200.0)
    assert later.money == "cost 6.00 by cluster.price_per_hour (of 0.1 device-hours no price was told)"
    assert spent(ledger.leases(free)).money is None


def test_waiting_costs_nothing_and_is_told():
    events = lines("a", 8, 2)
    for event in events:
        event["queued_s"] = 500.0
    events.append({**events[1], "held_s": 0.0, "queued_s": 600.0})  # nobody had heard yet that they were there
    found = spent(ledger.leases(events))
    assert (found.total, found.queued_s) == (160.0, 500.0)


def overlaps() -> Iterator[tuple[list[dict[str, Any]], float]]:
    here = {"where": "here", "room": 4}
    yield lines("a", 4, 3, **here) + lines("b", 2, 3, opened=1e9 + 20, **here), 20.0
    yield lines("a", 4, 3, **here) + lines("b", 2, 3, opened=1e9 + 30, **here), 0.0
    yield lines("a", 4, 3, **here) + lines("b", 4, 3, **here | {"where": "there"}), 0.0
    yield lines("a", 4, 3) + lines("b", 4, 3), 0.0  # nobody knows where they were


@pytest.mark.parametrize(("events", "seconds"), list(overlaps()))
def test_leases_that_hold_one_device_at_a_time_are_found(events, seconds):
    assert overlapping(ledger.leases(events)) == pytest.approx(seconds)


HELD = st.tuples(st.integers(0, 30), st.integers(1, 30), st.integers(1, 4))  # when, for how long in heartbeats, devices


@given(st.lists(HELD, max_size=8), st.integers(1, 6), st.randoms())
def test_what_is_held_beyond_the_room_is_found_second_by_second(held, room, random: Random):
    events = [
        event
        for number, (start, beats, devices) in enumerate(held)
        for event in lines(
            f"{number}", devices, beats, opened=1e9 + BEAT * start, run=f"{number}", where="x", room=room
        )
    ]
    random.shuffle(events)
    at_once = (sum(devices for start, beats, devices in held if start <= beat < start + beats) for beat in range(60))
    expected = BEAT * sum(max(0, count - room) for count in at_once)
    assert overlapping(ledger.leases(events)) == pytest.approx(expected)
