"""Deleting what lies under a root: what says "done" goes first, so that nothing ever claims more than is there.

The holder of the claim on an artifact calls, with its fence. A local folder goes in one step: it is moved aside, and
then deleted, whatever order that takes. A holder that stood still before that step may have moved what is somebody
else's by now: it looks once more, and puts it back as it was. In an object store, which has no such step, an artifact
goes in this order, each kind to its end before the next:

1. its manifest
2. `building/result.json`, which says that a training has published its files
3. receipts, and the markers of checkpoints
4. all else, so many objects at a time

Before each the fence is asked: who wakes up there may delete so many objects of who has taken over, and no more. A
commit refuses what lacks files, and a run that reads such an artifact says so. Whoever is killed leaves an unfinished
build; the next run goes on with what is still vouched for, or deletes on.

    <root>/deleted/<any name>     moved aside; what is left of it, gc deletes
"""

import contextlib
import errno
import json
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from datasets.files import json_files, local, storage
from datasets.files.fence import Fence
from datasets.files.storage import FileEntry
from datasets.formats import shard_table, shards
from datasets.formats.shards import Receipt
from pipeline.errors import ClaimLost, LeaseHeld
from pipeline.store import claims
from pipeline.store.artifacts import BUILDING, INPUTS, MANIFEST, REPAIR, Artifact, Store, wrong_marks
from pipeline.store.removals import FORGOTTEN

TIDIED, DELETED, CHANGED = "tidied", "deleted", "changed"  # what is done to something that is claimed
RESULT = f"{BUILDING}/result.json"
ASIDE = "deleted"
BY_SHARD = ("text_", "latents_", "captions_", "aesthetic", "duplicates")  # what is made from images, shard by shard
OF_ALL = ("view_", "held_out")  # and at once from all of them, within seconds
_TRAINED = ("stage_", "previewer", "baseline")
FENCED = 256  # objects between two looks whether somebody has taken over


def is_model(name: str) -> bool:
    """Whether an artifact of this name is a trained model: pictures that the baseline drew are called after it too."""
    return name.startswith(_TRAINED) and "samples" not in name


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
        try:
            with claims.hold(root, claims.artifact(name, fingerprint), notify, TIDIED) as claim:
                if Store(root).find(name, fingerprint):  # else somebody has begun to build it anew, and died
                    tidy(artifact, claim.fence)
        except ClaimLost as error:
            notify(str(error))
        except LeaseHeld:  # who has it tidies up, too
            pass


def drop_shard(folder: str, receipt: Receipt, fence: Fence) -> int:
    """Delete a shard of an unfinished build, so that it is made anew; returns how many files it had."""
    fence()
    storage.remove(shards.receipt_path(folder, receipt.shard))
    for name in receipt.files:
        storage.remove(storage.join(folder, name))
    return len(receipt.files)


class Shard(NamedTuple):
    """A shard of an artifact: the folder in it ("", or a family's), and its number."""

    folder: str
    number: int


def shard_of(name: str) -> Shard | None:
    """The shard that a file of an artifact would be of, by its name; its receipt is one of them."""
    file = PurePosixPath(name)
    is_receipt = file.parent.name == shards.RECEIPTS
    if file.suffix not in ((".json",) if is_receipt else (".tar", ".parquet")) or not file.stem.isdecimal():
        return None
    folder = str(file.parent.parent if is_receipt else file.parent)
    return Shard("" if folder == "." else folder, int(file.stem))


def receipt_folders(artifact: Artifact) -> set[str]:
    """Folders inside an artifact whose shards have receipts, so that one can be made anew without the others; of those
    that its manifest names, all receipts may be lost."""
    names = (name.rpartition("/")[0] for name in storage.listing(artifact.path))
    held = (name for name in names if PurePosixPath(name).name == shards.RECEIPTS)
    found = {name.removesuffix(shards.RECEIPTS).removesuffix("/") for name in held}
    return found | set(artifact.manifest.get("shards", ()))


def reopen(artifact: Artifact, lost: Iterable[Shard], fence: Fence) -> None:
    """Make an unfinished build of a finished artifact, without some of its shards; the next run makes just these anew.

    It goes on as the same artifact: what its content was is kept for the next manifest, so that nothing that was made
    from it counts as stale, and what it had beside its shards, such as the tower that the others were encoded with.
    Killed once the manifest is gone, the next builder goes on with `drop_lost`.
    """
    beside = {name: entry for name, entry in artifact.manifest["files"].items() if shard_of(name) is None}
    beside.pop(shard_table.FILE, None)  # made from receipts
    _note(artifact.path, INPUTS, artifact.manifest.get("inputs", {}), fence)
    about = {"content": artifact.manifest["content"], "lost": sorted(lost), "files": beside}
    _note(artifact.path, REPAIR, about, fence)
    fence()
    storage.remove(storage.join(artifact.path, MANIFEST))
    drop_lost(artifact.path, fence)


def drop_lost(path: str, fence: Fence) -> None:
    """Delete the shards for which an unfinished build was reopened, if they have not been deleted yet."""
    found = json_files.read(storage.join(path, REPAIR), _repair)
    if found is None or not found["lost"]:
        return
    drop_shards(path, found["lost"], fence)
    _note(path, REPAIR, {**found, "lost": []}, fence)


def drop_shards(path: str, lost: Iterable[Shard], fence: Fence) -> None:
    """Delete shards of an unfinished build, whether they are there or not, so that they are made anew."""
    for folder, number in lost:
        where = storage.join(path, folder)
        fence()
        storage.remove(shards.receipt_path(where, number))
        for name in {shards.image_name(number), shards.tensor_name(number)}:
            storage.remove(storage.join(where, name))


def go_on(path: str, inputs: Mapping[str, Artifact], fence: Fence) -> list[str]:
    """Delete what a build cannot go on with, and note what it is made from from here on.

    That is all of it, if inputs held something else when it began: they were made anew since, and shards of old and new
    ones are no artifact, nor is a training of both. Returns their names. It is the shards for which it was reopened.
    And it is what says "done" where it only counts as unfinished since that is damaged: laid over the next manifest, it
    would do so for ever.
    """
    before = begun_from(path)
    if others := changed_inputs(before, inputs):
        discard(path, fence)
    if wrong_marks(path):
        for name in (MANIFEST, FORGOTTEN):
            fence()
            storage.remove(storage.join(path, name))
    drop_lost(path, fence)
    if inputs and (others or not before):
        _note(path, INPUTS, {name: artifact.manifest["content"] for name, artifact in inputs.items()}, fence)
    return others


def begun_from(path: str) -> dict[str, str]:
    """Content hashes of what an unfinished build is made from, by name; nothing of one that has noted none."""
    return json_files.read(storage.join(path, INPUTS), lambda told: json_files.of(dict[str, str], told)) or {}


def changed_inputs(contents: Mapping[str, str], inputs: Mapping[str, Artifact]) -> list[str]:
    """Names of the inputs that hold something else by now than these contents."""
    return [name for name in contents if name in inputs and inputs[name].manifest["content"] != contents[name]]


def kept(path: str) -> dict[str, FileEntry]:
    """The files beside its shards that a reopened artifact goes on with, of an unfinished build."""
    found = json_files.read(storage.join(path, REPAIR), _repair)
    return {name: FileEntry(**entry) for name, entry in found["files"].items()} if found else {}


def _note(path: str, name: str, about: Mapping[str, Any], fence: Fence) -> None:
    fence()
    storage.publish(json.dumps(about).encode(), storage.join(path, name))


def _repair(told: dict[str, Any]) -> dict[str, Any]:
    found = {"files": {}, **told}  # earlier ones named none
    json_files.require(found, str, "content")
    json_files.require(found, dict[str, FileEntry], "files")
    json_files.require(found, list[list[Any]], "lost")
    lost = [Shard(*shard) for shard in told["lost"]]
    for shard in lost:
        json_files.require(shard._asdict(), str, "folder")
        json_files.require(shard._asdict(), int, "number")
    return {**{name: found[name] for name in ("content", "files")}, "lost": lost}


def shard_folders(artifact: Artifact) -> list[str]:
    """Folders inside an artifact that hold shards: the artifact's own (""), or one a size, or the hashes'."""
    if told := artifact.manifest.get("shards"):
        return list(told)
    names = (PurePosixPath(name) for name in artifact.files)  # earlier ones name the files of shards themselves
    numbered = (name for name in names if name.suffix == ".parquet" and name.stem.isdecimal())
    return sorted({"" if str(name.parent) == "." else str(name.parent) for name in numbered})


def _remove(path: str, names: Collection[str], folder: str, fence: Fence) -> None:
    """Delete a folder of an artifact, whose files have these names."""
    if storage.is_remote(path):
        _remove_objects(path, names, fence)
        return
    aside = storage.join(path.rpartition("/artifacts/")[0], ASIDE, uuid.uuid4().hex)
    fence()
    try:
        storage.move(folder, aside)
    except FileNotFoundError:  # there is none, or a move before was made and its answer lost
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        own = [name for name in names if not local.is_behind_a_link(Path(path), name)]
        _remove_objects(path, own, fence)  # in place, as in a store: another disk lies there
        fence()
        storage.remove(folder)
        return
    try:
        fence()
    except ClaimLost:
        with contextlib.suppress(OSError):  # who has taken over has begun another one since
            storage.move(aside, folder)
        raise
    storage.remove(aside)


def _remove_objects(path: str, names: Collection[str], fence: Fence) -> None:
    for marks in _marks(names):
        fence()
        storage.remove_all([storage.join(path, mark) for mark in marks])
    left = sorted(names)
    for start in range(0, len(left), FENCED):
        fence()
        storage.remove_all([storage.join(path, name) for name in left[start : start + FENCED]])


def _marks(names: Collection[str]) -> Iterator[list[str]]:
    """Of the names of an artifact's files those that say "done" of something, in their order."""
    receipts = {name for name in names if PurePosixPath(name).parent.name == shards.RECEIPTS}
    markers = {name for name in names if name.startswith(f"{BUILDING}/") and name.endswith(".json")} - {RESULT, INPUTS}
    for kind in ({MANIFEST}.intersection(names), {RESULT}.intersection(names), receipts | markers):
        yield sorted(kind)
