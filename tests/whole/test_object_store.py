"""The same code on an object store: an S3-compatible server in a process of its own, on loopback."""

import io
import pickle
import tarfile
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from datasets.buckets import Frame
from datasets.files import storage
from datasets.files.fence import unfenced
from datasets.files.storage import CorruptFile, FileEntry
from datasets.formats import shards
from datasets.formats.shards import Clock, Receipt
from datasets.left_out import LeftOut
from datasets.reading.batches import Source
from datasets.reading.bucket_batches import BucketBatches
from datasets.source_settings import WebdatasetConfig
from datasets.sources import webdataset
from pipeline.errors import ClaimLost, LeaseHeld
from pipeline.steps.train import _family
from pipeline.store import artifacts, claims, deleting
from pipeline.store.artifacts import Fingerprint, Store


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_root")


def test_files_are_published_read_listed_and_removed(folder):
    entry = storage.publish(b"content", f"{folder}/a/b.bin")
    assert storage.publish(b"other", f"{folder}/a/c/d.bin").bytes == 5
    assert storage.read(f"{folder}/a/b.bin", expect=entry) == b"content"
    assert storage.listing(folder) == ["a/b.bin", "a/c/d.bin"]
    assert storage.listing(f"{folder}/nothing") == []
    assert storage.exists(f"{folder}/a/b.bin")
    assert not storage.exists(f"{folder}/a/x.bin")
    storage.remove(f"{folder}/a/c")
    storage.remove(f"{folder}/a/never.bin")
    assert storage.listing(folder) == ["a/b.bin"]


def test_files_and_folders_are_copied_to_where_they_can_be_opened(folder, tmp_path):
    """As weights and tokenizers are, which libraries open by themselves; what is local is opened in place."""
    contents = {"one.bin": b"1", "deep/two.json": b"{}"}
    for name, content in contents.items():
        storage.publish(content, f"{folder}/model/{name}")
    (here := tmp_path / "here").mkdir()
    one, whole = (storage.local_copy(f"{folder}/model{name}", here) for name in ("/one.bin", "/"))
    assert one.read_bytes() == b"1"
    assert {name: (whole / name).read_bytes() for name in contents} == contents
    assert any(here.iterdir()) == storage.is_remote(folder)


def test_receipts_are_read_together(folder):
    made = {
        shard: shards.publish_receipt(folder, shard, rows_in=1, rows_out=1, files={}, clock=Clock())
        for shard in range(40)
    }
    assert shards.finished(folder) == made


def test_other_bytes_are_noticed(folder):
    entry = storage.publish(b"content", f"{folder}/x")
    storage.publish(b"c0ntent", f"{folder}/x")
    with pytest.raises(CorruptFile, match="does not hold the 7 bytes"):
        storage.read(f"{folder}/x", expect=entry)


def test_only_the_first_creates(folder):
    assert storage.create(b"mine", f"{folder}/lease")
    assert not storage.create(b"theirs", f"{folder}/lease")
    assert storage.read(f"{folder}/lease") == b"mine"


def test_an_artifact_is_done_when_its_manifest_stands(folder):
    store = Store(folder)
    print_ = Fingerprint("fetch", 1, {"seed": 0}, {})
    path = store.path("metadata", print_.digest)
    storage.publish(b"half", f"{path}/building/receipts/0.json")
    assert store.started("metadata", print_.digest)
    assert store.find("metadata", print_.digest) is None
    files = {"x": storage.publish(b"whole", f"{path}/x")}
    facts = {"files": files, "rows": 1, "timed": [], "created": "2026-01-01T00:00:00+00:00"}
    deleting.tidy(store.commit("metadata", print_, facts), unfenced)
    (found,) = store.finished()
    assert found.read("x") == b"whole"
    assert found.files == {"x": FileEntry(5, files["x"].sha256)}
    assert storage.listing(path) == ["manifest.json", "x"]


def test_a_build_is_claimed_fenced_taken_over_and_discarded(folder):
    store, print_ = Store(folder), Fingerprint("fetch", 1, {"seed": 0}, {})
    path, what = store.path("metadata", print_.digest), claims.artifact("metadata", print_.digest)
    facts = {"files": {"x": storage.publish(b"whole", f"{path}/x")}, "rows": 1, "timed": [], "created": "2026-01-01"}
    lost = claims.take(folder, what, print)
    lost.release()  # as if it were dead
    with claims.hold(folder, what, print) as claim:
        with pytest.raises(ClaimLost, match=r"metadata/.* was taken over by"):
            store.commit("metadata", print_, facts, lost)
        assert store.find("metadata", print_.digest) is None
        claim.beat()
        with pytest.raises(LeaseHeld):
            claims.take(folder, what, print)
        store.commit("metadata", print_, facts, claim)
        assert storage.listing(path) == ["manifest.json", "x"]
        storage.publish(b"state", f"{path}/building/checkpoints/a/1.json")
        (found,) = store.finished()
        deleting.tidy(found, claim.fence)
        assert storage.listing(path) == ["manifest.json", "x"]
        deleting.discard(path, claim.fence)
        assert storage.listing(path) == []
    assert storage.listing(f"{folder}/claims/{what}") == ["000002.json"]
    with claims.at_work(folder, "1"):
        assert claims.runs_at_work(folder, print).keys() == {"1"}
    assert claims.runs_at_work(folder, print) == {}


def test_what_a_loser_has_put_beside_its_place_does_not_get_there(folder, monkeypatch):
    what, place = "artifacts/metadata/0", f"{folder}/artifacts/metadata/0"
    claim, move = claims.take(folder, what, print), storage.move

    def after_a_while(source: str, target: str) -> None:
        claim.release()
        claims.take(folder, what, print)
        move(source, target)

    monkeypatch.setattr(storage, "move", after_a_while)
    with pytest.raises(ClaimLost):
        claim.publish(b"manifest", f"{place}/manifest.json")
    assert storage.listing(place) == []


@pytest.mark.parametrize("count", [64, 640])
def test_a_training_asks_the_store_once_for_an_artifact_whatever_its_shards_ranks_frames_and_buckets(
    s3, s3_root, monkeypatch, count
):
    monkeypatch.setattr(artifacts, "lacking", lambda path, files: None)  # the shards themselves are not read here
    store, frames = Store(s3_root), [Frame(256, 2.0), Frame(512, 2.0)]
    folders = {"images": [""], "latents_a": [frame.name for frame in frames]}
    for name, inside in folders.items():
        shards_of = {folder: [receipt(number) for number in range(count)] for folder in inside}
        facts = {"files": {}, "shards": shards_of, "rows": 4 * count, "timed": [], "created": "2026-01-01"}
        store.commit(name, Fingerprint(name, 1, {}, {}), facts)
    before = len(s3.asked)
    images, latents = (store.find(name, Fingerprint(name, 1, {}, {}).digest) for name in folders)
    sources = {frame: [Source("image", images.shards()), _family(latents, "latents_a", frame)] for frame in frames}
    sent = pickle.dumps(sources)
    for _ in range(4):  # ranks
        for frame, read in pickle.loads(sent).items():
            assert BucketBatches(read, frame, 0, []).rows == 4 * count
    asked = s3.asked[before:]
    assert sum("/shards.parquet" in path for _, path in asked) == len(folders)
    assert not any("/receipts/" in path for _, path in asked)
    assert len(asked) <= 4 * len(folders)  # manifest, removals, table: whether there, and what
    assert len(sent) < 600 * count + 10_000


def receipt(number: int) -> Receipt:
    """Of a shard of four pictures in one of four buckets."""
    bucket = ("256x256", "192x320", "320x192", "128x384")[number % 4]
    entry = storage.entry_of(b"%d" % number)
    return Receipt(number, 4, 4, {}, {shards.tensor_name(number): entry}, 1.0, 1, "host", bucket=bucket)


def test_tars_of_others_are_read_and_served_in_place(folder):
    picture, members = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (48, 40), "red").save(picture, "PNG")
    with tarfile.open(fileobj=members, mode="w") as tar:
        for name, content in (("x.png", picture.getvalue()), ("x.txt", b"a red square")):
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    storage.publish(members.getvalue(), f"{folder}/tars/deep/0.tar")
    storage.publish(members.getvalue()[:1000], f"{folder}/tars/1.tar")
    config = WebdatasetConfig(path=f"{folder}/tars", max_bytes=1 << 20)
    left_out = LeftOut()
    (row,) = (row for table in webdataset.tables(config, left_out) for row in table.to_pylist())
    assert (row["TEXT"], row["WIDTH"], row["HEIGHT"]) == (b"a red square", 48, 40)
    assert left_out.counts == {"damaged_tar": 1, "no_caption": 1}
    with webdataset.hosts(config) as hosts:
        host, port = hosts[webdataset.HOST]
        url = row["URL"].replace(webdataset.HOST, f"{host}:{port}")
        assert urllib.request.urlopen(url).read() == picture.getvalue()
