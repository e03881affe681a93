"""Forgetting: what is left is as if the picture had never been kept."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from datasets.config import DataError
from datasets.files import storage
from datasets.files.storage import CorruptFile
from datasets.formats import shard_table, shards
from datasets.formats.shards import INDEX, Clock, ImageRow
from datasets.planning import plan, plan_files, urls
from datasets.reading import captions, duplicates, views
from datasets.reading.batches import Batches
from pipeline.errors import LeaseHeld, UsageError
from pipeline.store.artifacts import Artifact
from pipeline.store.removal_list import listed, refused, requests
from pipeline.terminal import out
from pipeline.tracking import outbox
from pipeline.verbs.data import forgetting
from pipeline.verbs.data.forget import forget as told_forget
from pipeline.verbs.data.forgetting import forget
from tests.pipeline.verbs.data.forgettable import (
    BODIES,
    COPY,
    GONE,
    KEYS,
    ORIGIN,
    PNG,
    ROWS,
    URLS,
    built,
    card,
    commit,
    contents,
    found,
    image_rows,
    index,
    tensors,
    text_source,
)
from tests.pipeline.verbs.data.forgettable import store as store  # the fixture


@pytest.mark.parametrize("store", [False, True], indirect=True, ids=["now", "earlier"])
@pytest.mark.parametrize("by", [GONE, URLS[1][1], ORIGIN], ids=["key", "URL", "origin"])
def test_what_is_left_is_as_if_the_picture_had_never_been_kept(store, by):
    before = {name: artifact.manifest for name, artifact in found(store).items()}
    outcome = forget(store.root, {by})
    assert outcome.pictures == {GONE}
    assert outcome.trained == {"stage_c"}
    assert outcome.alike == {KEYS[0][2]}
    now = found(store)
    for artifact in now.values():
        assert artifact.manifest["fingerprint"] == before[artifact.name]["fingerprint"]
        for name in artifact.files:
            artifact.read(name)
        assert artifact.manifest["bytes"] == sum(entry.bytes for entry in artifact.files.values())
    images, text, samples = (now[name] for name in ("images", "text_tiny", "samples"))
    assert images.read("00001.tar") == shards.write_images(image_rows(1, GONE))
    assert text.read("00001.parquet") == now["latents_c"].read("128/00001.parquet") == tensors(1, GONE)
    assert images.read("00000.tar") == shards.write_images(image_rows(0))
    assert views.stored_keys(images.read("00001.parquet")).to_pylist() == [KEYS[1][0], KEYS[1][2]]
    assert [now[name].manifest["rows"] for name in ("images", "text_tiny", "latents_c", "samples")] == [5, 5, 5, 1]
    assert images.manifest["notes"]["lost"] == {"gone": 2, "forgotten": 1}
    assert shards.receipt(images.path, 1).dropped == {"forgotten": 1, "gone": 1}
    assert shards.receipt(text.path, 1).rows_in == shards.receipt(text.path, 1).rows_out == 2
    kept = KEYS[0][0]
    assert {*samples.files} == {f"original/{kept}.png", f"generated/{kept}.png", "samples.parquet", "captions.json"}
    assert [row["key"] for row in json.loads(samples.read("captions.json"))] == [kept]
    assert [row["key"] for row in json.loads(now["scores"].read("scores.json"))] == [kept]
    assert now["features_training-reference"].read("00001.parquet") == tensors(1, GONE)
    assert now["features_training-reference"].manifest["rows"] == 2
    assert now["release"].read("README.md").decode() == card("caption")
    assert {*now["stage_c"].files} == {"stage_c.safetensors"}
    hashed = {"hashes/00000.parquet", "hashes/00001.parquet"}
    assert {*now["duplicates"].files} == {*hashed, duplicates.FILE, shard_table.FILE}
    for name, folder in {"images": "", "text_tiny": "", "latents_c": "128", "duplicates": "hashes"}.items():
        assert now[name].shards(folder).counts() == {0: 3, 1: 2}
        assert {*now[name].shards(folder)[1].files.values()} <= {*now[name].files.values()}
    assert now["duplicates"].read("hashes/00001.parquet") == tensors(1, GONE)
    assert duplicates.by_shard(now["duplicates"].read(duplicates.FILE)) == {}
    stored = [path for path, content in contents(Path(store.root)).items() if GONE.encode() in content]
    assert not [path for path in stored if Path(path).suffix in (".tar", ".png")]


def test_trainings_and_their_views_go_on_without_it_and_with_the_one_that_looked_like_it(store):
    assert found(store)["view_fine"].manifest["rows"] == 3
    forget(store.root, {GONE})
    now = found(store)
    view = views.read(now["view_fine"].read(views.FILE))
    for data, rows in (
        (Batches([text_source(now["text_tiny"])], seed=0), 5),
        (Batches([text_source(now["text_tiny"])], seed=0, view=view), 3),
    ):
        assert data.rows == rows
        assert bytes.fromhex(GONE) not in {bytes(key) for key in data.read(0, rows)["key"]}
    assert now["view_fine"].manifest["rows"] == 3


@pytest.mark.parametrize("store", [False, True], indirect=True, ids=["now", "earlier"])
def test_what_is_held_out_is_so_afterwards_but_for_the_picture(store):
    def keys(artifact: Artifact) -> list[str]:
        view = views.read(artifact.read(views.FILE))
        images = found(store)["images"]
        stored = [views.stored_keys(images.read(shards.index_name(shard))).to_pylist() for shard in range(2)]
        return [stored[shard][place] for shard in range(2) for place in view.places(shard)]

    before = keys(found(store)["held_out"])
    assert len(before) > 1
    assert GONE in before
    forget(store.root, {GONE})
    now = found(store)["held_out"]
    assert keys(now) == [key for key in before if key != GONE]
    assert now.manifest["rows"] == len(before) - 1


@pytest.mark.parametrize("by", [GONE, URLS[1][1], COPY], ids=["key", "URL", "copy"])
def test_a_picture_goes_wherever_its_bytes_lie_and_their_hash_stays_on_the_list(tmp_path, by):
    store = built(tmp_path, bodies=BODIES)
    path = Path(store.path("images", "unfinished"))  # of a download that was killed: one shard done, one not
    for shard in range(2):
        files = {shards.index_name(shard): index(shard, BODIES), shards.image_name(shard): PNG}
        made = {name: storage.publish(content, str(path / name)) for name, content in files.items()}
        if not shard:
            shards.publish_receipt(str(path), shard, rows_in=3, rows_out=3, files=made, clock=Clock())
    outcome = forget(store.root, {by})
    assert outcome.pictures == {GONE, COPY}
    assert refused(store.root) >= {by, "a" * 64, GONE if by == COPY else COPY}
    assert "b" * 64 not in refused(store.root)
    assert all(request.done for request in requests(store.root))
    images = found(store)["images"]
    stored = {key for shard in range(2) for key in views.stored_keys(images.read(shards.index_name(shard))).to_pylist()}
    assert stored == {KEYS[0][0], KEYS[0][2], KEYS[1][0], KEYS[1][2]}
    assert storage.listing(str(path)) == []
    assert forget(store.root, {by}).pictures == set()
    assert len(requests(store.root)) == 2


def test_what_only_a_killed_download_had_is_remembered_by_its_hash_too(tmp_path):
    store = built(tmp_path)
    for name in ("unfinished", "damaged"):
        content = index(1, BODIES) if name == "unfinished" else b"none"
        storage.publish(content, storage.join(store.path("images", name), shards.index_name(1)))
    forget(store.root, {GONE})
    assert "a" * 64 in refused(store.root)


def test_the_hash_is_on_the_list_before_the_picture_goes(tmp_path, monkeypatch):
    class Killed(BaseException):
        """The process ends here."""

    store = built(tmp_path, bodies=BODIES)
    before = contents(tmp_path)

    def deadly(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched, contextlib.suppress(Killed):
        patched.setattr(forgetting, "_from_torn", deadly)
        forget(store.root, {GONE})
    assert contents(tmp_path) == before
    assert refused(store.root) >= {GONE, COPY, "a" * 64}
    assert forget(store.root, set()).pictures == {GONE, COPY}
    assert all(request.done for request in requests(store.root))


def test_a_request_from_before_hashes_were_kept_counts_as_it_did(store):
    old = {"when": "2024-01-01T00:00:00+00:00", "keys": [GONE], "urls": [ORIGIN]}
    name = "2024-01-01T000000+0000-abcdef.json"
    storage.publish(json.dumps(old).encode(), storage.join(store.root, "forgotten", name))
    assert refused(store.root) == {GONE, ORIGIN}
    assert forget(store.root, set()).pictures == {GONE}


def test_a_second_time_changes_nothing(store):
    forget(store.root, {GONE})
    once = contents(Path(store.root))
    outcome = forget(store.root, {GONE, URLS[1][1]})
    assert not outcome.pictures
    assert contents(Path(store.root)) == once


def test_a_key_stands_for_its_picture_whatever_else_is_written_about_it(store):
    known = [(URLS[1][1], "another caption"), ("https://elsewhere.invalid/copy.png", "a third"), (URLS[0][1], "other")]
    rows = [
        {"key": plan.key_of(*names), "url": names[0], "caption": names[1], "shard": 0, "row": row}
        | {"origin": ORIGIN if row == 1 else None}
        for row, names in enumerate(known)
    ]
    content = plan_files.parquet_bytes(pa.Table.from_pylist(rows, schema=plan.SCHEMA), 3)
    metadata = commit(store, "metadata", {"plan/00000.parquet": content}, 3, settings={"seed": 1})
    stored = [ImageRow(row["row"], row["key"], row["url"], row["caption"], "png", PNG) for row in rows]
    table = [{"key": row["key"], "row": row["row"], "status": "ok"} for row in rows]
    files = {shards.image_name(0): shards.write_images(stored), shards.index_name(0): shards.table_bytes(table, INDEX)}
    images = commit(store, "images", files, 3, metadata, lost={})
    shards.publish_receipt(images.path, 0, rows_in=3, rows_out=3, files=images.files, clock=Clock())
    unknown = "f" * 32
    nowhere = "https://nowhere.invalid/x.png"
    outcome = forget(store.root, {GONE, unknown, nowhere})
    assert outcome.pictures == {GONE, rows[0]["key"], rows[1]["key"]}
    assert outcome.unplanned == {unknown, nowhere}
    (request,) = requests(store.root)
    assert {*request.keys, *request.urls} == {GONE, unknown, nowhere, URLS[1][1], ORIGIN}


def test_a_url_is_forgotten_in_any_spelling_that_means_the_same(store):
    asked = "/./".join(URLS[1][1].rsplit("/", 1))
    assert urls.equal(asked) == URLS[1][1] != asked
    outcome = forget(store.root, {asked})
    assert outcome.pictures == {GONE}
    assert not outcome.unplanned


def test_pictures_in_mlflow_and_on_their_way_there_are_deleted(store):
    folder = Path(store.root, "mlflow")
    storage.publish(PNG, str(folder / "artifacts/run/artifacts/images/samples+step+0.png"))
    storage.publish(b"seed: 0", str(folder / "artifacts/run/artifacts/config.yaml"))
    kept = {"kind": "metrics", "run": "a", "rows": [["loss", 1.0, 0, 0]]}
    alive = outbox.Outbox(folder / "unsent/there", "alive", lambda _: 1 / 0)
    for record in (kept, {"kind": "image", "run": "a", "png": "iVBORw"}):
        alive.add(record)
    forget(store.root, {URLS[1][3]})  # which was never stored
    assert len(storage.listing(str(folder))) == 3
    with pytest.raises(LeaseHeld, match="has yet to end"):
        forget(store.root, {GONE})
    assert alive.close(60) == 2
    with open(alive.path, "a") as file:
        file.write('{"kind": "image", "png": "iVB')  # its process died in it
    forget(store.root, set())
    assert json.loads(alive.path.read_text()) == kept
    assert storage.listing(str(folder)) == ["artifacts/run/artifacts/config.yaml", "unsent/there/alive.jsonl"]


def test_what_lies_outside_the_root_is_named(store):
    for told in (True, False):
        with out.capture() as said:
            told_forget(store.root, {"keys": GONE}, as_json=False)
        assert ("cluster.cache.folder" in said.get()) == told


def test_a_damaged_shard_is_not_rewritten(store):
    path = Path(found(store)["images"].path, "00001.tar")
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match=r"00001\.tar does not hold"):
        forget(store.root, {GONE})
    assert path.read_bytes() == content


def test_what_is_neither_key_nor_url_is_refused(tmp_path):
    with pytest.raises(UsageError, match="keys=abc: a key has 32 hex digits"):
        listed("abc", "", "")
    with pytest.raises(UsageError, match="urls=nothing: 'nothing' is no http"):
        listed("", "nothing", "")
    with pytest.raises(DataError, match="from: there is no file none"):
        listed("", "", "none")
    (tmp_path / "list").write_text(f"{GONE}\nHTTP://Pictures.invalid/a.png\n")
    assert listed(KEYS[0][0], "", str(tmp_path / "list")) == {GONE, KEYS[0][0], "http://pictures.invalid/a.png"}


def test_of_several_captions_a_picture_their_pictures_are_counted(store):
    """As the receipts of such artifacts count from the beginning."""
    rows = {shard: image_rows(shard) for shard in range(2)}
    pictures = {shard: [(row.row, row.key) for row in found] for shard, found in rows.items()}
    tables = {
        shards.tensor_name(shard): captions.table_bytes(found, [["one", "another"]] * len(found))
        for shard, found in pictures.items()
    }
    written = commit(store, "captions_dense", tables, 2 * (ROWS - 1), found(store)["images"], sharded="")
    forget(store.root, frozenset({GONE}))
    now = store.find(*written.called)
    assert now is not None
    assert now.manifest["rows"] == 2 * (ROWS - 1) - 1
    assert sorted(receipt.rows_out for receipt in shards.finished(now.path).values()) == [ROWS - 2, ROWS - 1]
    assert GONE not in {key for name in tables for key in captions.by_key(now.read(name))}
