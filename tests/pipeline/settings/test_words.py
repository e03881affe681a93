"""The command line's grammar."""

import re

import pytest

from pipeline.errors import UsageError
from pipeline.settings import compose
from pipeline.settings.words import parse


def test_own_words_are_literal_and_the_rest_are_overrides():
    words = parse(
        ["sample", "conf=stage_c", "prompt=what's this, (a) Würstchen: 4k? a=b", "out=p", "stage_c.text=tiny", "seed=3"]
    )
    assert words.own == {"prompt": "what's this, (a) Würstchen: 4k? a=b", "out": "p", "seed": "3"}
    assert words.conf == "stage_c"
    assert words.overrides == ["stage_c.text=tiny"]


@pytest.mark.parametrize("word", ["stage_d=1", "sede=3", "data.limit=4", "scale=micro", "sample.prompt=1", "+x=1"])
def test_what_is_like_no_word_of_the_verb_is_left_to_the_config(word):
    assert parse(["run", "conf=stage_c", word]).overrides == [word]


def test_the_same_words_again():
    words = parse(["sample", "conf=stage_c", "root=a b", "targets=[stage_a]", "prompt=x", "seed=3", "run_seed=5"])
    assert words.same == "conf=stage_c 'root=a b' 'targets=[stage_a]' seed=5"
    assert parse(["run", "conf=stage_c", "root=runs"]).same == "conf=stage_c"


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
        ("run --fast", "run has no flag --fast .*; it takes --from, --until"),
        ("run --onyl train_a", "run has no flag --onyl .did you mean --only..; it takes"),
        ("run cnof=stage_c", "cnof: there is no such word or key .did you mean conf."),
        ("sample conf=stage_c promt=x", "promt: there is no such word or key .did you mean prompt."),
        ("sample conf=stage_c guidence_c=2", "did you mean guidance_c"),
        ("import conf=stage_c form=x", "did you mean from"),
        ("status rot=x", "rot=x: status takes no rot= .did you mean root..; it takes root="),
        ("run --only", "--only needs a step's name"),
        ("run conf=a conf=b", "conf= is given twice"),
        ("run root=", "root= is empty"),
        ("run root=o\udcffz", r"root='o.udcffz': its name is no UTF-8"),
        ("run root=s3://", "root=s3:// names no bucket"),
        ("run root=memory://", "root=memory:// names no bucket"),
        ("run root=s3:///x", "root=s3:///x names no bucket"),
        ("run root=s3://pictures//r1", "root=s3://pictures//r1 has two slashes in a row, .*; leave one out"),
        ("run root=gs://pictures/a//r1", "root=gs://pictures/a//r1 has two slashes in a row"),
    ],
)
def test_what_does_not_fit_is_named(line, message):
    with pytest.raises(UsageError, match=message):
        parse(line.split())


SECRETS = ("s3://AKIA:sEcReT@bucket/rows", "s3://AKIA:sE/cR+eT@bucket", "[s3://b/x, 'https://anna:sEcReT@host/x']")


@pytest.mark.parametrize("value", SECRETS)
@pytest.mark.parametrize("word", ["data.metadata", "root", "tracking.uri"])
def test_a_password_in_a_uri_is_refused_and_not_repeated(word, value):
    with pytest.raises(UsageError, match=rf"^{word}: a URI must not hold a password .*AWS_PROFILE") as caught:
        parse(["run", "conf=stage_c", f"{word}={value}"])
    assert not re.search("AKIA|sE|cR", str(caught.value))


def test_so_is_one_that_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRETS[0])
    with pytest.raises(UsageError, match=r"^tracking.uri: a URI must not hold a password") as caught:
        compose.load("stage_c", ["tracking=server"])
    assert "sEcReT" not in str(caught.value)


@pytest.mark.parametrize("value", ["s3://bucket/a:b@2x", "http://host:5000/a@2x.png", "https://anna@host/x", "a:b@c"])
def test_no_other_uri_is_taken_for_one_with_a_password(value):
    assert parse(["run", "conf=stage_c", f"data.metadata={value}"]).overrides == [f"data.metadata={value}"]
    assert parse(["sample", "conf=stage_c", f"prompt={SECRETS[0]}"]).own["prompt"] == SECRETS[0]
