"""Where the time of a lease went: all of it, once."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.store.phases import OTHER, PHASES, READING, REPEATED, SAVING, STARTUP, STEPS, Phases, split

SECONDS = st.integers(0, 10**7).map(lambda milliseconds: milliseconds / 1000)


@given(SECONDS, st.dictionaries(st.sampled_from(PHASES[:-1]), SECONDS))
def test_phases_sum_to_what_was_held_whatever_was_told(held, told):
    found = split(held, told)
    assert sum(round(1000 * seconds) for seconds in found.values()) == round(1000 * held)
    assert all(found.get(phase, 0.0) <= told.get(phase, 0.0) for phase in PHASES[:-1])


def test_a_lease_of_which_nothing_is_told_is_other():
    assert split(7.5, {}) == {OTHER: 7.5}
    assert split(10.0, {STARTUP: 2.0, STEPS: 7.0}) == {STARTUP: 2.0, STEPS: 7.0, OTHER: 1.0}


def test_steps_that_were_done_before_are_repeated_with_all_that_went_with_them():
    phases = Phases()
    phases.goes_on("stage_c", step=100, reached=150)
    phases.add("stage_c", 140, {STARTUP: 10.0, READING: 1.0, STEPS: 4.0})
    assert phases.told() == {STARTUP: 10.0, REPEATED: 5.0}
    phases.add("stage_c", 160, {STARTUP: 10.0, READING: 2.0, STEPS: 6.0, SAVING: 1.0})  # half of them were new
    assert phases.told() == {STARTUP: 10.0, READING: 0.5, STEPS: 1.0, SAVING: 0.5, REPEATED: 7.0}
    phases.add("stage_c", 200, {STARTUP: 10.0, READING: 2.0, STEPS: 10.0, SAVING: 1.0})
    assert phases.told()[STEPS] == 5.0


def test_what_follows_the_last_step_is_not_repeated():
    phases = Phases()
    phases.goes_on("compressor", 0, 0)
    phases.add("compressor", 10, {STEPS: 3.0})
    phases.goes_on("stage_b", 0, 0)
    phases.add("stage_b", 10, {STEPS: 5.0})
    phases.add("stage_b", 10, {STEPS: 5.0, SAVING: 2.0})
    assert phases.told() == {STEPS: 5.0, SAVING: 2.0}


def test_to_say_it_again_changes_nothing():
    phases = Phases()
    for _ in range(2):
        phases.add("stage_c", 10, {STEPS: 3.0})
    assert phases.told() == {STEPS: 3.0}
