"""Repairing: which files are damaged, and how the shards that they belong to are made anew, and nothing else.

A shard that is made anew may come out otherwise: a picture is gone from the web, a model writes another caption. So
the same shard of all that was made from it shard by shard is made anew too, and the views, which name pictures.
Trainings and what was drawn stay: they were made of what was there then. What is damaged and belongs to no shard stays
as it is, and is named.

Opening an artifact takes its mark away, so a repair that is killed leaves unfinished builds, which `data repair` or the
next run goes on with. What others are made from is opened after them: until then its damage is still found.
"""

import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from datasets.files import storage
from datasets.files.storage import CorruptFile
from datasets.formats import shard_table, shards
from pipeline.errors import UsageError
from pipeline.run import neighbours
from pipeline.store import claims, deleting
from pipeline.store.artifacts import REPAIR, Artifact, Store, children, descendants
from pipeline.store.deleting import BY_SHARD, OF_ALL, Shard, receipt_folders, shard_of
from pipeline.store.removal_list import check_carried_out

READERS = 8  # files that are verified at a time
REPAIRED = "repaired"  # what is done to an artifact meanwhile


@dataclass(frozen=True)
class Opened:
    """An artifact of which some shards are gone, to be made anew."""

    artifact: Artifact
    shards: set[Shard]


def damaged(artifacts: Iterable[Artifact]) -> list[tuple[Artifact, str]]:
    """The files of finished artifacts that are missing or hold other bytes than their manifests say, and the receipts
    of shards that are missing, cannot be read, or tell of other files.

    Raises:
        StorageError: the storage is away, so nobody knows.
    """
    every = list(artifacts)
    files = [(artifact, name) for artifact in every for name in artifact.files]
    with ThreadPoolExecutor(READERS) as pool:
        found = [file for file, wrong in zip(files, pool.map(_is_damaged, files), strict=True) if wrong]
    return found + [(artifact, name) for artifact in every for name in _damaged_receipts(artifact)]


def _damaged_receipts(artifact: Artifact) -> Iterator[str]:
    for folder in artifact.manifest.get("shards", ()):  # earlier versions, which do not name them, read receipts alone
        told = artifact.shards(folder)
        receipts = shards.finished(told.folder)
        for number, shard in told.items():
            if number not in receipts or receipts[number].files != shard.files:
                yield shards.receipt_path(folder, number).removeprefix("/")


def _is_damaged(file: tuple[Artifact, str]) -> bool:
    artifact, name = file
    try:
        artifact.read(name)
    except (CorruptFile, FileNotFoundError):
        return True
    return False


def of_no_shard(files: Iterable[tuple[Artifact, str]]) -> list[tuple[Artifact, str]]:
    """Those of some files that cannot be made anew by themselves."""
    folders: dict[str, set[str]] = {}
    alone = []
    for artifact, name in files:
        if name == shard_table.FILE:  # made from the receipts, when its artifact is finished again
            continue
        known = folders.setdefault(artifact.path, receipt_folders(artifact))
        if (shard := shard_of(name)) is None or shard.folder not in known:
            alone.append((artifact, name))
    return alone


def open_damaged(
    store: Store, files: Sequence[tuple[Artifact, str]], alone: Sequence[tuple[Artifact, str]]
) -> list[Opened]:
    """Make unfinished builds of all artifacts that have to be repaired; returns them, what others are made from last.

    Args:
        store: where they lie; what other configs made of the same images is opened too.
        files: the damaged files that belong to shards.
        alone: those that do not.

    Raises:
        UsageError: what would be made anew is made from something that is damaged too; nothing was changed.
        LeaseHeld: another run reads or changes one of them; those before it are opened.
    """
    own = f"repair-{uuid.uuid4().hex[:8]}"
    with claims.at_work(store.root, own):
        check_carried_out(store.root)  # whoever writes a request now sees that somebody is at work
        found = _hit(store, files)
        _check_inputs(found, alone)
        for opened in found:
            neighbours.check_unread(store, *opened.artifact.called, own)
        for opened in found:
            what = claims.artifact(*opened.artifact.called)
            with claims.hold(store.root, what, neighbours.tell, REPAIRED) as claim:
                if artifact := store.find(*opened.artifact.called):  # else somebody else was as fast
                    deleting.reopen(artifact, opened.shards, claim.fence)
    return found


def is_open(store: Store, name: str, digest: str) -> bool:
    """Whether a repair of an artifact has begun and not come to its end."""
    return store.find(name, digest) is None and storage.exists(storage.join(store.path(name, digest), REPAIR))


def remedy(artifact: Artifact) -> str:
    """What to do about a damaged file of an artifact that belongs to no shard."""
    return f"put it back from a copy, or make all of {artifact.name} anew: run --force {artifact.manifest['step']}"


def _check_inputs(found: Iterable[Opened], alone: Iterable[tuple[Artifact, str]]) -> None:
    needed = {
        digest: opened.artifact.name for opened in found for digest in opened.artifact.manifest["parents"].values()
    }
    for artifact, name in alone:
        if asked := needed.get(artifact.manifest["fingerprint"]):
            raise UsageError(
                f"{storage.join(artifact.path, name)} is damaged, and {asked} is made from it: {remedy(artifact)}; "
                "nothing was changed"
            )


def _hit(store: Store, files: Iterable[tuple[Artifact, str]]) -> list[Opened]:
    """The artifacts to be opened, with the shards to be made anew; what others are made from comes after them."""
    lost: dict[str, Opened] = {}

    def lose(artifact: Artifact, shards: Iterable[Shard]) -> None:
        lost.setdefault(artifact.path, Opened(artifact, set())).shards.update(shards)

    for artifact, name in files:
        lose(artifact, filter(None, [shard_of(name)]))
    finished = list(store.finished())
    waiting = [opened for opened in lost.values() if opened.shards]
    while waiting:  # a child is looked at again when more of its shards are gone
        opened = waiting.pop()
        numbers = {shard.number for shard in opened.shards}
        for child in children(opened.artifact, finished):
            before = len(lost[child.path].shards) if child.path in lost else 0
            if child.name.startswith(BY_SHARD):
                lose(child, {Shard(folder, number) for folder in receipt_folders(child) for number in numbers})
                if len(lost[child.path].shards) > before:
                    waiting.append(lost[child.path])
            elif child.name.startswith(OF_ALL):
                lose(child, ())
    made = list(lost.values())
    return [one for _, one in sorted(enumerate(made), key=lambda item: _depth(item[1], made))]


def _depth(opened: Opened, others: Sequence[Opened]) -> int:
    """How many of the others are made from an artifact, which come before it."""
    return len(descendants(opened.artifact, [other.artifact for other in others]))
