"""The command line's grammar."""

import pytest

from pipeline.errors import UsageError
from pipeline.words import parse


def test_own_words_are_literal_and_the_rest_are_overrides():
    words = parse(
        ["sample", "conf=stage_c", "prompt=what's this, (a) Würstchen: 4k? a=b", "out=p", "stage_c.text=tiny", "seed=3"]
    )
    assert words.own == {"prompt": "what's this, (a) Würstchen: 4k? a=b", "out": "p", "seed": "3"}
    assert words.conf == "stage_c"
    assert words.overrides == ["stage_c.text=tiny"]


def test_the_seed_of_a_run_is_an_override():
    assert parse(["run", "conf=stage_c", "seed=3"]).overrides == ["seed=3"]


def test_flags():
    words = parse(["run", "conf=stage_c", "--force", "train_a", "--force=train_b", "--until", "train_c", "--json"])
    assert words.selection.force == ("train_a", "train_b")
    assert words.selection.until == "train_c"
    assert words.json


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rnu conf=stage_c", "no verb 'rnu' .did you mean run?"),
        ("run --fast", "run has no flag --fast"),
        ("run --only", "--only needs a step's name"),
        ("run conf=a conf=b", "conf= is given twice"),
        ("run root=", "root= is empty"),
    ],
)
def test_what_does_not_fit_is_named(line, message):
    with pytest.raises(UsageError, match=message):
        parse(line.split())
