"""Forgetting: what is left is as if the picture had never been kept, also after a kill at any moment."""

import contextlib
import itertools
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets.config import DataError, ViewConfig
from datasets.files import storage
from datasets.files.storage import CorruptFile, FileEntry
from datasets.formats import shard_table, shards
from datasets.formats.shards import INDEX, Clock, ImageRow, Receipt
from datasets.planning import plan, plan_files
from datasets.reading import captions, duplicates, holdout, views
from datasets.reading.batches import Batches, Source
from pipeline.errors import ClaimLost, LeaseHeld, UsageError
from pipeline.models import prompt_sets
from pipeline.run import repairing
from pipeline.settings import compose
from pipeline.settings.evaluation import TRAINING
from pipeline.steps import sample
from pipeline.steps.select import held_out, make
from pipeline.store import claims, deleting
from pipeline.store.artifacts import Artifact, Fingerprint, Store
from pipeline.store.removal_list import check_carried_out, listed, refused, requests
from pipeline.terminal import out
from pipeline.tracking import outbox
from pipeline.verbs import forgetting
from pipeline.verbs.data import forget as told_forget
from pipeline.verbs.forgetting import forget
from stages.settings.sampling import SamplingConfig
from stages.weights.card import CardFacts, model_card

ROWS = 4  # planned pictures of a shard; the last one of each is lost
URLS = [[f"http://pictures.invalid/{shard}/{row}.png" for row in range(ROWS)] for shard in range(2)]
KEYS = [[plan.key_of(url, "caption") for url in urls] for urls in URLS]
GONE = KEYS[1][1]
ORIGIN = "https://original.invalid/1.png"
PNG = b"\x89PNG..."


def caption(key: str) -> str:
    return "its name" if key == GONE else "caption"


def image_rows(shard: int, forgotten: str | None = None) -> list[ImageRow]:
    keys = KEYS[shard][: ROWS - 1]
    return [
        ImageRow(row, key, URLS[shard][row], "caption", "png", PNG + key.encode())
        for row, key in enumerate(keys)
        if key != forgotten
    ]


def tensors(shard: int, forgotten: str | None = None) -> bytes:
    rows = image_rows(shard, forgotten)
    return shards.write_tensors(rows, "text", np.array([[16 * shard + row.row] * 2 for row in rows], np.float16))


def index(shard: int, bodies: dict[str, str] | None = None) -> bytes:
    """What became of a shard's rows; `bodies` are hashes by key, as far as the test wants any."""
    rows = [
        {"key": key, "row": row, "status": "gone" if row == ROWS - 1 else "ok", "width": 9}
        | {"sha256": (bodies or {}).get(key)}
        for row, key in enumerate(KEYS[shard])
    ]
    return shards.table_bytes(rows, INDEX)


def commit(
    store: Store,
    name: str,
    files: dict[str, bytes],
    rows: int,
    *parents: Artifact,
    sharded: str | None = None,
    lost: int = 0,
    earlier: bool = False,
    version: int = 1,
    **about: Any,
) -> Artifact:
    """A finished artifact of these files, some of them of shards in a folder; without their table, as it once was."""
    settings, notes = about.pop("settings", {}), about.pop("notes", about)
    fingerprint = Fingerprint(
        name, version, settings, {parent.name: parent.manifest["fingerprint"] for parent in parents}
    )
    path = store.path(name, fingerprint.digest)
    entries = {file: storage.publish(content, storage.join(path, file)) for file, content in files.items()}
    facts = {"files": entries, "timed": [], "rows": rows, "notes": notes, "created": f"{len(list(store.finished()))}"}
    if sharded is not None:
        made = receipts(path, entries, sharded, lost)
        if not earlier:
            theirs = {f"{sharded}/{name}".removeprefix("/") for receipt in made for name in receipt.files}
            facts["shards"] = {sharded: made}
            facts["files"] = {file: entry for file, entry in entries.items() if file not in theirs}
    return store.commit(name, fingerprint, facts)


def receipts(path: str, entries: dict[str, FileEntry], folder: str, lost: int) -> list[Receipt]:
    made = []
    for shard in range(2):
        prefix = f"{folder}/{shard:05d}." if folder else f"{shard:05d}."
        files = {name.rpartition("/")[2]: entry for name, entry in entries.items() if name.startswith(prefix)}
        where = storage.join(path, folder) if folder else path
        kept, dropped = ROWS - 1, {"gone": 1} if lost else {}
        made.append(
            shards.publish_receipt(
                where, shard, rows_in=kept + lost, rows_out=kept, files=files, clock=Clock(), dropped=dropped
            )
        )
    return made


def hold_out(store: Store, metadata: Artifact, images: Artifact, repeated: Artifact, earlier: bool) -> None:
    """A share of the pictures, of which `GONE` is the last by its URL's hash; as it once was, by its key."""
    if earlier:
        share = int(GONE, 16) / 2**128 + 1e-6
        view = holdout.by_keys(range(2), index, share)
        made = partial(commit, store, "held_out", {views.FILE: views.dump(view)}, view.rows, images)
    else:
        share = holdout._place(URLS[1][1]) + 1e-6
        view = held_out(share, (), metadata, images, repeated)
        parents = (metadata, images, repeated)
        made = partial(commit, store, "held_out", {views.FILE: views.dump(view)}, view.rows, *parents, version=2)
    made(settings={"data.holdout": share})


def built(root: Path, earlier: bool = False, bodies: dict[str, str] | None = None) -> Store:
    """A root with one artifact of each kind that holds pictures, or something made of them; by an earlier version."""
    store = Store(str(root))
    sharded = partial(commit, store, earlier=earlier)
    planned = [
        {"key": key, "url": url, "caption": caption(key), "shard": shard, "row": row, "aesthetic": float(row)}
        | {"origin": ORIGIN if key == GONE else None}
        for shard in range(2)
        for row, (key, url) in enumerate(zip(KEYS[shard], URLS[shard], strict=True))
    ]
    rows = pa.Table.from_pylist(planned, schema=plan.SCHEMA)
    metadata = commit(store, "metadata", {"plan/00000.parquet": plan_files.parquet_bytes(rows, ROWS)}, 2 * ROWS)
    tars = {shards.image_name(shard): shards.write_images(image_rows(shard)) for shard in range(2)}
    indexes = {shards.index_name(shard): index(shard, bodies) for shard in range(2)}
    about = {"notes": {"lost": {"gone": 2}}}
    images = sharded("images", tars | indexes, 2 * (ROWS - 1), metadata, sharded="", lost=1, **about)
    values = {shards.tensor_name(shard): tensors(shard) for shard in range(2)}
    text = sharded("text_tiny", {**values, "tower.safetensors": b"weights"}, 2 * (ROWS - 1), images, sharded="")
    sized = {f"128/{name}": content for name, content in values.items()}
    sharded("latents_c", sized, 2 * (ROWS - 1), images, sharded="128")
    hashed = {f"hashes/{name}": content for name, content in values.items()}  # another table with keys
    twins = [{"shard": 0, "key": KEYS[0][2], "of": GONE, "kind": "exact"}]
    table = shards.parquet_bytes(pa.Table.from_pylist(twins, schema=duplicates.SCHEMA))
    seen = {**hashed, duplicates.FILE: table, "groups.png": PNG}
    repeated = sharded("duplicates", seen, 1, images, sharded="hashes")
    bounds: dict[str, Any] = {"min_aesthetic": 1.0, "duplicates": "drop"}
    content, chosen, _ = make(ViewConfig(**bounds), metadata, images, repeated)
    settings = {"data.views.fine": bounds}
    view = commit(store, "view_fine", {views.FILE: content}, chosen, metadata, images, repeated, settings=settings)
    hold_out(store, metadata, images, repeated, earlier)
    stage = commit(store, "stage_c", {"stage_c.safetensors": b"weights", "panel.png": PNG}, 6, text, view)
    captions = [{"key": key, "caption": caption(key), "seed": 1} for key in (GONE, KEYS[0][0])]
    pictures = {f"{folder}/{row['key']}.png": PNG for folder in ("original", "generated") for row in captions}
    tables = {"samples.parquet": shards.table_bytes(captions), "captions.json": json.dumps(captions).encode()}
    samples = commit(store, "samples", {**pictures, **tables, "grid.png": PNG}, 2, images, stage)
    commit(store, "features_training-reference", {shards.tensor_name(1): tensors(1)}, ROWS - 1, samples)
    measured = json.dumps([row | {"psnr_generated": 9.0} for row in captions]).encode()
    scores = commit(store, "scores", {"scores.json": measured}, 2, samples)
    commit(store, "release", {"README.md": card("its name").encode()}, 0, metadata, text, stage, samples, scores)
    return store


def card(prompt: str) -> str:
    return model_card(CardFacts("Würstchen", "other", prompt, SamplingConfig(), ["its name"], [], ["none"], []))


def found(store: Store) -> dict[str, Artifact]:
    return {artifact.name: artifact for artifact in store.finished()}


def contents(root: Path) -> dict[str, bytes]:
    """All that lies in the artifacts, but what tells of times."""
    return {
        str(file.relative_to(root)): b"" if "receipts" in file.parts else file.read_bytes()
        for file in (root / "artifacts").rglob("*")
        if file.is_file()
    }


def text_source(text: Artifact) -> Source:
    return Source("text", text.shards())


@pytest.fixture
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    return built(tmp_path, earlier=getattr(request, "param", False))


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


COPY = KEYS[0][1]  # stored from the same bytes as `GONE`
BODIES = {GONE: "a" * 64, COPY: "a" * 64, KEYS[0][0]: "b" * 64}


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
    outcome = forget(store.root, {GONE, unknown})
    assert outcome.pictures == {GONE, rows[0]["key"], rows[1]["key"]}
    assert outcome.unplanned == {unknown}
    (request,) = requests(store.root)
    assert {*request.keys, *request.urls} == {GONE, unknown, URLS[1][1], ORIGIN}


def test_what_a_killed_training_has_shown_is_made_anew(store):
    path = Path(store.path("stage_a", "unfinished"))
    names = ("stage_a.safetensors", "panel.png", "building/result.json", "building/checkpoints/stage_a/4.safetensors")
    for name in names:
        storage.publish(b"content", str(path / name))
    forget(store.root, {"http://unknown.invalid/"})
    assert len(storage.listing(str(path))) == 4
    forget(store.root, {GONE})
    assert storage.listing(str(path)) == ["building/checkpoints/stage_a/4.safetensors", "stage_a.safetensors"]


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


def test_nothing_is_touched_while_a_run_is_at_work(store):
    before = contents(Path(store.root))
    with (
        claims.at_work(store.root, "7"),
        pytest.raises(LeaseHeld, match=r"is in use by run 7 of .*; nothing was changed"),
    ):
        forget(store.root, {GONE})
    assert contents(Path(store.root)) == before
    assert requests(store.root) == []


def test_nothing_is_touched_while_somebody_of_an_earlier_version_builds(store, monkeypatch):
    lease = {"token": "t", "host": "elsewhere", "pid": 1, "started": 0.0, "user": "bert", "heartbeat": 0}
    file = storage.join(store.path("stage_c", "other"), "building/lease.json")
    storage.publish(json.dumps(lease).encode(), file)
    read = storage.read

    def moving(path: str, *arguments: Any) -> bytes:
        if path == file:
            lease["heartbeat"] += 1
            storage.publish(json.dumps(lease).encode(), file)
        return read(path, *arguments)

    monkeypatch.setattr(storage, "read", moving)
    monkeypatch.setattr(claims.time, "sleep", lambda _: None)
    with pytest.raises(LeaseHeld, match="is being built by bert on elsewhere"):
        forget(store.root, {GONE})
    assert requests(store.root) == []


def test_of_two_who_delete_below_a_root_one_waits(store):
    with (
        claims.hold(store.root, claims.ROOT, print, "cleaned up"),
        pytest.raises(LeaseHeld, match="is being cleaned up"),
    ):
        forget(store.root, {GONE})
    assert requests(store.root) == []


def test_a_run_that_begins_while_the_request_is_written_is_noticed(store, monkeypatch):
    """It looks for requests after it has shown itself, and we for runs after the request: one sees the other."""
    before, add = contents(Path(store.root)), forgetting.removal_list.add

    def slowly(root: str, names: Any) -> None:
        add(root, names)
        storage.publish(claims.Owner.own("used").content(), f"{root}/claims/runs/8.json")

    monkeypatch.setattr(forgetting.removal_list, "add", slowly)
    with pytest.raises(LeaseHeld, match=r"run 8 of .*; once it has ended, go on with: python -m pipeline data forget"):
        forget(store.root, {GONE})
    assert contents(Path(store.root)) == before
    with pytest.raises(UsageError, match="data forget"):
        check_carried_out(store.root)
    monkeypatch.undo()
    storage.remove(f"{store.root}/claims/runs/8.json")
    assert forget(store.root, set()).pictures == {GONE}


def test_what_somebody_else_changes_is_left_alone(store, monkeypatch):
    images = claims.artifact("images", found(store)["images"].manifest["fingerprint"])
    with claims.hold(store.root, images, print), pytest.raises(LeaseHeld, match=r"images/.* is being built by"):
        forget(store.root, {GONE})
    assert forget(store.root, set()).pictures == {GONE}


def test_each_change_is_made_under_a_fence(store, monkeypatch):
    """Somebody takes the images over while they are rewritten."""
    images = found(store)["images"]
    what = claims.artifact("images", images.manifest["fingerprint"])
    tar = images.read("00001.tar")
    from_images = forgetting.removal.from_images

    def slowly(content: bytes, keys: Any) -> bytes:
        storage.publish(claims.Owner.own(deleting.CHANGED).content(), f"{store.root}/claims/{what}/000002.json")
        return from_images(content, keys)

    monkeypatch.setattr(forgetting.removal, "from_images", slowly)
    with pytest.raises(ClaimLost):
        forget(store.root, {GONE})
    assert storage.read(f"{images.path}/00001.tar") == tar
    assert not storage.exists(f"{images.path}/forgotten.json")


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
