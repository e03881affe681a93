"""Damage: which files of finished artifacts are not what their manifests say, and what to do about each kind.

Files of shards can be made anew alone (`repairing`). Of all others, such as weights and parts of a plan, a person has a
copy, or makes their artifact anew; so it is with a manifest, for which its artifact only counts as unfinished.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

from datasets.files import storage
from datasets.files.errors import StorageError, StoreAway, StoreRefuses
from datasets.files.storage import CorruptFile
from datasets.formats import shard_table, shards
from pipeline.store.artifacts import Artifact, Fingerprint, Store, wrong_marks
from pipeline.store.deleting import receipt_folders, shard_of

READERS = 8  # files that are verified at a time
NAMED = 3  # of them, in a message
File = tuple[Artifact, str]  # of an artifact, by its name there


@dataclass(frozen=True)
class Damage:
    """What is damaged of some artifacts: `files` of those that are finished, and `marks`, a sentence for each by its
    path, of those that only count as unfinished for them, by the names of these. `unfinished` builds say no more than
    what they are made from."""

    artifacts: dict[str, Artifact]
    files: list[File]
    marks: dict[str, dict[str, str]]
    unfinished: list[Artifact]

    @cached_property
    def alone(self) -> list[File]:
        """The files that belong to no shard."""
        return of_no_shard(self.files)

    @cached_property
    def of_shards(self) -> list[File]:
        """The other files."""
        return [file for file in self.files if file not in self.alone]

    @property
    def beyond_repair(self) -> set[str]:
        """Names of the artifacts that nothing can be made from before a person has seen to them."""
        return {artifact.name for artifact, _ in self.alone} | self.marks.keys()

    @property
    def paths(self) -> list[str]:
        """All that is damaged."""
        return [*self._marked, *paths(self.files)]

    def left(self, mended: Collection[str] = ()) -> list[str]:
        """Of that what a person has to see to, but what is of artifacts that are `mended` since."""
        return [*self._marked, *paths(file for file in self.alone if file[0].name not in mended)]

    @property
    def _marked(self) -> list[str]:
        return [path for told in self.marks.values() for path in told]

    @property
    def mendable(self) -> list[File]:
        """The files of shards that can be made anew as things are."""
        return [file for file in self.of_shards if file[0].name not in self.waiting]

    @cached_property
    def waiting(self) -> list[str]:
        """Names of the artifacts whose shards cannot: what they are made from is not whole, nor made anew before."""
        missing, found = set(self.beyond_repair), list[str]()
        hit = {artifact.name for artifact, _ in self.of_shards}
        for name in (name for name in self.artifacts if name in hit):  # what others are made from comes before them
            if missing.intersection(self.artifacts[name].manifest["parents"]):
                missing.add(name)
                found.append(name)
            else:
                missing.discard(name)  # with its shards comes all else of it
        return found

    @property
    def later(self) -> list[str]:
        """Names of the artifacts that wait, and of those that a person can only make anew from these."""
        found = list(self.waiting)
        alone = {artifact.name for artifact, _ in self.alone}
        for name, artifact in self.artifacts.items():
            if name in alone and name not in found and not artifact.manifest["parents"].keys().isdisjoint(found):
                found.append(name)
        return found

    def remedies(self, same: str, mended: Collection[str] = ()) -> Iterator[str]:
        """A sentence on each artifact that a person has to see to now, in their order: neither `mended` since, nor for
        `later`. `same` are the words of a run of their conf."""
        for name, artifact in self.artifacts.items():
            own = [file for file in self.alone if file[0].name == name]
            if own and name not in (*mended, *self.later):
                step = artifact.manifest["step"]
                anew = f"python -m pipeline run {same} --force {step} --until {step}"
                yield f"{shown(own)}: damaged, and of no shard; put back a copy, or make all of {name} anew: {anew}"
        for told in self.marks.values():
            yield from told.values()


def examine(store: Store, prints: Mapping[str, Fingerprint]) -> Damage:
    """Look at every file of the finished artifacts of some fingerprints, which come parents first.

    Raises:
        StorageError: the storage is away, so nobody knows.
    """
    found = {name: store.find(name, print_.digest) for name, print_ in prints.items()}
    artifacts = {name: artifact for name, artifact in found.items() if artifact}
    begun = [name for name in prints if name not in artifacts and store.started(name, prints[name].digest)]
    unfinished = [_unfinished(store, name, prints[name]) for name in begun]
    marks = {build.name: told for build in unfinished if (told := wrong_marks(build.path))}
    return Damage(artifacts, damaged(artifacts.values()), marks, unfinished)


def _unfinished(store: Store, name: str, print_: Fingerprint) -> Artifact:
    about = {"fingerprint": print_.digest, "parents": print_.parents, "files": {}}
    return Artifact(name, store.path(name, print_.digest), about)


def check_marks(folder: str) -> None:
    """Refuse an artifact that counts as unfinished only since what says that it is done is damaged.

    Raises:
        CorruptFile: so it is.
    """
    for told in wrong_marks(folder).values():
        raise CorruptFile(told)


def paths(files: Iterable[File]) -> list[str]:
    """Where files of artifacts lie."""
    return [storage.join(artifact.path, name) for artifact, name in files]


def shown(files: Sequence[File]) -> str:
    """The paths of the first of some files, in words."""
    return f"{', '.join(paths(files[:NAMED]))}{', ...' if len(files) > NAMED else ''}"


def damaged(artifacts: Iterable[Artifact]) -> list[File]:
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


def _is_damaged(file: File) -> bool:
    artifact, name = file
    try:
        artifact.read(name)
    except (StoreAway, StoreRefuses):
        raise
    except (CorruptFile, StorageError):  # it holds other bytes, is gone, or is a folder by now
        return True
    return False


def of_no_shard(files: Iterable[File]) -> list[File]:
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
