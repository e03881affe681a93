"""Pictures in what is not finished, or was made from what is not finished any more, and how they get out of there.

A first build, a repair or `--force` that was stopped leaves such things. What is gone from them is made anew by the
next run, without the pictures. What is made shard by shard is opened for that as a repair opens it, so that it stays of
the same pictures as the images' shard, which is made anew too; and so are views, which name pictures by their places.
"""

from collections.abc import Callable, Collection, Iterable, Set
from pathlib import PurePosixPath

from datasets.files import storage
from datasets.files.fence import Fence
from datasets.formats import removal, shards
from datasets.formats.shards import Receipt
from pipeline.store import claims, deleting
from pipeline.store.artifacts import Artifact, Store, descendants
from pipeline.store.deleting import BY_SHARD, OF_ALL, RESULT, Shard, receipt_folders, shard_of


def torn(finished: Iterable[Artifact]) -> list[Artifact]:
    """The finished artifacts that were made, directly or not, from something that is not finished any more."""
    every = list(finished)
    there = {artifact.manifest["fingerprint"] for artifact in every}
    first = [artifact for artifact in every if not there.issuperset(artifact.manifest["parents"].values())]
    hit = {artifact.path for one in first for artifact in (one, *descendants(one, every))}
    return [artifact for artifact in every if artifact.path in hit]


def reopen(artifact: Artifact, keys: Set[str], fence: Fence) -> bool:
    """Open a torn artifact without its shards that hold one of the pictures, or a view; False where it is neither.

    The caller holds the claim on it.
    """
    if not artifact.name.startswith(("images", *BY_SHARD, *OF_ALL)):
        return False
    folders = receipt_folders(artifact)
    lost = [
        Shard(folder, receipt.shard)
        for folder in folders
        for receipt in _holding(storage.join(artifact.path, folder), keys)
    ]
    if lost or artifact.name.startswith(OF_ALL):
        deleting.reopen(artifact, lost, fence)
    return True


def drop(store: Store, keys: Set[str], shown: Collection[str], notify: Callable[[str], None]) -> int:
    """Delete what unfinished builds hold of the pictures: shards with some, and the files that may show any of them.

    Of samples all go: a chunk of captions is counted from the first picture on, so one that is gone moves all others.

    Args:
        store: where they lie.
        keys: of the pictures.
        shown: names of files, such as contact sheets, of which nobody knows what they show.
        notify: told when one waits for whoever may be at work on a build.

    Returns:
        How many files were deleted.
    """
    folder, deleted = storage.join(store.root, "artifacts"), 0
    for path in sorted({*store.folders()} - {artifact.path for artifact in store.finished()}):
        artifact = path.removeprefix(f"{folder}/")
        inside = [f"{artifact}/{name}" for name in storage.listing(path)]
        if inside:
            with claims.hold(store.root, f"artifacts/{artifact}", notify, deleting.CHANGED) as claim:
                deleted += _drop(folder, inside, keys, shown, claim.fence)
    return deleted


def _drop(folder: str, files: Iterable[str], keys: Set[str], shown: Collection[str], fence: Fence) -> int:
    """The same with the files of one build."""
    deleted, places = 0, set[str]()
    for name in files:
        file = PurePosixPath(name)
        if file.name in shown:
            fence()
            storage.remove(storage.join(folder, *file.parts[:2], RESULT))  # first: it says that the others are there
            storage.remove(storage.join(folder, name))
            deleted += 1
        if file.parent.name == shards.RECEIPTS:
            places.add(storage.join(folder, *file.parts[:-2]))
    for where in sorted(places):
        drawn = "samples" in PurePosixPath(where).parent.name
        for receipt in shards.finished(where).values() if drawn else _holding(where, keys):
            deleted += deleting.drop_shard(where, receipt, fence)
    sharded = [name for name in files if name.startswith(("images", *BY_SHARD)) and shard_of(name.rpartition("/")[2])]
    folders = {storage.join(folder, name.rpartition("/")[0]) for name in sharded}
    vouched = {
        storage.join(where, file) for where in folders for one in shards.finished(where).values() for file in one.files
    }
    for path in sorted({storage.join(folder, name) for name in sharded} - vouched):  # a killed deletion left them
        fence()
        storage.remove(path)
    return deleted


def _holding(where: str, keys: Set[str]) -> list[Receipt]:
    """Receipts of the shards in a folder that hold one of the pictures."""
    found = shards.finished(where).values()
    return [one for one in found if any(_holds(storage.join(where, name), keys) for name in one.files)]


def _holds(path: str, keys: Set[str]) -> bool:
    """Whether a file is of one of the pictures, or a table that has one."""
    file = PurePosixPath(path)
    return file.stem in keys or (file.suffix == ".parquet" and removal.holds(storage.read(path), keys))
