"""Artifacts: folders on shared storage whose manifest, written last, is what "done" means.

    <root>/artifacts/<name>/<fingerprint>/
        manifest.json       files with sizes and sha256, rows, parents, settings, seconds, device-seconds, metrics
        shards.parquet      the same of its shards' files, where it has shards: a manifest stays small
        ...                 the files themselves
        forgotten.json      what was taken out of the files since, if anything was: laid over the manifest
        receipts/           what each shard holds
        building/           checkpoints of an unfinished build; gone once the manifest stands
            repair.json     the content of an artifact that was finished, of which some shards are made anew

A fingerprint is the hash of what a step does: its name and version, the settings it reads, and its parents'
fingerprints. Equal fingerprints mean equal content, so a finished artifact is never built twice.
"""

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from numbers import Real
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from datasets.files import json_files, notices, storage
from datasets.files.errors import StorageError, StoreAway, StoreRefuses
from datasets.files.fence import unfenced
from datasets.files.json_files import NUMBER
from datasets.files.notices import PassedOver
from datasets.files.storage import CorruptFile, FileEntry
from datasets.formats import shard_table
from datasets.formats.shard_table import Shards
from pipeline.errors import InfrastructureError
from pipeline.store.claims import OLD_LEASE, Claim
from pipeline.store.redact import redact
from pipeline.store.removals import FORGOTTEN, Removals, without

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 2
READ = (1, FORMAT)  # before, a manifest named the files of shards too
NAMED = 3  # files, in a message
MANIFEST = "manifest.json"
BUILDING = "building"
REPAIR = f"{BUILDING}/repair.json"  # what a finished artifact was of which some shards are made anew
INPUTS = f"{BUILDING}/inputs.json"  # what an unfinished one is made from: content hashes, by name
DIGEST = "[0-9a-f]{16}"


class Source(TypedDict):
    """What a plan's manifest says of one of its sources."""

    name: str
    planned: int
    rejected: dict[str, int]
    licence: dict[str, str | None]
    licences: dict[str, int]
    captions: NotRequired[int]
    read: NotRequired[int]
    weight: NotRequired[NUMBER]


class PromptSet(TypedDict):
    """Of which captions something was drawn, and of how many."""

    n: int
    of: NotRequired[str]
    file: NotRequired[str]


class Notes(TypedDict, total=False):
    """Of what a step keeps beside files and figures, all that anybody reads of a manifest."""

    source: str
    sources: list[Source]
    read: int
    rejected: dict[str, int]
    captions: int | dict[str, int]
    columns: dict[str, str]
    buckets: dict[str, int]
    licence: dict[str, str | None] | str | None
    licences: dict[str, int]
    opt_outs: dict[str, Any]
    lost: dict[str, int]
    lost_of: dict[str, dict[str, int]]
    duplicates: dict[str, int]
    prompts: PromptSet | dict[str, PromptSet]
    spec: dict[str, Any]
    compressor: str | None


class Manifest(TypedDict):
    """What every reader asks for, and what not every manifest has, but of this kind."""

    name: str
    fingerprint: str
    step: str
    created: str
    rows: int
    bytes: int
    settings: dict[str, Any]
    parents: dict[str, str]
    files: dict[str, FileEntry]
    shards: NotRequired[list[str]]
    timed: NotRequired[list[str]]
    metrics: NotRequired[dict[str, Real]]
    notes: NotRequired[Notes]
    seconds: NotRequired[NUMBER]
    device_seconds: NotRequired[NUMBER]
    content: NotRequired[str]
    build: NotRequired[str]
    user: NotRequired[str]
    command: NotRequired[str]
    versions: NotRequired[dict[str, str]]


@dataclass(frozen=True)
class Fingerprint:
    """What determines an artifact's content, in clear text, and its hash."""

    step: str
    version: int
    settings: dict[str, Any]
    parents: dict[str, str]

    @property
    def digest(self) -> str:
        """First 16 hex digits of the sha256 of the clear text's canonical JSON."""
        text = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """The clear text, as it stands in a manifest."""
        return {"step": self.step, "version": self.version, "settings": self.settings, "parents": self.parents}


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: where it lies and what its manifest says; sent elsewhere, no more than that."""

    name: str
    path: str
    manifest: dict[str, Any]

    @cached_property
    def files(self) -> dict[str, FileEntry]:
        """Relative file names with sizes and hashes, those of shards included."""
        found: dict[str, FileEntry] = {}
        for folder in self.manifest.get("shards", ()):
            prefix = f"{folder}/" if folder else ""
            found |= {prefix + name: entry for name, entry in self.shards(folder).files().items()}
        return found | {name: FileEntry(**entry) for name, entry in self.manifest["files"].items()}

    @property
    def called(self) -> tuple[str, str]:
        """Its name and fingerprint, by which a store finds it."""
        return self.name, self.manifest["fingerprint"]

    def read(self, name: str) -> bytes:
        """One of its files, verified against the manifest."""
        named = self.manifest["files"].get(name)
        entry = FileEntry(**named) if named else self.files[name]
        return storage.read(storage.join(self.path, name), expect=entry)

    def shards(self, folder: str = "") -> Shards:
        """The shards in its own folder, or in one below it."""
        if folder not in self._shards:
            where = storage.join(self.path, folder)
            table = self._shard_table
            self._shards[folder] = Shards.gathered(where) if table is None else shard_table.within(table, where, folder)
        return self._shards[folder]

    @cached_property
    def _shards(self) -> dict[str, Shards]:
        return {}

    @cached_property
    def _shard_table(self) -> "pa.Table | None":
        """The table of its shards; None, which is told, where none is there or in force, or it is damaged."""
        why = "there is none"
        if shard_table.FILE in self.manifest["files"]:
            try:
                return shard_table.load(self.read(shard_table.FILE))
            except (CorruptFile, FileNotFoundError) as error:
                why = str(error)
        path = storage.join(self.path, shard_table.FILE)
        notices.tell(PassedOver(path, f"{why}; the receipts of all shards are read in its place"))
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return Artifact, (self.name, self.path, self.manifest)

    def parent(self, name: str) -> "Artifact | None":
        """The artifact of that name that this one was made from, as it stands now; None where it was made without."""
        if (digest := self.manifest["parents"].get(name)) is None:
            return None
        root = self.path.removesuffix(f"/artifacts/{self.name}/{self.manifest['fingerprint']}")
        return Store(root).find(name, digest)


class Store:
    """The artifacts below one root."""

    def __init__(self, root: str):
        self.root = root
        self._every = storage.join(root, "artifacts")
        self._manifest, self._within = read_manifest, _folders_in

    def path(self, name: str, digest: str) -> str:
        """Folder of the artifact `name` with a fingerprint."""
        return storage.join(self._every, name, digest)

    def find(self, name: str, digest: str) -> Artifact | None:
        """The finished artifact, or None; one whose manifest is damaged is not finished, which is told."""
        path = self.path(name, digest)
        manifest = self._manifest(path)
        return Artifact(name, path, manifest) if manifest else None

    def started(self, name: str, digest: str) -> bool:
        """Whether an unfinished build has left something to go on from."""
        return storage.holds(self.path(name, digest), besides=(OLD_LEASE, INPUTS))

    def finished(self, name: str | None = None) -> Iterator[Artifact]:
        """Every finished artifact (of one name), oldest first."""
        paths = self.folders(name)
        manifests = storage.ahead(partial(self._manifest, path) for path in paths)
        found = [Artifact(told["name"], path, told) for path, told in zip(paths, manifests, strict=True) if told]
        return iter(sorted(found, key=lambda artifact: artifact.manifest["created"]))

    def folders(self, name: str | None = None) -> list[str]:
        """Paths of all artifacts (of one name), finished or not. What lies in them is not listed: it may be a lot."""
        named = [storage.join(self._every, one) for one in ([name] if name else self._within(self._every))]
        return [storage.join(folder, digest) for folder in named for digest in self._within(folder)]

    def commit(
        self, name: str, fingerprint: Fingerprint, facts: Mapping[str, Any], claim: Claim | None = None
    ) -> Artifact:
        """Write the manifest of a completely built artifact, under the claim on it; None: nobody else can build it.

        `facts["files"]` maps relative names to `FileEntry`, `facts["shards"]`, where it has any, folders to the
        receipts of the shards there; their files come into a table of their own, which is written before. The other
        facts (rows, seconds, metrics, ...) are kept as they are. The content hash leaves out that table, which says no
        more than they do, and the files named in `facts["timed"]`: they tell of times. An artifact that was repaired
        keeps the one that it had.

        Raises:
            InfrastructureError: a file is missing or cut short, so that it has to be built again.
            ClaimLost: so is the claim; nothing was written.
            TypeError: readers would refuse the manifest, so nothing was written either.
        """
        path = self.path(name, fingerprint.digest)
        every, shards = dict(facts["files"]), facts.get("shards", {})
        for folder, receipts in shards.items():
            prefix = f"{folder}/" if folder else ""
            every |= {prefix + file: entry for receipt in receipts for file, entry in receipt.files.items()}
        files = dict(facts["files"])
        table = shard_table.dump(shards) if shards else None
        if table is not None:
            files[shard_table.FILE] = storage.entry_of(table)
        manifest = {
            "format": FORMAT,
            "build": uuid.uuid4().hex[:8],
            "name": name,
            "fingerprint": fingerprint.digest,
            **fingerprint.as_dict(),
            **facts,
            "settings": redact(fingerprint.settings),
            "notes": redact(facts.get("notes", {})),
            "files": {file: vars(entry) for file, entry in sorted(files.items())},
            "shards": sorted(shards),
            "objects": len({**every, **files}),
            "bytes": sum(entry.bytes for entry in {**every, **files}.values()),
            "content": _before_repair(path)
            or content_hash({file: entry for file, entry in every.items() if file not in facts["timed"]}),
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        artifact = Artifact(name, path, _whole(json.loads(text)))
        if claim:
            claim.beat()
        storage.sweep(path, claim.fence if claim else unfenced)
        if table is not None:
            storage.publish(table, storage.join(path, shard_table.FILE))

        def check() -> None:
            if told := lacking(path, every):
                raise InfrastructureError(told)

        if claim:
            claim.publish(text.encode(), storage.join(path, MANIFEST), check)
        else:
            check()
            storage.publish(text.encode(), storage.join(path, MANIFEST))
        return artifact


class Look(Store):
    """The artifacts below one root as they are when they are first asked for: each folder is listed once, each manifest
    read once, and where a listing tells that there is none, it is not asked for.

    For what a plan needs of them; whoever builds or deletes looks anew.
    """

    def __init__(self, root: str):
        super().__init__(root)
        self._manifest, self._within = cache(read_manifest), cache(_folders_in)

    def find(self, name: str, digest: str) -> Artifact | None:
        """See `Store.find`."""
        return super().find(name, digest) if name in self._within(self._every) else None

    def started(self, name: str, digest: str) -> bool:
        """See `Store.started`."""
        return self.path(name, digest) in self.folders(name) and super().started(name, digest)

    def folders(self, name: str | None = None) -> list[str]:
        """See `Store.folders`."""
        return super().folders(name) if name in (None, *self._within(self._every)) else []


def _folders_in(folder: str) -> list[str]:
    return storage.children(folder)[1]


def _before_repair(path: str) -> str | None:
    """The content hash that an artifact had before some of its shards were made anew; None where none were."""
    return json_files.read(storage.join(path, REPAIR), lambda told: str(told["content"]))


def lacking(path: str, files: Mapping[str, FileEntry]) -> str | None:
    """Which files of an artifact are missing or have another size, in words; None where all are there."""
    sizes = storage.sizes(path)
    found = sorted(name for name, entry in files.items() if sizes.get(name) != entry.bytes)
    if not found:
        return None
    more = ", ..." if len(found) > NAMED else ""
    return f"{len(found)} of {len(files)} files in {path} are missing or cut short: {', '.join(found[:NAMED])}{more}"


def children(parent: Artifact, finished: Iterable[Artifact]) -> list[Artifact]:
    """The finished artifacts that were made from another one itself."""
    digest = parent.manifest["fingerprint"]
    return [artifact for artifact in finished if digest in artifact.manifest["parents"].values()]


def descendants(parent: Artifact, finished: Iterable[Artifact]) -> list[Artifact]:
    """The finished artifacts that were made from another one, directly or not."""
    digests, found, left = {parent.manifest["fingerprint"]}, list[Artifact](), list(finished)
    while new := [artifact for artifact in left if digests.intersection(artifact.manifest["parents"].values())]:
        digests |= {artifact.manifest["fingerprint"] for artifact in new}
        found += new
        left = [artifact for artifact in left if artifact not in new]
    return found


def content_hash(files: Mapping[str, FileEntry]) -> str:
    """sha256 over the sorted (file name, sha256) pairs: equal for two builds with equal bytes."""
    lines = "".join(f"{name} {entry.sha256}\n" for name, entry in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_manifest(folder: str) -> dict[str, Any] | None:
    """An artifact's manifest, with what was taken out since; None where there is none, or where it is damaged.

    Raises:
        CorruptFile: it has an unknown format.
    """
    manifest = json_files.read(path := storage.join(folder, MANIFEST), _whole)
    if manifest is None:
        return None
    if manifest["format"] not in READ:
        raise CorruptFile(f"{path} has format {manifest['format']}; this version reads formats up to {FORMAT}")
    removed = Removals.found(folder, manifest.get("build", ""))
    return without(manifest, removed) if removed else None


def wrong_marks(folder: str) -> dict[str, str]:
    """What is damaged of a manifest and what is laid over it, for which an artifact only counts as unfinished: a
    sentence with the remedy, by path."""
    remedy = "put it back from a copy, or start a run of the same conf: it takes up what is there"
    found = {}
    for name, make in ((MANIFEST, _whole), (FORGOTTEN, Removals.told)):
        if storage.exists(path := storage.join(folder, name)):
            try:
                json_files.parse(path, storage.read(path), make)
            except (StoreAway, StoreRefuses):
                raise
            except CorruptFile as error:
                found[path] = f"{error}; {remedy}"
            except StorageError as error:
                found[path] = f"{path} is no file: {error.strerror}; {remedy}"
    return found


def _whole(told: dict[str, Any]) -> dict[str, Any]:
    """A manifest that says what every reader asks for; KeyError or TypeError for another."""
    json_files.require(told, int, "format")
    if told["format"] in READ:
        json_files.of(Manifest, told)
    return told
