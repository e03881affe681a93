"""Artifacts: what counts as done, what a reader may see, which checkpoint is gone on from."""

import contextlib
import itertools
import json
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from datasets.files import notices, storage
from datasets.files.storage import CorruptFile
from datasets.formats import removal, shard_table, shards
from datasets.formats.shards import Clock
from datasets.reading.batches import Batches, Source
from pipeline.cluster.ranks.checkpoints import Checkpoints
from pipeline.errors import ClaimLost, InfrastructureError
from pipeline.store import claims, deleting
from pipeline.store.artifacts import MANIFEST, Artifact, Fingerprint, Store
from pipeline.store.removals import rewrite, tabulate

FACTS: dict[str, Any] = {"files": {}, "timed": [], "rows": 1, "notes": {}, "created": "2026-01-01"}
PRINT = Fingerprint("train_a", 1, {"lr": 0.1}, {"images": "0" * 16})


def commit(store: Store, content: bytes = b"weights"):
    entry = storage.publish(content, storage.join(store.path("stage_a", PRINT.digest), "weights"))
    return store.commit("stage_a", PRINT, {**FACTS, "files": {"weights": entry}})


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path) -> Store:
    """A store on a local folder, and one behind a URI that fsspec serves."""
    return Store(str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}")


def test_without_its_manifest_an_artifact_does_not_exist(store):
    storage.publish(b"weights", storage.join(store.path("stage_a", PRINT.digest), "weights"))
    assert store.find("stage_a", PRINT.digest) is None
    assert store.started("stage_a", PRINT.digest)
    artifact = commit(store)
    found = store.find("stage_a", PRINT.digest)
    assert found is not None
    assert found.manifest == artifact.manifest
    assert found.read("weights") == b"weights"
    assert [other.path for other in store.finished()] == [artifact.path]


def test_a_flipped_byte_is_noticed(store):
    artifact = commit(store)
    storage.publish(b"weighty", storage.join(artifact.path, "weights"))
    with pytest.raises(CorruptFile, match="weights does not hold the 7 bytes"):
        artifact.read("weights")


def test_the_content_hash_depends_on_bytes_only(store):
    first = commit(store).manifest["content"]
    assert commit(store).manifest["content"] == first
    assert commit(store, b"other").manifest["content"] != first


def test_the_content_hash_leaves_out_what_tells_of_times(store):
    def content(card: bytes, weights: bytes) -> str:
        path = store.path("release", PRINT.digest)
        contents = {"README.md": card, "weights": weights}
        files = {name: storage.publish(data, storage.join(path, name)) for name, data in contents.items()}
        facts = {"files": files, "timed": ["README.md"], "rows": 1, "created": "2026-01-01"}
        return store.commit("release", PRINT, facts).manifest["content"]

    assert content(b"card", b"weights") == content(b"another card", b"weights")
    assert content(b"card", b"weights") != content(b"card", b"others")
    assert content(b"card", b"weights") == "6b6c1d28df54a7c0948f30d3908bba678cf29c6d14a2cb85098abad4be25304c"


def test_fingerprints_of_today_are_those_of_every_day():
    """Roots name their folders by them."""
    clear = Fingerprint("train_c", 3, {"a.b": [1, 2.5, None, "Fuß"], "a": {"y": True, "x": {}}}, {"text": "0" * 16})
    assert clear.digest == "94ed7a3f60bfa4b5"
    assert PRINT.digest == "100d01f411d0c2b0"


def test_only_what_lies_at_its_place_is_an_artifact(store):
    """A release has files of diffusers' below it, somebody may have copied an artifact into another."""
    artifact = commit(store)
    text = storage.read(storage.join(artifact.path, MANIFEST))
    for place in ("", "stage_a", f"stage_a/{PRINT.digest}/inside", f"stage_a/{PRINT.digest}/in/side"):
        storage.publish(text, storage.join(store.root, "artifacts", place, MANIFEST))
    assert [found.path for found in store.finished()] == [artifact.path]
    assert [found.path for found in store.finished("stage_a")] == [artifact.path]


@pytest.mark.parametrize("content", [None, b"", b"weight"], ids=["missing", "empty", "cut short"])
def test_nothing_is_done_whose_files_are_not_there(store, content):
    path = store.path("stage_a", PRINT.digest)
    files = {"weights": storage.entry_of(b"weights"), "panel.png": storage.publish(b"", f"{path}/panel.png")}
    if content is not None:
        storage.publish(content, f"{path}/weights")
    facts = {"files": files, "timed": [], "rows": 1, "created": "2026-01-01"}
    with pytest.raises(
        InfrastructureError, match=rf"1 of 2 files in .*{PRINT.digest} are missing or cut short: weights$"
    ):
        store.commit("stage_a", PRINT, facts)
    assert store.find("stage_a", PRINT.digest) is None
    storage.publish(b"weights", f"{path}/weights")
    store.commit("stage_a", PRINT, facts)


def test_many_missing_files_are_not_all_named(store):
    files = dict.fromkeys("abcd", storage.entry_of(b"x"))
    with pytest.raises(InfrastructureError, match=r"4 of 4 files .*: a, b, c, \.\.\.$"):
        store.commit("stage_a", PRINT, {"files": files, "timed": [], "rows": 1, "created": "2026-01-01"})


@pytest.mark.parametrize("when", ["before", "after"])
def test_nothing_is_done_whose_folder_is_moved_aside_at_the_last_moment(store, when, monkeypatch):
    """By an earlier holder that wakes up, and cannot put it back: there is a new one, with the manifest on its way."""
    claim = claims.take(store.root, claims.artifact("stage_a", PRINT.digest), print)
    path = store.path("stage_a", PRINT.digest)
    facts = {"timed": [], "rows": 1, "created": "2026-01-01"}
    facts["files"] = {"weights": storage.publish(b"weights", f"{path}/weights")}
    publish = storage.publish

    def meanwhile(content: bytes, place: str) -> storage.FileEntry:
        if "/commit-" not in place:
            return publish(content, place)
        if when == "before":
            storage.move(path, f"{store.root}/aside")
        entry = publish(content, place)
        if when == "after":
            storage.move(path, f"{store.root}/aside")
        return entry

    monkeypatch.setattr(storage, "publish", meanwhile)
    with pytest.raises(InfrastructureError, match=r"1 of 1 files .* missing or cut short: weights"):
        store.commit("stage_a", PRINT, facts, claim)
    assert store.find("stage_a", PRINT.digest) is None
    monkeypatch.undo()
    publish(b"weights", f"{path}/weights")
    store.commit("stage_a", PRINT, facts, claim)


def test_a_holder_that_lost_commits_nothing_and_touches_nothing(store):
    claim = claims.take(store.root, claims.artifact("stage_a", PRINT.digest), print)
    path = store.path("stage_a", PRINT.digest)
    files = {"weights": storage.publish(b"weights", f"{path}/weights")}
    storage.publish(b"{}", f"{path}/forgotten.json")
    claim.release()
    claims.take(store.root, claims.artifact("stage_a", PRINT.digest), print)
    facts = {"files": files, "timed": [], "rows": 1, "created": "2026-01-01"}
    with pytest.raises(ClaimLost):
        store.commit("stage_a", PRINT, facts, claim)
    assert storage.listing(path) == ["forgotten.json", "weights"]


def test_a_fence_stands_before_every_change_of_a_finished_artifact(store):
    artifact = commit(store)

    def closed() -> None:
        raise ClaimLost("gone")

    with pytest.raises(ClaimLost):
        rewrite(artifact, "weights", lambda content: None, closed)
    assert storage.listing(artifact.path) == ["manifest.json", "weights"]
    assert rewrite(artifact, "weights", lambda content: None)
    storage.publish(b"weights", f"{artifact.path}/weights")
    (found,) = store.finished()
    with pytest.raises(ClaimLost):
        rewrite(found, "weights", lambda content: None, closed)
    assert storage.exists(f"{artifact.path}/weights")


def test_a_checkpoint_of_a_holder_that_lost_does_not_count(tmp_path):
    def closed() -> None:
        raise ClaimLost("gone")

    Checkpoints(str(tmp_path), print).save(1, b"state", {})
    lost = Checkpoints(str(tmp_path), print, fence=closed)
    with pytest.raises(ClaimLost):
        lost.save(2, b"state 2", {})
    assert newest(lost) == [b"state"]


def test_removals_from_an_earlier_build_do_not_count_for_a_later_one(store):
    artifact = commit(store)
    assert rewrite(artifact, "weights", lambda content: None)
    assert not store.find("stage_a", PRINT.digest).files
    storage.remove(storage.join(artifact.path, MANIFEST))  # and killed there, in the midst of `discard`
    commit(store)
    assert {*store.find("stage_a", PRINT.digest).files} == {"weights"}


def test_a_holder_that_slept_anywhere_in_its_commit_takes_no_removal_of_the_next_one_away(tmp_path, monkeypatch):
    """A build was forgotten in, discarded and is made anew; at each touch of that commit another run takes over,
    commits, and a picture is forgotten there, before the first one wakes up."""

    class Sleep:
        """Before the n-th touch of the artifact by a commit; what happens meanwhile does not sleep."""

        def __init__(self, touch: int, meanwhile: Callable[[], None]):
            self.left, self.meanwhile = touch, meanwhile

        def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                self.left -= 1
                if self.left == 0:
                    self.meanwhile()
                return function(*arguments, **named)

            return call

    def facts(store: Store) -> dict[str, Any]:
        path = store.path("text", PRINT.digest)
        receipt = shards.publish_receipt(
            path,
            0,
            rows_in=4,
            rows_out=4,
            files={"00000.parquet": storage.publish(b"0", f"{path}/00000.parquet")},
            clock=Clock(),
        )
        files = {"panel.png": storage.publish(b"all of them", f"{path}/panel.png")}
        about = {"timed": [], "rows": 4, "notes": {}, "created": "2026-01-01"}
        return {"files": files, "shards": {"": [receipt]}, **about}

    def take_over(store: Store, claim: claims.Claim) -> None:
        claim.release()  # as if it were dead
        other = claims.take(store.root, claim.fence.what, print)
        if not store.find("text", PRINT.digest):
            store.commit("text", PRINT, facts(store), other)
        found = store.find("text", PRINT.digest)
        assert found is not None
        rewrite(found, "panel.png", lambda content: None, other.fence)

    touches = 0
    for touch in itertools.count(1):
        store = Store(str(tmp_path / str(touch)))
        first = store.commit("text", PRINT, facts(store))
        rewrite(first, "panel.png", lambda content: b"fewer")
        storage.remove(storage.join(first.path, MANIFEST))  # and killed there, in the midst of `discard`
        told, claim = facts(store), claims.take(store.root, claims.artifact("text", PRINT.digest), print)
        sleep = Sleep(touch, partial(take_over, store, claim))
        with monkeypatch.context() as patch:
            for name in ("publish", "remove", "move", "exists", "sizes", "sweep"):
                patch.setattr(storage, name, sleep.before(getattr(storage, name)))
            with contextlib.suppress(ClaimLost, InfrastructureError):  # the other one's removal took a file of ours
                store.commit("text", PRINT, told, claim)
        if sleep.left > 0:
            break
        touches += 1
        now = store.find("text", PRINT.digest)
        assert now is not None
        assert "panel.png" not in now.files, f"asleep before touch {touch}"
        assert now.shards().counts() == {0: 4}
    assert touches >= 7


def test_a_removal_of_a_build_before_builds_had_names_counts_for_it_and_for_no_later_one(store):
    artifact = commit(store)
    manifest = {key: value for key, value in artifact.manifest.items() if key != "build"}
    storage.publish(json.dumps(manifest).encode(), storage.join(artifact.path, MANIFEST))
    (found,) = store.finished()
    assert rewrite(found, "weights", lambda content: b"less")
    record = {**json.loads(storage.read(f"{artifact.path}/forgotten.json"))}
    assert record.pop("build") == ""
    storage.publish(json.dumps(record).encode(), f"{artifact.path}/forgotten.json")
    (found,) = store.finished()
    assert found.read("weights") == b"less"
    commit(store)
    (found,) = store.finished()
    assert found.read("weights") == b"weights"
    assert rewrite(found, "weights", lambda content: None)
    (found,) = store.finished()
    assert not found.files


def test_a_manifest_of_another_format_is_refused(store):
    artifact = commit(store)
    text = json.dumps({**artifact.manifest, "format": 99}).encode()
    storage.publish(text, storage.join(artifact.path, "manifest.json"))
    with pytest.raises(CorruptFile, match="has format 99"):
        store.find("stage_a", PRINT.digest)


def test_a_failed_publish_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    storage.publish(b"old", str(target))
    with pytest.raises(FileNotFoundError):
        storage.publish(tmp_path / "missing", str(target))
    assert target.read_bytes() == b"old"
    assert storage.listing(str(tmp_path)) == ["file"]


def newest(states: Checkpoints) -> list[bytes] | None:
    found = states.newest()
    return [read() for read in found.parts] if found else None


def test_the_newest_valid_checkpoint_wins(tmp_path):
    warnings: list[str] = []
    states = Checkpoints(str(tmp_path), warnings.append)
    assert newest(states) is None
    for step in (10, 20, 30):
        states.save(step, b"state %d" % step, {})
    assert newest(states) == [b"state 30"]
    assert len(storage.listing(str(tmp_path))) == 4  # two kept, each with its marker
    next(tmp_path.glob("000000030-*.safetensors")).write_bytes(b"state 3x")
    assert newest(states) == [b"state 20"]
    assert "checkpoint of step 30 skipped" in warnings[0]
    next(tmp_path.glob("000000020-*.json")).unlink()
    assert newest(states) is None


def test_a_checkpoint_counts_once_all_its_parts_are_there(tmp_path):
    warnings: list[str] = []
    first, second = (Checkpoints(str(tmp_path), warnings.append, part, parts=2) for part in (0, 1))
    for step in (10, 20, 30):
        first.save(step, b"first %d" % step, {})
        if step < 30:
            second.save(step, b"second %d" % step, {})
    assert len(storage.listing(str(tmp_path))) == 10  # two whole ones are kept, and the half one
    for parts in (1, 2, 4):
        assert newest(Checkpoints(str(tmp_path), warnings.append, 0, parts)) == [b"first 20", b"second 20"]
    assert "checkpoint of step 30 skipped" in warnings[0]
    second.save(30, b"second 30", {})
    second.save(40, b"second 40", {})
    first.save(40, b"first 40", {})
    assert newest(Checkpoints(str(tmp_path), warnings.append)) == [b"first 40", b"second 40"]
    assert len(storage.listing(str(tmp_path))) == 8


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_checkpoint_is_never_loaded(tmp_path, damage, suffix):
    """40 truncations, 100 flipped bits of a file and of a marker, or they are gone: always the one before."""
    generator = np.random.default_rng(0)
    warnings: list[str] = []
    states = Checkpoints(str(tmp_path), warnings.append)
    content = generator.bytes(5000)
    for step in (1, 2):
        states.save(step, content + b"%d" % step, {"seed": step})
    file = tmp_path / f"000000002-0of1.{suffix}"
    whole = file.read_bytes()
    for number in range({"truncate": 40, "flip": 100}.get(damage, 1)):
        if damage == "truncate":
            file.write_bytes(whole[: generator.integers(len(whole))])
        elif damage == "flip":
            place = generator.integers(len(whole))
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << generator.integers(8)]) + whole[place + 1 :])
        else:
            file.unlink()
        assert newest(states) == [content + b"1"]
        assert len(warnings) == (0 if (damage, suffix) == ("delete", "json") else number + 1)
        assert list(states.recipes()) == [{"seed": 2}, {"seed": 1}][1 if suffix == "json" else 0 :]


# ------------------------------------------------------------------------------------------------------- shards


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


@pytest.mark.parametrize(
    ("notes", "place"),
    [
        ({"licence": "MIT", "source": "w.safetensors"}, None),  # of weights that were brought
        ({"licence": None}, None),
        ({"licence": {"licence": None}, "sources": []}, None),
        ({"captions": {"alt": 3, "long": 4}}, None),  # by their names
        ({"captions": "3"}, "captions"),
        ({"rejected": {"url": "1"}}, "rejected.url"),
    ],
)
def test_what_is_committed_is_what_every_reader_takes(store, notes, place):
    if place is None:
        store.commit("metadata", PRINT, {**FACTS, "notes": notes})
        assert store.find("metadata", PRINT.digest).manifest["notes"] == notes
    else:
        with pytest.raises(TypeError, match=rf"its notes\.{place} is"):
            store.commit("metadata", PRINT, {**FACTS, "notes": notes})
        assert store.find("metadata", PRINT.digest) is None


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
        store.commit("images", PRINT, {**FACTS, "rows": 4 * count, "shards": {"": receipts}})
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
