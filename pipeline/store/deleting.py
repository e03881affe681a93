"""Deleting what lies under a root: what says "done" goes first, so that nothing ever claims more than is there.

Of an artifact, in this order, each kind to its end before the next:

1. its manifest
2. `building/result.json`, which says that a training has published its files
3. receipts, and the markers of checkpoints
4. all else

Whoever is killed in it leaves an unfinished build; the next run goes on with what is still vouched for, or deletes on.
The holder of the claim on the artifact calls, with its fence. Between that look and the end of a folder's deletion
nothing holds it back: a holder that stands still there for longer than a claim's silence may delete files of who has
taken over. A commit refuses what lacks files, and a run that reads such an artifact says so.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from pathlib import PurePosixPath

from datasets.files import storage
from datasets.files.fence import Fence
from datasets.formats import shard_table, shards
from datasets.formats.shards import Receipt
from pipeline.errors import LeaseHeld, UsageError
from pipeline.store import claims
from pipeline.store.artifacts import BUILDING, MANIFEST, Artifact, Store

TIDIED, DELETED, CHANGED = "tidied", "deleted", "changed"  # what is done to something that is claimed
RESULT = f"{BUILDING}/result.json"


def discard(path: str, fence: Fence) -> None:
    """Delete an artifact, finished or not."""
    _remove(path, storage.listing(path), path, fence)


def tidy(artifact: Artifact, fence: Fence) -> None:
    """Delete what only the build of a finished artifact needed; a killed run may have left it."""
    folder = storage.join(artifact.path, BUILDING)
    if storage.exists(folder):
        _remove(artifact.path, [f"{BUILDING}/{name}" for name in storage.listing(folder)], folder, fence)


def tidy_alone(root: str, artifact: Artifact, notify: Callable[[str], None]) -> None:
    """The same for whoever does not hold the claim on the artifact: nothing where somebody else does."""
    name, fingerprint = artifact.name, artifact.manifest["fingerprint"]
    if storage.exists(storage.join(artifact.path, BUILDING)):
        with (
            contextlib.suppress(LeaseHeld),
            claims.hold(root, claims.artifact(name, fingerprint), notify, TIDIED) as claim,
        ):
            if Store(root).find(name, fingerprint):  # else somebody has begun to build it anew, and died
                tidy(artifact, claim.fence)


def drop_shard(folder: str, receipt: Receipt, fence: Fence) -> int:
    """Delete a shard of an unfinished build, so that it is made anew; returns how many files it had."""
    fence()
    storage.remove(shards.receipt_path(folder, receipt.shard))
    for name in receipt.files:
        storage.remove(storage.join(folder, name))
    return len(receipt.files)


def reopen(artifact: Artifact, damaged: Collection[str], fence: Fence) -> int:
    """Make an unfinished build of a finished artifact, without its damaged shards; the next run makes just these anew.

    Returns how many they are.

    Raises:
        UsageError: a file belongs to no shard; nothing was deleted.
    """
    hit, held = [], set[str]()
    for folder in shard_folders(artifact):
        prefix = f"{folder}/" if folder else ""
        where = storage.join(artifact.path, folder) if folder else artifact.path
        for receipt in shards.finished(where).values():
            names = {prefix + name for name in receipt.files}
            if not names.isdisjoint(damaged):
                hit.append((where, receipt))
                held |= names
    if alone := sorted(set(damaged) - held - {shard_table.FILE}):  # which a commit writes anew
        raise UsageError(
            f"{', '.join(alone)} of {artifact.path} belong to no shard that could be made anew by itself: "
            f"run again with --force {artifact.manifest['step']}"
        )
    fence()
    storage.remove(storage.join(artifact.path, MANIFEST))
    for where, receipt in hit:
        drop_shard(where, receipt, fence)
    return len(hit)


def shard_folders(artifact: Artifact) -> list[str]:
    """Folders inside an artifact that hold shards: the artifact's own (""), or one a size, or the hashes'."""
    names = (PurePosixPath(name) for name in artifact.files)
    numbered = (name for name in names if name.suffix == ".parquet" and name.stem.isdigit())
    return sorted({"" if str(name.parent) == "." else str(name.parent) for name in numbered})


def _remove(path: str, names: Collection[str], folder: str, fence: Fence) -> None:
    """Delete a folder of an artifact, whose files have these names; the marks among them first."""
    for marks in _marks(names):
        fence()
        for mark in marks:
            storage.remove(storage.join(path, mark))
    fence()
    storage.remove(folder)


def _marks(names: Collection[str]) -> Iterator[list[str]]:
    """Of the names of an artifact's files, and their folders, those that say "done" of something, in their order."""
    parts = [PurePosixPath(name).parts for name in names]
    receipts = {"/".join(part[: part.index(shards.RECEIPTS) + 1]) for part in parts if shards.RECEIPTS in part[:-1]}
    markers = {name for name in names if name.startswith(f"{BUILDING}/") and name.endswith(".json")} - {RESULT}
    for kind in ({MANIFEST}.intersection(names), {RESULT}.intersection(names), receipts | markers):
        yield sorted(kind)
