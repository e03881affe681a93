"""What a config wants of a root: asked of a store in few requests, and as it is now for who looks anew."""

from collections import Counter
from urllib.parse import unquote

import pytest

from datasets.files import storage
from pipeline.plan.dag import Planned, order
from pipeline.plan.table import table
from pipeline.plan.wanted import names_of_inputs, planned_steps, prints_of
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.settings.selection import Selection
from pipeline.store import earlier
from pipeline.store.artifacts import Look, Store
from tests.faulty_store import FaultyStore

FACTS = {"files": {}, "timed": [], "rows": 1, "created": "2026-01-01", "notes": {}}


def load(*words: str) -> Config:
    return compose.load("stage_c", ["scale=micro", *words])


def make(root: str, config: Config, *names: str) -> list[str]:
    """Finished artifacts of a config, all or some of them; the names of all."""
    steps = order(table(config), config.targets)
    for name, print_ in prints_of(config, Look(root), steps).items():
        if not names or name in names:
            Store(root).commit(name, print_, FACTS)
    return [step.output for step in steps]


def look(config: Config, root: str) -> list[Planned]:
    """All that the start of a run wants to know of a root before it is at work."""
    look = Look(root)
    planned = planned_steps(config, look, Selection())
    earlier.keep(root, names_of_inputs(config, look, [item.step for item in planned]))
    list(look.finished())
    prints_of(config, look, order(table(config), config.targets))
    return planned


def asked(store: FaultyStore, since: int) -> Counter[str]:
    """How often a store was asked for what lies in each place below `artifacts/`."""
    places = (unquote(path).replace("prefix=", "/").partition("/artifacts/") for _, path in store.asked[since:])
    return Counter(inside.partition("&")[0] for _, found, inside in places if found)


def test_an_empty_store_is_asked_once_for_all_artifacts(s3, s3_root):
    before = len(s3.asked)
    assert {item.state for item in look(load(), s3_root)} == {"run"}
    assert asked(s3, before) == {"": 1}
    assert len(s3.asked) - before == 1 + 3 * 2  # and, at each turn, what it calls inputs


def test_what_is_done_is_a_request_an_artifact_and_one_a_name(s3, s3_root):
    names = make(s3_root, load())
    before = len(s3.asked)
    assert {item.state for item in look(load(), s3_root)} == {"done"}
    found = asked(s3, before)
    manifests = [place for place in found if place.endswith("/manifest.json")]
    assert len(manifests) == len(names)
    assert found.keys() - manifests == {"", *(f"{name}/" for name in names)} | removals(manifests)
    assert max(found[place] for place in found if "forgotten" not in place) == 1


def test_what_is_there_of_another_config_is_looked_at_once(s3, s3_root):
    names = make(s3_root, load())
    before = len(s3.asked)
    planned = look(load("data.limit=32"), s3_root)
    assert {item.state for item in planned} == {"stale"}
    found = asked(s3, before)
    assert sum(place.endswith("/manifest.json") for place in found) == 2 * len(names)  # theirs, and ours, not there
    assert max(found[place] for place in found if "forgotten" not in place) == 1


def removals(manifests: list[str]) -> set[str]:
    """Where it is asked whether something was taken out of artifacts."""
    return {place.replace("manifest.json", "forgotten.json") for place in manifests}


@pytest.mark.parametrize("remote", [False, True])
def test_who_looks_anew_sees_what_came_since_and_who_has_looked_does_not(remote, tmp_path, request):
    root = request.getfixturevalue("s3_root") if remote else str(tmp_path)
    config, store, old = load(), Store(root), Look(root)
    print_ = prints_of(config, old, order(table(config), ["metadata"]))["metadata"]
    called = "metadata", print_.digest
    assert (old.find(*called), old.started(*called), list(old.finished())) == (None, False, [])
    storage.publish(b"half", storage.join(store.path(*called), "building", "x"))
    assert (store.started(*called), Look(root).started(*called), old.started(*called)) == (True, True, False)
    make(root, config, "metadata")
    for now in (store, Look(root)):
        (found,) = now.finished()
        assert now.find(*called) == found
        assert now.folders("metadata") == [store.path(*called)]
    assert (old.find(*called), list(old.finished("metadata"))) == (None, [])
