"""Forgetting: taking pictures out of all that a root has stored of them.

A picture is what lies at its URL, or at the one that it was copied from: a key, which is of a URL with one caption,
stands for all captions. It is that wherever the same bytes lie: what is stored of them under other names goes too, and
their hash stays on the list, so that none comes back. What only looks alike stays, and is named.

Pictures, captions and tensors go from every artifact; what is left is as if they had never been kept. The plan keeps
their rows. Fingerprints stay: they tell what was asked for, and a forgotten picture makes nobody train again. The
images come last, so that a removal that was killed is gone on with by any later one. What is not finished, and what was
made from it when it was, is `store.unfinished`'s.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets.config import ViewConfig
from datasets.files import storage
from datasets.files.fence import Fence
from datasets.files.storage import CorruptFile
from datasets.formats import removal, shards
from datasets.planning import plan, plan_files, urls
from datasets.reading import duplicates, holdout, views
from pipeline.errors import LeaseHeld
from pipeline.models.feature_sets import FEATURES
from pipeline.steps.select import held_out
from pipeline.steps.select import make as make_view
from pipeline.store import claims, deleting, removal_list, unfinished
from pipeline.store.artifacts import Artifact, Store, children, descendants
from pipeline.store.deleting import BY_SHARD, is_model, shard_folders
from pipeline.store.removal_list import names_of, requests
from pipeline.store.removals import Removals, rewrite, tabulate
from pipeline.terminal import console

EXTRAS = ("duplicates", "aesthetic")  # of which a view may be made too, beside plan and pictures
SHEETS = ("panel.png", "grid.png", "groups.png")  # contact sheets: which pictures they show is not written anywhere
CARD = "README.md"  # of a release: its example has the first sample's caption


@dataclass
class Outcome:
    """What carrying out the requests has changed: stored rows by key, files, and trainings that have seen them."""

    pictures: set[str] = field(default_factory=set)
    files: Counter[str] = field(default_factory=Counter)
    trained: set[str] = field(default_factory=set)
    alike: set[str] = field(default_factory=set)  # keys of what looks like them, where that was looked for; it stays
    unplanned: set[str] = field(default_factory=set)  # names that no plan here has


@dataclass(frozen=True)
class _Held:
    """An artifact that we may change."""

    artifact: Artifact
    outcome: Outcome
    fence: Fence

    def rewrite(self, name: str, change: Callable[[bytes], bytes | None], *, shard: bool = False) -> None:
        """Replace a file, or one of a shard, by what `change` makes of it; None: delete it."""
        if rewrite(self.artifact, name, change, self.fence, shard=shard):
            left = storage.exists(storage.join(self.artifact.path, name))
            self.outcome.files["rewritten" if left else "deleted"] += 1

    def replace(self, name: str, content: bytes | None) -> None:
        """Put other content in a file's place; None: delete it."""
        self.rewrite(name, lambda _: content)

    def settle(self, rows: int) -> None:
        """Say how many rows are left, where any was taken out."""
        removed = Removals.of(self.artifact)
        before = self.artifact.manifest["rows"] if removed.rows is None else removed.rows
        if rows != before:
            removed.forgotten += before - rows
            removed.rows = rows
            self.fence()
            removed.publish(self.artifact.path)


def forget(root: str, names: Set[str]) -> Outcome:
    """Put keys and normalised URLs on the root's removal list, and take out what is stored of them.

    Raises:
        LeaseHeld: a run is at work in this root, or has yet to end; or somebody else deletes there.
    """
    with claims.hold(root, claims.ROOT, _tell, "cleaned up"):
        _require_quiet(root, "nothing was changed")
        outcome = Outcome()
        removal_list.add(root, names | _pictures_of(root, names, outcome))
        _require_quiet(root, "once it has ended, go on with: python -m pipeline data forget")
        if waiting := _waiting(root):
            _carry_out(root, names_of(waiting).keys(), outcome)
        for request in _waiting(root):
            removal_list.close(root, request)
    return outcome


def _waiting(root: str) -> list[removal_list.Request]:
    return [request for request in requests(root) if not request.done]


def _require_quiet(root: str, told: str) -> None:
    """Refuse while a run is at work: one that reads a shard now would take its new bytes for damage.

    Asked before and after the request is written: a run that begins looks for requests once others can see it.
    """
    for what in claims.old_leases(root):
        with claims.hold(root, what, _tell):
            pass
    for run, owner in claims.runs_at_work(root, _tell).items():
        raise LeaseHeld(f"{root} is in use by run {run} of {owner}; {told}")


def _pictures_of(root: str, names: Set[str], outcome: Outcome) -> set[str]:
    """The URLs and origins of the pictures that are named, as far as a plan knows them."""
    plans = Store(root).finished("metadata") if names else ()
    rows = [row for metadata in plans for row in _planned(metadata, names)]
    there = urls.with_equals(row[name] for row in rows for name in plan.NAMES if row[name])
    outcome.unplanned = {name for name in names if urls.equal(name) not in there}
    return {row[name] for row in rows for name in ("url", "origin") if row[name]}


def _carry_out(root: str, names: Set[str], outcome: Outcome) -> None:
    store = Store(root)
    planned, keys = _meant(store, names)
    bodies, copies = removal_list.copies(store, keys)
    removal_list.add(root, bodies | (copies - keys))  # before the first of them goes, which takes its hash along
    if not copies <= keys:
        planned, keys = _meant(store, names | copies)
    if not keys:
        return
    _from_torn(store, keys, {caption for _, rows in planned for caption in _captions(rows)}, outcome)
    finished = list(store.finished())
    for metadata, rows in planned:
        for images in (child for child in children(metadata, finished) if child.name == "images"):
            _from_everything(store, metadata, images, finished, rows, outcome)
    outcome.alike -= outcome.pictures
    outcome.files["deleted"] += unfinished.drop(store, keys, (*SHEETS, *TABLES, CARD), _tell)


def _meant(store: Store, names: Set[str]) -> tuple[list[tuple[Artifact, list[dict[str, Any]]]], set[str]]:
    """The plans that have rows of these names, with these rows; and all their keys."""
    planned = [(metadata, rows) for metadata in store.finished("metadata") if (rows := _planned(metadata, names))]
    keys = {row["key"] for _, rows in planned for row in rows}
    return planned, keys | {name for name in names if shards.KEY.fullmatch(name)}  # whose plan may be unfinished


def _planned(metadata: Artifact, names: Set[str]) -> list[dict[str, Any]]:
    """Rows of a plan that are meant: key, URL, origin, caption, shard, and captions where they have several."""
    found: list[dict[str, Any]] = []
    names = urls.with_equals(names)
    schema = plan.SCHEMA.append(plan.CAPTIONS)
    columns = [*plan.NAMES, "caption", "captions", "shard"]
    for part in plan_files.parts(metadata.files):
        rows = pq.read_table(pa.BufferReader(metadata.read(part)), columns=columns, schema=schema)
        meant = np.zeros(rows.num_rows, bool)
        for name in plan.NAMES:
            meant |= pc.is_in(rows[name], pa.array(names, pa.string())).to_numpy()
            odd = np.flatnonzero(pc.fill_null(pc.match_substring_regex(rows[name], urls.ODD), False).to_numpy())
            equal = [urls.equal(url) in names for url in rows[name].take(pa.array(odd)).to_pylist()]
            meant[odd] |= np.array(equal, bool)
        found += rows.filter(pa.array(meant)).to_pylist()
    return found


def _captions(planned: Iterable[dict[str, Any]]) -> set[str]:
    """All captions of planned rows."""
    return {caption for row in planned for caption in (row["caption"], *(row["captions"] or ()))}


def _from_everything(
    store: Store,
    metadata: Artifact,
    images: Artifact,
    finished: list[Artifact],
    meant: list[dict[str, Any]],
    outcome: Outcome,
) -> None:
    """Take some pictures out of the images and of all that was made from them; the images last, views after them."""
    by_shard: defaultdict[int, set[str]] = defaultdict(set)
    for row in meant:
        by_shard[row["shard"]].add(row["key"])
    captions = _captions(meant)
    stored = {key for shard, keys in by_shard.items() for key in keys & _stored(images, shard)}
    made = descendants(images, finished)
    held_back = {it.path: _keys_of(it, images) for it in made if it.name == "held_out"}
    outcome.pictures |= stored
    if stored:
        _from_mlflow(store.root, outcome)
    for artifact in made if stored else ():
        if is_model(artifact.name):
            outcome.trained.add(artifact.name)
        if artifact.name == "duplicates":
            outcome.alike |= duplicates.alike(storage.read(storage.join(artifact.path, duplicates.FILE)), stored)
        with _held(store, artifact, outcome) as held:
            _from_pictures(held, stored)
            if artifact.name == "release":
                held.rewrite(CARD, partial(_from_card, release=artifact, captions=captions))
    for artifact in (*made, images):
        if artifact.name.startswith(("images", *BY_SHARD)):
            with _held(store, artifact, outcome) as held:
                folders = shard_folders(artifact)
                for folder in folders:
                    for shard, keys in by_shard.items():
                        _from_shard(held, folder, shard, keys)
                tabulate(artifact, folders, held.fence)
                if artifact.name != "duplicates":
                    left = store.find(*artifact.called)
                    assert left is not None, "it is held, and was there a moment ago"
                    held.settle(sum(left.shards(folders[0]).counts().values()))
    now = store.find("images", images.manifest["fingerprint"])
    assert now is not None, "the images were there a moment ago"
    for artifact in made:
        if artifact.name.startswith("view_"):
            settings = artifact.manifest["settings"][f"data.views.{artifact.name.removeprefix('view_')}"]
            extras = (artifact.parent(name) for name in EXTRAS)
            content, rows, _ = make_view(ViewConfig(**settings), metadata, now, *extras)
            with _held(store, artifact, outcome) as held:
                held.replace(views.FILE, content)
                held.settle(rows)
        if artifact.name == "held_out":
            view = _held_out(artifact, metadata, now, artifact.parent("duplicates"), held_back[artifact.path])
            with _held(store, artifact, outcome) as held:
                held.replace(views.FILE, views.dump(view))
                held.settle(view.rows)


def _keys_of(view: Artifact, images: Artifact) -> set[str]:
    """Keys of the pictures that a view chooses.

    After a kill each file is as it was, or as it is to be; of shards that the view does not fit yet, nobody can tell.
    """
    found, chosen = set[str](), views.read(storage.read(storage.join(view.path, views.FILE)))
    numbers = images.shards()
    paths = [storage.join(images.path, shards.index_name(number)) for number in numbers]
    for number, index in zip(numbers, storage.ahead(partial(storage.read, path) for path in paths), strict=True):
        keys = views.stored_keys(index).to_pylist()
        if chosen.shards.get(number, (0, b""))[0] == len(keys):
            found.update(keys[place] for place in chosen.places(number))
    return found


def _held_out(
    artifact: Artifact, metadata: Artifact, images: Artifact, repeated: Artifact | None, before: Set[str]
) -> views.View:
    """What is held out of the pictures that are left, by the rule of the version that made the artifact.

    What was held out for a picture that is gone stays so: no training is to see it now.
    """
    settings, stored = artifact.manifest["settings"], images.shards()
    if artifact.manifest["version"] == 1:
        return holdout.by_keys(stored, lambda n: stored[n].read(shards.index_name(n)), settings["data.holdout"])
    captions = settings.get("data.held_out_captions", ())
    return held_out(settings["data.holdout"], captions, metadata, images, repeated, before)


def _from_pictures(held: _Held, keys: Set[str]) -> None:
    """Delete what shows the pictures, or may show them, and their captions from the tables of samples."""
    artifact = held.artifact
    for name in {*artifact.files, *Removals.of(artifact).files}:  # some may be recorded as deleted, but there
        file = PurePosixPath(name)
        if file.name in SHEETS or file.stem in keys:
            held.replace(name, None)
    for name, change in TABLES.items():
        if name in artifact.files:
            held.rewrite(name, partial(change, keys=keys))
            if name.endswith(".parquet"):
                held.settle(removal.count(storage.read(storage.join(artifact.path, name))))
    if artifact.name.startswith(FEATURES):
        tables = [name for name in artifact.files if name.endswith(".parquet")]
        for name in tables:
            held.rewrite(name, partial(removal.from_tensors, keys=keys))
        held.settle(sum(removal.count(storage.read(storage.join(artifact.path, name))) for name in tables))


def _from_card(content: bytes, release: Artifact, captions: Set[str]) -> bytes:
    """A release's card whose example has the first caption of the samples that are left in place of any of these."""
    from stages.weights.card import with_prompt

    samples = release.parent("samples")  # its own captions have been taken out before
    left = json.loads(samples.read("captions.json")) if samples else []
    card, first = content.decode(), left[0]["caption"] if left else "a picture"
    for caption in captions:
        card = with_prompt(card, caption, first)
    return card.encode()


def _from_captions(content: bytes, keys: Set[str]) -> bytes:
    """The captions of samples, with their scores where these are measured, without some."""
    rows = [row for row in json.loads(content) if row["key"] not in keys]
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


TABLES: dict[str, Callable[..., bytes]] = {
    "samples.parquet": removal.from_samples,
    "captions.json": _from_captions,
    "scores.json": _from_captions,  # of roots from before
    "scores.parquet": removal.from_tensors,
    duplicates.FILE: removal.from_duplicates,
}


def _from_shard(held: _Held, folder: str, shard: int, keys: Set[str]) -> None:
    """Take pictures out of one shard of images or of tensors, then say so in its receipt."""
    artifact = held.artifact
    downloaded = artifact.name == "images"
    change = removal.from_index if downloaded else removal.from_tensors
    changes = {shards.tensor_name(shard): change}
    if downloaded:
        changes = {shards.image_name(shard): removal.from_images, **changes}
    where = storage.join(artifact.path, folder)
    receipt = shards.receipt(where, shard)
    if not receipt.files:  # no picture of it was kept
        return
    for name, function in changes.items():
        file = f"{folder}/{name}" if folder else name
        held.rewrite(file, partial(function, keys=keys), shard=True)
    contents = {name: storage.read(storage.join(where, name)) for name in changes}
    table = contents[shards.tensor_name(shard)]
    rows = len(views.stored_keys(table)) if downloaded else _rows_of(artifact, table)
    entries = {name: storage.entry_of(content) for name, content in contents.items()}
    shards.put_receipt(where, removal.from_receipt(receipt, entries, rows, downloaded=downloaded), held.fence)


def _rows_of(artifact: Artifact, table: bytes) -> int:
    """Rows of a shard as its receipt counts them: pictures, of whose captions there may be several."""
    return removal.pictures(table) if artifact.name.startswith(("text_", "captions_")) else removal.count(table)


def _from_torn(store: Store, keys: Set[str], captions: Set[str], outcome: Outcome) -> None:
    """Take pictures out of finished artifacts that were made from something that is not finished any more.

    What they were made from may hold the pictures or have held them, so all that may show them goes.
    """
    torn = unfinished.torn(store.finished())
    if torn:
        _from_mlflow(store.root, outcome)
    drawn = [storage.join(artifact.path, "captions.json") for artifact in torn if "captions.json" in artifact.files]
    tables = map(_drawn, drawn)  # after a kill each is as it was, or as it is to be
    known = captions | {row["caption"] for rows in tables for row in rows if row["key"] in keys}
    torn.sort(key=lambda artifact: artifact.name == "release")  # its card takes a caption of the samples that are left
    for artifact in torn:
        if is_model(artifact.name):
            outcome.trained.add(artifact.name)
        with _held(store, artifact, outcome) as held:
            if not unfinished.reopen(artifact, keys, held.fence):
                _from_pictures(held, keys)
                if artifact.name == "release":
                    held.rewrite(CARD, partial(_from_card, release=artifact, captions=known))


def _drawn(path: str) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(storage.read(path))
    except ValueError as error:
        raise CorruptFile(f"{path} is damaged: {error}; `python -m pipeline data repair` says how to mend it") from None
    return found


def _from_mlflow(root: str, outcome: Outcome) -> None:
    """Delete the contact sheets of past runs that lie in the root, and those that wait for MLflow."""
    from pipeline.tracking.mlflow_records import drop_pictures
    from pipeline.tracking.mlflow_store import folder_of

    try:
        outcome.files["deleted"] += drop_pictures(folder_of(root))
    except BlockingIOError:
        raise LeaseHeld("a run here has yet to end; once it has, go on with: python -m pipeline data forget") from None


@contextmanager
def _held(store: Store, artifact: Artifact, outcome: Outcome) -> Iterator[_Held]:
    """The claim on an artifact, for the time of a change."""
    what = claims.artifact(artifact.name, artifact.manifest["fingerprint"])
    with claims.hold(store.root, what, _tell, deleting.CHANGED) as claim:
        yield _Held(artifact, outcome, claim.fence)
        deleting.tidy(artifact, claim.fence)


def _tell(text: str) -> None:
    console.print(text, markup=False)


def _stored(images: Artifact, shard: int) -> set[str]:
    """Keys of the pictures that a shard holds."""
    return set(views.stored_keys(storage.read(storage.join(images.path, shards.index_name(shard)))).to_pylist())
