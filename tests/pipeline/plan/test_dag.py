"""The DAG engine on small tables of its own: order, fingerprints, states with reasons, selections."""

from graphlib import CycleError
from typing import Any

import pytest

from datasets.files import storage
from pipeline.errors import UsageError
from pipeline.plan.dag import Step, fingerprints, label, order, plan
from pipeline.plan.table import table
from pipeline.settings import compose
from pipeline.settings.selection import Selection
from pipeline.steps.build import Build
from pipeline.steps.download import _earlier
from pipeline.store.artifacts import Store

STEPS = [
    Step("fetch", "metadata", (), ("data",), "none:none"),
    Step("download", "images", ("metadata",), ("size",), "none:none"),
    Step("train_a", "stage_a", ("images",), ("a", "seed"), "none:none"),
    Step("train_b", "stage_b", ("images", "stage_a"), ("b", "seed"), "none:none"),
]
SETTINGS = {"data": "openmoji", "size": 128, "a": {"lr": 1e-3, "steps": 10}, "b": {"lr": 1e-4}, "seed": 0}


def build(store: Store, settings: dict, names: list[str], content: str = "") -> None:
    """Commit artifacts of one small file for the named outputs."""
    prints = fingerprints(order(STEPS, ["stage_b"]), settings.__getitem__)
    for name in names:
        entry = storage.publish(
            f"{name}{content}".encode(), storage.join(store.path(name, prints[name].digest), "file")
        )
        parents = {parent: store.find(parent, digest) for parent, digest in prints[name].parents.items()}
        inputs = {parent: artifact.manifest["content"] for parent, artifact in parents.items() if artifact}
        facts = {"files": {"file": entry}, "timed": [], "rows": 1, "created": "2026-01-01", "inputs": inputs}
        store.commit(name, prints[name], facts)


def states(store: Store, settings: dict, selection: Selection | None = None) -> dict[str, tuple[str, str]]:
    planned = plan(order(STEPS, ["stage_b"]), settings.__getitem__, store, selection or Selection())
    return {item.step.output: (item.state, item.reason) for item in planned}


def test_order_takes_ancestors_only_and_parents_first():
    assert [step.output for step in order(STEPS, ["stage_a"])] == ["metadata", "images", "stage_a"]
    assert [step.output for step in order(STEPS[::-1], ["stage_b"])] == ["metadata", "images", "stage_a", "stage_b"]


def test_a_step_is_called_by_its_artifact_where_it_makes_several(tmp_path):
    steps = [Step("fetch", "metadata", (), (), ""), *(Step("sample", f"samples{n}", (), (), "") for n in ("", "_mine"))]
    planned = plan(steps, SETTINGS.__getitem__, Store(str(tmp_path)), Selection())
    assert [label(item.step, planned) for item in planned] == ["fetch", "samples", "samples_mine"]


def test_unknown_target_and_cycle_are_refused():
    with pytest.raises(UsageError, match="no step makes 'stage_x'"):
        order(STEPS, ["stage_x"])
    with pytest.raises(CycleError):
        order([Step("x", "a", ("b",), (), ""), Step("y", "b", ("a",), (), "")], ["a"])


def test_a_changed_setting_makes_its_step_and_its_descendants_stale_and_nothing_else(tmp_path):
    store = Store(str(tmp_path))
    build(store, SETTINGS, ["metadata", "images", "stage_a", "stage_b"])
    assert {state for state, _ in states(store, SETTINGS).values()} == {"done"}
    changed = states(store, {**SETTINGS, "a": {"lr": 2e-3, "steps": 10}})
    assert changed["metadata"][0] == changed["images"][0] == "done"
    assert changed["stage_a"] == ("stale", "a.lr: 0.001 -> 0.002")
    assert changed["stage_b"] == ("stale", "input stage_a changed")


def test_an_unfinished_build_is_resumed_and_a_fresh_root_runs(tmp_path):
    store = Store(str(tmp_path))
    assert states(store, SETTINGS)["metadata"] == ("run", "never built here")
    digest = fingerprints(order(STEPS, ["metadata"]), SETTINGS.__getitem__)["metadata"].digest
    storage.publish(b"x", storage.join(store.path("metadata", digest), "receipts/00000.json"))
    assert states(store, SETTINGS)["metadata"][0] == "resume"


def test_the_nearest_finished_artifact_explains_staleness(tmp_path):
    store = Store(str(tmp_path))
    build(store, {**SETTINGS, "a": {"lr": 9, "steps": 99}}, ["metadata", "images", "stage_a"])
    build(store, {**SETTINGS, "a": {"lr": 1e-3, "steps": 20}}, ["stage_a"])
    assert states(store, SETTINGS)["stage_a"] == ("stale", "a.steps: 20 -> 10")


def test_inputs_that_are_new_or_fall_away_are_named(tmp_path):
    store = Store(str(tmp_path))
    build(store, SETTINGS, ["metadata", "images", "stage_a", "stage_b"])
    steps = [*STEPS[:3], Step("train_b", "stage_b", ("metadata", "stage_a"), ("b", "seed"), "none:none")]
    planned = plan(order(steps, ["stage_b"]), SETTINGS.__getitem__, store, Selection())
    assert planned[-1].reason == "input metadata is new; input images is not wanted any more"


def test_selections(tmp_path):
    store = Store(str(tmp_path))
    assert list(states(store, SETTINGS, Selection(until="download"))) == ["metadata", "images"]
    with pytest.raises(UsageError, match="train_a needs images, which is not built"):
        states(store, SETTINGS, Selection(only="train_a"))
    with pytest.raises(UsageError, match="--until trian_a: this run has no such step"):
        states(store, SETTINGS, Selection(until="trian_a"))
    build(store, SETTINGS, ["metadata", "images", "stage_a", "stage_b"])
    assert states(store, SETTINGS, Selection(start="train_a"))["stage_a"][0] == "done"
    assert "images" not in states(store, SETTINGS, Selection(start="train_a"))
    assert states(store, SETTINGS, Selection(force=("train_a",)))["stage_a"] == ("run", "forced")


def test_what_is_made_of_a_forced_step_is_built_again_only_if_that_comes_out_differently(tmp_path):
    store = Store(str(tmp_path))
    build(store, SETTINGS, ["metadata", "images", "stage_a", "stage_b"])
    found = states(store, SETTINGS, Selection(force=("download",)))
    assert found["metadata"] == ("done", "manifest found")
    assert found["images"] == ("run", "forced")
    assert found["stage_a"] == ("stale", "only if download comes out differently")
    assert found["stage_b"] == ("stale", "only if download or train_a comes out differently")
    build(store, SETTINGS, ["images"])
    assert {state for state, _ in states(store, SETTINGS).values()} == {"done"}, "it came out the same"
    build(store, SETTINGS, ["images"], "with other pictures")
    found = states(store, SETTINGS)
    assert found["stage_a"] == ("stale", "built anew since, with other content: images")
    assert found["stage_b"] == ("stale", "built anew since, with other content: images")
    build(store, SETTINGS, ["stage_a", "stage_b"])
    assert {state for state, _ in states(store, SETTINGS).values()} == {"done"}


def test_version_and_parents_enter_the_fingerprint():
    def digest(steps: list[Step], name: str) -> str:
        return fingerprints(steps, SETTINGS.__getitem__)[name].digest

    newer = [STEPS[0], Step("download", "images", ("metadata",), ("size",), "none:none", version=2), *STEPS[2:]]
    assert digest(STEPS, "metadata") == digest(newer, "metadata")
    for name in ("images", "stage_a", "stage_b"):
        assert digest(STEPS, name) != digest(newer, name)


def test_a_later_download_finds_the_attempt_before_it_by_its_fingerprint(tmp_path):
    """And the first attempt leaves no trace in the fingerprints."""
    first, second = (compose.load("stage_c", ["scale=micro", f"data.attempt={n}"]) for n in (1, 2))
    store, built = Store(str(tmp_path)), {}
    for name, print_ in fingerprints(order(table(first), ["images"]), first.lookup).items():
        assert "data.attempt" not in print_.settings
        built[name] = store.commit(name, print_, {"files": {}, "timed": [], "rows": 1, "created": "2026-01-01"})
    step = next(step for step in table(second) if step.output == "images")
    digest = fingerprints(order(table(second), ["images"]), second.lookup)["images"].digest
    path = store.path("images", digest)
    unused: Any = None
    found = {"metadata": built["metadata"]}
    build = Build(second, step, path, unused, found, unused, unused, unused, frozenset(), unused)
    assert digest != built["images"].manifest["fingerprint"]
    earlier = _earlier(build)
    assert earlier is not None
    assert earlier.folder == built["images"].path


def test_what_is_done_needs_no_input_that_is_gone_and_left_out(tmp_path):
    store = Store(str(tmp_path))
    build(store, SETTINGS, ["metadata", "images", "stage_a", "stage_b"])
    for path in store.folders("images"):
        storage.remove(path)
    assert states(store, SETTINGS, Selection(only="train_b")) == {"stage_b": ("done", "manifest found")}
