"""Forgetting after kills, and in what is not finished: the next removal reaches everything."""

import contextlib
import itertools
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets.files import storage
from datasets.formats import shards
from datasets.formats.shards import Clock
from pipeline.errors import UsageError
from pipeline.models import prompt_sets
from pipeline.repair import repairing
from pipeline.settings import compose
from pipeline.settings.evaluation import TRAINING
from pipeline.steps import sample
from pipeline.store import deleting
from pipeline.store.artifacts import Store
from pipeline.store.removal_list import check_carried_out
from pipeline.verbs.data.forgetting import forget
from tests.pipeline.verbs.data.forgettable import BODIES, GONE, KEYS, PNG, URLS, built, contents, found, tensors
from tests.pipeline.verbs.data.forgettable import store as store  # the fixture


def test_after_a_kill_at_any_moment_a_run_is_refused_and_the_next_removal_ends_it(tmp_path, monkeypatch):
    built(tmp_path / "whole", bodies=BODIES)
    shutil.copytree(tmp_path / "whole", tmp_path / "calm")
    forget(str(tmp_path / "calm"), {GONE})
    calm = contents(tmp_path / "calm")

    class Killed(BaseException):
        """The process ends here."""

    def deadly(function: Any, left: list[int]) -> Any:
        def call(*arguments: Any) -> Any:
            if "/claims/" not in str(arguments[-1]):  # whose owner would be dead
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return function(*arguments)

        return call

    kills = 0
    while True:
        root = tmp_path / f"killed{kills}"
        shutil.copytree(tmp_path / "whole", root)
        store = Store(str(root))
        left = [kills + 1]  # the request itself is written
        with monkeypatch.context() as patched:
            for name in ("publish", "remove"):
                patched.setattr(storage, name, deadly(getattr(storage, name), left))
            try:
                forget(store.root, {GONE})
                break
            except Killed:
                kills += 1
        with pytest.raises(UsageError, match="go on with it: python -m pipeline data forget"):
            check_carried_out(store.root)
        forget(store.root, set())
        check_carried_out(store.root)
        left_behind = contents(root)
        assert {name for name in left_behind if left_behind[name] != calm.get(name)} <= {
            name for name in calm if name.endswith("forgotten.json")
        }
        assert left_behind.keys() == calm.keys()
        assert {name: artifact.manifest for name, artifact in found(store).items()} == {
            name: artifact.manifest for name, artifact in found(Store(str(tmp_path / "calm"))).items()
        }
    assert kills > 20


def test_a_shard_of_an_unfinished_build_that_holds_it_is_dropped(store):
    path = store.path("text_tiny", "unfinished")
    for shard in range(2):
        name = shards.tensor_name(shard)
        files = {name: storage.publish(tensors(shard), storage.join(path, name))}
        shards.publish_receipt(path, shard, rows_in=3, rows_out=3, files=files, clock=Clock())
    forget(store.root, {GONE})
    assert storage.listing(path) == ["00000.parquet", "receipts/00000.json"]


BY_SHARD = {"text_tiny": "", "latents_c": "128", "duplicates": "hashes"}


def holding(root: Path) -> set[str]:
    """Names of the artifacts below a root of which a file holds the picture or its caption."""
    found = set()
    for path, content in contents(root).items():
        name = path.split("/")[1]
        if name == "metadata" or path.endswith(("forgotten.json", "manifest.json")):  # these stay as they are
            continue
        if not path.endswith(".parquet"):
            told = (GONE.encode(), b"'its name',", b'"its name"')  # a card's example, and samples' captions
            found |= {path} if GONE in path or any(word in content for word in told) else set()
        elif "key" in pq.read_schema(pa.BufferReader(content)).names:
            rows = pq.read_table(pa.BufferReader(content)).to_pylist()  # an index keeps the key of what is gone
            keys = {key for row in rows if row.get("width", 1) for key in (row["key"], row.get("of"))}
            found |= {path} if keys & {GONE, bytes.fromhex(GONE)} else set()
    return found


def torn(how: str, root: Path) -> Store:
    """A root in which a repair of the images was stopped, or `--force` of a step."""
    store = built(root)
    every = found(store)
    if how == "repair":
        damaged = every["images"], "00000.tar"
        repairing.open_damaged(store, [damaged])
    elif how == "half a repair":  # killed before the images, which come last
        for name in ("text_tiny", "view_fine"):
            deleting.reopen(every[name], [deleting.Shard("", 0)] if name == "text_tiny" else [], lambda: None)
    else:
        deleting.discard(every[how].path, lambda: None)
    return store


@pytest.mark.parametrize(
    "how", ["repair", "half a repair", "images", "text_tiny", "samples", "metadata", "stage_c", "duplicates"]
)
def test_what_was_made_from_something_that_is_unfinished_is_reached_too(tmp_path, how):
    store = torn(how, tmp_path)
    assert holding(tmp_path) or how == "metadata"
    forget(store.root, {GONE})
    assert holding(tmp_path) == set()
    now = found(store)
    assert "panel.png" not in now["stage_c"].files if "stage_c" in now else how == "stage_c"
    for artifact in now.values():
        for name in artifact.files:
            artifact.read(name)
    once = contents(tmp_path)
    forget(store.root, {GONE, URLS[1][1]})
    assert contents(tmp_path) == once


def test_after_a_stopped_repair_the_same_shards_are_made_anew_of_all_and_nothing_is_trained_again(tmp_path):
    """The shard of images may come out otherwise; contents stay those of the build, so that nothing is stale."""
    store = torn("repair", tmp_path)
    before = {artifact.path: artifact.manifest for artifact in store.finished()}
    assert {*before} & {path for path in before if "/stage_c/" in path or "/samples/" in path}
    forget(store.root, {GONE})
    for name, folder in (BY_SHARD | {"images": ""}).items():
        (path,) = store.folders(name)
        assert shards.finished(storage.join(path, *filter(None, [folder]))) == {}, name  # 0 by the repair, 1 by us
    assert {"stage_c", "samples", "scores", "release"} <= found(store).keys()
    assert {"view_fine", "held_out", *BY_SHARD, "images"}.isdisjoint(found(store))
    for artifact in found(store).values():
        assert artifact.manifest["content"] == before[artifact.path]["content"]


def test_after_a_kill_between_such_openings_the_next_removal_reaches_everything(tmp_path, monkeypatch):
    class Killed(BaseException):
        """The process ends here."""

    torn("repair", tmp_path / "whole")
    for touch in itertools.count(1, 4):
        root = tmp_path / str(touch)
        shutil.copytree(tmp_path / "whole", root)
        left = itertools.count()

        def deadly(function: Any, left: Any = left, touch: int = touch) -> Any:
            def call(*arguments: Any) -> Any:
                if "/claims/" not in str(arguments[-1]) and next(left) == touch:
                    raise Killed
                return function(*arguments)

            return call

        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            for name in ("publish", "remove", "move"):
                patched.setattr(storage, name, deadly(getattr(storage, name)))
            forget(str(root), {GONE})
        if next(left) <= touch:
            break
        forget(str(root), set())
        assert holding(root) == set(), f"killed at touch {touch}"
        for artifact in Store(str(root)).finished():
            for name in artifact.files:
                artifact.read(name)
    assert touch > 12


def test_of_a_stopped_repair_elsewhere_nothing_is_lost(tmp_path):
    """Who asks for another picture leaves all shards without it."""
    store = torn("repair", tmp_path)
    (path,) = store.folders("text_tiny")
    forget(store.root, {"http://unknown.invalid/"})
    assert sorted(shards.finished(path)) == [1]
    forget(store.root, {KEYS[0][0]})
    assert sorted(shards.finished(path)) == [1]


def test_unfinished_samples_are_drawn_anew_for_the_captions_that_are_left(store, monkeypatch):
    path = store.path("samples", "unfinished")
    monkeypatch.setattr(sample, "CHUNK", 1)
    config = compose.load("stage_c", ["scale=micro", "sample.limit=5"])

    def prompts() -> list[str]:
        """Names of the pictures that are drawn, in their order."""
        found_now, _ = prompt_sets.read(config, TRAINING, {"images": found(store)["images"]})
        return [f"generated/{prompt.key}.png" for prompt in found_now]

    for chunk, name in enumerate(prompts()):
        entry = storage.publish(PNG, storage.join(path, name))
        shards.publish_receipt(path, chunk, rows_in=1, rows_out=1, files={name: entry}, clock=Clock())
    forget(store.root, {KEYS[0][0]})
    drawn = {name for receipt in shards.finished(path).values() for name in receipt.files}
    todo = {name for chunk, name in enumerate(prompts()) if chunk not in shards.finished(path)}
    assert drawn | todo == set(prompts())


def test_what_a_killed_training_has_shown_is_made_anew(store):
    path = Path(store.path("stage_a", "unfinished"))
    names = ("stage_a.safetensors", "panel.png", "building/result.json", "building/checkpoints/stage_a/4.safetensors")
    for name in names:
        storage.publish(b"content", str(path / name))
    forget(store.root, {"http://unknown.invalid/"})
    assert len(storage.listing(str(path))) == 4
    forget(store.root, {GONE})
    assert storage.listing(str(path)) == ["building/checkpoints/stage_a/4.safetensors", "stage_a.safetensors"]
