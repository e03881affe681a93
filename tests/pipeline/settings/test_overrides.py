"""Words of the command line: texts as they are written, places in lists, and hints that hold."""

import re
import shlex
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.settings import compose
from pipeline.settings.keys import flatten

FOLDERS = (
    "2024",
    "1e5",
    "it's",
    "jörg",
    "~/x",
    "a, b (2) [x]",
    'say "cheese"',
    "true",
    "C:\\my pictures\\",
    "x=y",
    "[a]",
    "${data.limit}/x",
    "$HOME",
    "{a: b}",
    "'all of it'",
    '"all of it"',
    "a\\${b",
    "???",
    "{}",
    "${",
    "100 %, #1",
)
# What YAML, Hydra, OmegaConf or a shell could take for something of theirs, and letters.
NAMES = st.lists(
    st.sampled_from(["${", "}", "{", "$", "\\", "'", '"', "[", "]", ",", ":", "=", "#", "?", "~", "!", "&", "*", "|"])
    | st.sampled_from(["data.limit", "oc.env:HOME", "null", "true", "1e5", "2024", " ", "ö", "\u0308", "雪", "a", "/"]),
    min_size=1,
    max_size=8,
).map("".join)
PATHS = ("data.folder.path", "data.metadata", "data.removed", "stage_c.weights", "eval.prompts.mine", "eval.rivals.it")


@pytest.mark.parametrize("name", FOLDERS)
def test_texts_are_taken_as_they_are_written(name):
    config = compose.load("stage_c", ["data=folder", f"data.folder.path={name}", f"data.folder.attribution={name}"])
    assert config.data.folder is not None
    assert (config.data.folder.path, config.data.folder.attribution) == (meant(name), meant(name))


def meant(word: str) -> str:
    """Without the quotes that may be around all of it."""
    return word[1:-1] if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"" else word


@settings(max_examples=8, deadline=None)
@given(st.lists(NAMES, min_size=len(PATHS), max_size=len(PATHS)))
def test_so_are_paths_of_any_name(names):
    names = [name for name in names if name.strip() and name != "null" and not name.startswith("{")]
    words = dict(zip(PATHS, names, strict=False))
    tree = compose.compose("stage_c", ["data=folder", *(f"{key}={name}" for key, name in words.items())])
    found = flatten(tree)
    assert {key: found[key] for key in words} == {key: meant(name) for key, name in words.items()}


def test_what_yaml_says_of_a_path_is_what_was_written(tmp_path, monkeypatch):
    conf = tmp_path / "conf"
    shutil.copytree(compose.CONF, conf)
    (conf / "mine.yaml").write_text("defaults: [stage_c, _self_]\ndata: {removed: '${data.metadata}.txt'}\n")
    monkeypatch.setattr(compose, "CONF", conf)
    assert compose.load("mine", ["data.metadata=${a}"]).data.removed == "${a}.txt"


@pytest.mark.parametrize(("written", "meant"), [("'a b'", "a b"), ('"a b"', "a b"), ("null", None), ("'null'", "null")])
def test_quotes_around_a_text_are_no_part_of_it_and_null_is_none(written, meant):
    folder = compose.load(
        "stage_c", ["data=folder", "data.folder.path=x", f"data.folder.licence={written}"]
    ).data.folder
    assert folder is not None
    assert folder.licence == meant


def test_a_number_or_names_where_a_path_may_stand_too_are_what_they_look_like():
    words = ["interpolate.first=1", "interpolate.second=1e5", "eval.rivals={x: {generated: 'a$b'}}"]
    tree = compose.compose("interpolate", words)
    assert (tree["interpolate"]["first"], tree["interpolate"]["second"]) == (1, "1e5")
    assert tree["eval"]["rivals"] == {"x": {"generated": "a$b"}}


def refused(*words):
    with pytest.raises(UsageError) as caught:
        compose.load("stage_c", list(words))
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("stage_a.train.batch_size=4", "no such key (did you mean stage_a.train.phases.0.batch_size?)"),
        ("stage_a.train.phases.batch_size=4", "phases is a list; .* such as stage_a.train.phases.0.batch_size"),
        ("stage_a.train.phases.9.size=4", "stage_a.train.phases.9.size=4: a list on the way there has no such item"),
        ("stage_b.trian.learning_rate=0.002", "no such key (did you mean stage_b.train?)"),
        (
            "stage_c.trian=1",
            r"no such key (did you mean stage_c.train? It has keys of its own, such as stage_c.train.phas",
        ),
        ("data.imgae=jpg", r"no such key (did you mean data.image? It has keys of its own, such as data.image.size"),
        ("stage_bb.train.learning_rate=0.002", "no such key (did you mean stage_b?)"),
        ("data.fitlers.min_side=3", "no such key (did you mean data.filters?)"),
        ("batch_size=4", "no such key (did you mean stage_a.train.phases.0.batch_size?)"),
        ("limit=5", "no such key (did you mean data.limit?)"),
        ("size=256", "no such key (did you mean data.image.size?)"),
        ("steps=10", "no such key (did you mean baseline.sample.steps?)"),
        ("data.view=8", "no such key"),  # `views` has no keys yet that could be told
        ("targets=it's", "not readable (did you mean 'targets="),
        ("data.openmoji.captions=red heart, lemon", "not readable (did you mean"),
        ("seed=a,b", "seed=a,b: not readable"),
    ],
)
def test_what_does_not_fit_is_told_with_a_key_that_does(word, told):
    assert re.search(told.replace("(did", r"\(did").replace("?", r"\?").replace("?)", r"?\)"), refused(word))


@pytest.mark.parametrize(
    "word",
    [
        "stage_a.train.batch_size=4",
        "stage_c.train.lerning_rate=0.1",
        "stage_c.train.phases.0.batchsize=4",
        "data.limits=5",
        "max_aspect=2",
        "learning_rate=0.1",
        "data.openmoji.captions=red heart, lemon",
        "targets=[stage_a,it's]",
    ],
)
def test_every_hint_holds(word):
    """What is told is done: the word is accepted then, or refused for another reason than its key or its spelling."""
    (near,) = re.findall(r"\(did you mean (.*)\?\)", refused(word))
    (hint,) = shlex.split(near)
    again = hint if "=" in hint else f"{hint}={word.partition('=')[2]}"
    try:
        told = compose.load("stage_c", [again]).seed
    except UsageError as error:
        told = error
    assert not re.search("no such key|not readable", str(told))


def test_a_key_that_nothing_near_it_could_stand_for_gets_no_hint():
    assert "did you mean" not in refused("data.folder_path={a: 1}")
