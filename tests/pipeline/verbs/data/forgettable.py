"""What tests of forgetting have in common: a root with two shards of pictures, and all that is made from them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from datasets.config import ViewConfig
from datasets.files import storage
from datasets.files.storage import FileEntry
from datasets.formats import shards
from datasets.formats.shards import INDEX, Clock, ImageRow, Receipt
from datasets.planning import plan, plan_files
from datasets.reading import duplicates, holdout, views
from datasets.reading.batches import Source
from pipeline.steps.select import held_out, make
from pipeline.store.artifacts import Artifact, Fingerprint, Store
from stages.settings.sampling import SamplingConfig
from stages.weights.card import CardFacts, model_card

ROWS = 4  # planned pictures of a shard; the last one of each is lost
URLS = [[f"http://pictures.invalid/{shard}/{row}.png" for row in range(ROWS)] for shard in range(2)]
KEYS = [[plan.key_of(url, "caption") for url in urls] for urls in URLS]
GONE = KEYS[1][1]
COPY = KEYS[0][1]  # stored from the same bytes as `GONE`, where a root is built with these
BODIES = {GONE: "a" * 64, COPY: "a" * 64, KEYS[0][0]: "b" * 64}
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
