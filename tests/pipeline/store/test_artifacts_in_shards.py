"""Artifacts in shards: their table, their receipts, and how seldom a store is asked for them."""

import json
import pickle
from collections.abc import Iterator

import pytest

from datasets.files import notices, storage
from datasets.formats import removal, shard_table, shards
from datasets.formats.shards import Clock
from datasets.reading.batches import Batches, Source
from pipeline.store import deleting
from pipeline.store.artifacts import MANIFEST, Artifact, Fingerprint, Store
from pipeline.store.removals import rewrite, tabulate

PRINT = Fingerprint("encode_text", 1, {}, {"images": "0" * 16})


def in_shards(store: Store, count: int = 3, table: bool = True) -> Artifact:
    """An artifact with shards beside a file of its own; without their table as earlier versions made it."""
    path = store.path("text", PRINT.digest)
    files, receipts = {"tower": storage.publish(b"tower", storage.join(path, "tower"))}, []
    for number in range(count):
        name = shards.tensor_name(number)
        entry = storage.publish(b"%d" % number, storage.join(path, name))
        receipts.append(shards.publish_receipt(path, number, rows_in=4, rows_out=4, files={name: entry}, clock=Clock()))
        files |= {} if table else {name: entry}
    told = {"shards": {"": receipts}} if table else {}
    facts = {"files": files, "timed": [], "rows": 4 * count, "notes": {}, "created": "2026-01-01", **told}
    store.commit("text", PRINT, facts)
    found = store.find("text", PRINT.digest)
    assert found is not None
    return found


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What the storage passes over."""
    heard: list[str] = []
    with notices.heard_by(lambda notice: heard.append(str(notice))):
        yield heard


def test_files_of_shards_stand_in_a_table_and_the_manifest_stays_as_small_as_it_is(store, told):
    few, many = in_shards(store, 2), in_shards(store, 200)
    assert many.manifest["files"].keys() == {"tower", shard_table.FILE}
    assert len(pickle.dumps(many)) < len(pickle.dumps(few)) + 10
    names = {shards.tensor_name(number) for number in range(200)}
    assert many.files.keys() == {"tower", shard_table.FILE, *names}
    assert many.manifest["bytes"] == sum(entry.bytes for entry in many.files.values())
    assert many.manifest["objects"] == len(many.files)
    assert many.read("00117.parquet") == b"117"
    assert len(pickle.dumps(many)) < len(pickle.dumps(few)) + 10  # what was read meanwhile stays here
    assert told == []


def test_an_artifact_of_an_earlier_version_is_the_same_by_its_receipts_which_is_told(store, told):
    now = in_shards(store)
    content, counts, files = now.manifest["content"], now.shards().counts(), now.files
    deleting.discard(now.path, lambda: None)
    earlier = in_shards(store, table=False)
    manifest = {key: value for key, value in earlier.manifest.items() if key not in ("shards", "objects")}
    storage.publish(json.dumps(manifest | {"format": 1}).encode(), storage.join(earlier.path, MANIFEST))
    found = store.find("text", PRINT.digest)
    assert (found.manifest["content"], found.shards().counts()) == (content, counts)
    assert {**found.files, shard_table.FILE: files[shard_table.FILE]} == files
    assert found.shards()[1].read("00001.parquet") == b"1"
    assert len(told) == 1
    assert "there is none; the receipts of all shards are read in its place" in told[0]


@pytest.mark.parametrize("damage", [b"other", None], ids=["other bytes", "gone"])
def test_a_damaged_table_of_shards_is_passed_over_and_made_anew_by_a_repair(store, told, damage):
    artifact = in_shards(store)
    path = storage.join(artifact.path, shard_table.FILE)
    storage.remove(path)
    if damage:
        storage.publish(damage, path)
    assert store.find("text", PRINT.digest).shards().counts() == {0: 4, 1: 4, 2: 4}
    assert len(told) == 1
    deleting.reopen(store.find("text", PRINT.digest), [], lambda: None)
    assert store.started("text", PRINT.digest)
    assert sorted(shards.finished(artifact.path)) == [0, 1, 2]
    assert in_shards(store).shards().counts() == {0: 4, 1: 4, 2: 4}


def test_a_table_of_shards_counts_for_nothing_from_the_first_change_of_a_shard_until_it_is_made_anew(
    store, told, monkeypatch
):
    artifact = in_shards(store)
    assert rewrite(artifact, "00001.parquet", lambda content: b"fewer", shard=True)
    entry, receipt = storage.entry_of(b"fewer"), shards.receipt(artifact.path, 1)
    meanwhile = store.find("text", PRINT.digest)
    assert meanwhile.files["00001.parquet"] == entry
    assert shard_table.FILE not in meanwhile.files
    fewer = removal.from_receipt(receipt, {"00001.parquet": entry}, 3, downloaded=False)
    shards.put_receipt(artifact.path, fewer, lambda: None)
    assert store.find("text", PRINT.digest).shards().counts() == {0: 4, 1: 3, 2: 4}
    assert len(told) == 2
    with monkeypatch.context() as nobody:
        nobody.setattr(shards, "receipts", lambda folder: pytest.fail("all receipts were read"))
        tabulate(artifact, [""])
    after = store.find("text", PRINT.digest)
    table = storage.join(artifact.path, shard_table.FILE)
    assert storage.read(table) == shard_table.dump({"": shards.receipts(artifact.path).values()})
    assert after.shards().counts() == {0: 4, 1: 3, 2: 4}
    assert after.shards()[1].read("00001.parquet") == b"fewer"
    assert after.manifest["bytes"] == sum(entry.bytes for entry in after.files.values())
    assert len(told) == 2


@pytest.mark.parametrize("spoilt", [b"", b"another table", None])
def test_a_table_of_shards_that_is_lost_is_made_anew_from_all_receipts(store, told, spoilt):
    artifact = in_shards(store)
    table = storage.join(artifact.path, shard_table.FILE)
    whole = storage.read(table)
    assert rewrite(artifact, "00001.parquet", lambda content: b"other", shard=True)
    if spoilt is None:
        storage.remove(table)
    else:
        storage.publish(spoilt, table)
    tabulate(artifact, [""])
    assert storage.read(table) == whole  # no receipt says otherwise yet
    assert [line for line in told if shard_table.FILE in line and "receipts of all shards" in line] != []


def test_who_looks_for_artifacts_lists_nothing_inside_of_them(store, monkeypatch):
    listed: list[str] = []
    children = storage.children
    monkeypatch.setattr(storage, "children", lambda folder: listed.append(folder) or children(folder))
    monkeypatch.setattr(storage, "_files", lambda folder: pytest.fail(f"{folder} was listed whole"))
    for name in ("one", "two"):
        entry = storage.publish(b"x", storage.join(store.path(name, PRINT.digest), "x"))
        manifest = {"format": 2, "name": name, "fingerprint": PRINT.digest, **PRINT.as_dict()}
        manifest |= {"files": {"x": vars(entry)}, "rows": 1, "bytes": 1, "created": name}
        storage.publish(json.dumps(manifest).encode(), storage.join(store.path(name, PRINT.digest), MANIFEST))
    assert [artifact.name for artifact in store.finished()] == ["one", "two"]
    assert store.started("one", PRINT.digest)
    assert not store.started("three", PRINT.digest)
    folder = storage.join(store.root, "artifacts")
    assert listed == [folder, storage.join(folder, "one"), storage.join(folder, "two")]


@pytest.mark.parametrize("readers", [1, 4])
def test_a_training_asks_a_store_as_often_for_many_shards_as_for_few_before_its_first_sample(s3, s3_root, readers):
    """Manifest, table of the shards, removals: whoever asked once a shard would ask 50 million times at 100 million
    pictures."""

    def asked(count: int) -> list[str]:
        store = Store(storage.join(s3_root, str(count)))
        folder = store.path("images", PRINT.digest)
        receipts = []
        for number in range(count):
            names = [shards.image_name(number), shards.index_name(number)]
            files = {name: storage.publish(b"x", storage.join(folder, name)) for name in names}
            receipts.append(shards.publish_receipt(folder, number, rows_in=4, rows_out=4, files=files, clock=Clock()))
        facts = {"files": {}, "timed": [], "rows": 4 * count, "notes": {}, "created": "2026-01-01"}
        store.commit("images", PRINT, {**facts, "shards": {"": receipts}})
        before = len(s3.asked)
        found = Store(store.root).find("images", PRINT.digest)
        assert found is not None
        sources = [Source("image", found.shards())]
        for _ in range(readers):  # what is sent to a rank holds what was read
            assert Batches(pickle.loads(pickle.dumps(sources)), seed=0).rows == 4 * count
        return [method for method, _ in s3.asked[before:]]

    few, many = asked(2), asked(24)
    assert few == many
    assert len(few) <= 5
