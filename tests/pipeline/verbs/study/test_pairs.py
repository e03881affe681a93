"""Which pairs are drawn: as many of each as there are, fresh prompts first, and nothing that tells whose they are."""

import json
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.models.contests import Contest, Place
from pipeline.verbs.study.pairs import CONTROL, Key, drawn, opponents


def contest(name="mine", count=20, rivals=("x", "y"), usable=None) -> Contest:
    rows = [{"key": f"{n:032d}", "caption": f"prompt {n}"} for n in range(count)]
    return Contest(
        name, rows, {"score": Place(), **{f"rival_{rival}": Place() for rival in rivals}}, None, usable or {}
    )


@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 3), st.integers(0, 2**32))
def test_every_rival_gets_its_share_of_distinct_pairs_and_there_is_one_control(count, prompts, rivals, chance):
    names = tuple("xyz"[:rivals])
    key = drawn([contest(count=prompts, rivals=names)], count, 0, Random(chance), {})
    assert len(key.controls) == 1
    pairs = [pair for name, pair in key.pairs.items() if name not in key.controls]
    assert len({(pair.rival, pair.key) for pair in pairs}) == len(pairs) == min(count, prompts * rivals)
    shares = Counter(pair.rival for pair in pairs)
    assert max(shares.values()) - min(shares[name] for name in names) <= 1
    assert len({pair.key for pair in pairs}) == min(len(pairs), prompts)  # none comes again while there are others
    assert {pair.ours for pair in pairs} <= {"a", "b"}
    assert Key.of(json.loads(key.as_json())) == key


def test_the_seed_draws_the_prompts_and_chance_all_that_could_tell():
    one, other = (drawn([contest()], 10, 0, Random(chance), {}) for chance in (1, 2))
    assert {(p.rival, p.key) for p in one.pairs.values()} == {(p.rival, p.key) for p in other.pairs.values()}
    assert one.study != other.study
    assert not one.pairs.keys() & other.pairs.keys()
    another = drawn([contest()], 10, 1, Random(1), {})
    assert {p.key for p in one.pairs.values()} != {p.key for p in another.pairs.values()}


def test_ours_stand_on_either_side():
    sides = Counter(pair.ours for pair in drawn([contest(count=500)], 1000, 0, Random(0), {}).pairs.values())
    assert min(sides["a"], sides["b"]) > 400
    assert sides[CONTROL] == 1


def test_pictures_that_a_rival_lacks_are_not_shown():
    key = drawn([contest(rivals=("x",), usable={"rival_x": frozenset({f"{3:032d}"})})], 10, 0, Random(0), {})
    assert [pair.key for pair in key.pairs.values() if pair.rival == "x"] == [f"{3:032d}"]


def test_without_rivals_ours_are_shown_beside_the_originals_or_else_beside_themselves():
    alone = Contest("mine", [], {"score": Place(), "null": Place()}, None)
    assert opponents(alone).keys() == {"null"}
    assert opponents(Contest("training", [], alone.places, Place())).keys() == {"original"}
    with pytest.raises(UsageError, match=r"eval\.rivals: none of them has a picture"):
        drawn([Contest("mine", [], {"score": Place()}, None)], 3, 0, Random(0), {})
