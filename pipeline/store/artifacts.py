"""Artifacts: folders on shared storage whose manifest, written last, is what "done" means.

    <root>/artifacts/<name>/<fingerprint>/
        manifest.json       files with sizes and sha256, rows, parents, settings, seconds, device-seconds, metrics
        ...                 the files themselves
        forgotten.json      what was taken out of the files since, if anything was: laid over the manifest
        receipts/           what each shard holds
        building/           checkpoints of an unfinished build; gone once the manifest stands

A fingerprint is the hash of what a step does: its name and version, the settings it reads, and its parents'
fingerprints. Equal fingerprints mean equal content, so a finished artifact is never built twice.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets.files import json_files, storage
from datasets.files.fence import Fence, unfenced
from datasets.files.storage import CorruptFile, FileEntry
from pipeline.errors import InfrastructureError
from pipeline.store.claims import OLD_LEASE, Claim

FORMAT = 1
NAMED = 3  # files, in a message
MANIFEST = "manifest.json"
FORGOTTEN = "forgotten.json"
BUILDING = "building"
DIGEST = "[0-9a-f]{16}"


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
        return {
            "step": self.step,
            "version": self.version,
            "settings": self.settings,
            "parents": self.parents,
        }


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: where it lies and what its manifest says."""

    name: str
    path: str
    manifest: dict[str, Any]

    @property
    def files(self) -> dict[str, FileEntry]:
        """Relative file names with sizes and hashes."""
        return {name: FileEntry(**entry) for name, entry in self.manifest["files"].items()}

    def read(self, name: str) -> bytes:
        """One of its files, verified against the manifest."""
        entry = FileEntry(**self.manifest["files"][name])  # not by `files`: there may be as many as pictures
        return storage.read(storage.join(self.path, name), expect=entry)

    def parent(self, name: str) -> "Artifact | None":
        """The artifact of that name that this one was made from, as it stands now."""
        root = self.path.removesuffix(f"/artifacts/{self.name}/{self.manifest['fingerprint']}")
        return Store(root).find(name, self.manifest["parents"][name])


class Store:
    """The artifacts below one root."""

    def __init__(self, root: str):
        self.root = root

    def path(self, name: str, digest: str) -> str:
        """Folder of the artifact `name` with a fingerprint."""
        return storage.join(self.root, "artifacts", name, digest)

    def find(self, name: str, digest: str) -> Artifact | None:
        """The finished artifact, or None; one whose manifest is damaged is not finished, which is told."""
        path = self.path(name, digest)
        manifest = read_manifest(path)
        return Artifact(name, path, manifest) if manifest else None

    def started(self, name: str, digest: str) -> bool:
        """Whether an unfinished build has left something to go on from."""
        files = storage.listing(self.path(name, digest))
        return any(file != OLD_LEASE for file in files)

    def finished(self, name: str | None = None) -> Iterator[Artifact]:
        """Every finished artifact (of one name), oldest first."""
        folder = storage.join(self.root, "artifacts", *([name] if name else []))
        found = []
        for file in storage.listing(folder):
            if file.endswith("/" + MANIFEST) and file.count("/") == (1 if name else 2):
                path = storage.join(folder, file.removesuffix("/" + MANIFEST))
                if manifest := read_manifest(path):
                    found.append(Artifact(manifest["name"], path, manifest))
        return iter(sorted(found, key=lambda artifact: artifact.manifest["created"]))

    def commit(
        self, name: str, fingerprint: Fingerprint, facts: Mapping[str, Any], claim: Claim | None = None
    ) -> Artifact:
        """Write the manifest of a completely built artifact, under the claim on it; None: nobody else can build it.

        `facts["files"]` maps relative names to `FileEntry`; the other facts (rows, seconds, metrics, ...) are kept
        as they are. The content hash leaves out the files named in `facts["timed"]`: they tell of times.

        Raises:
            InfrastructureError: a file is missing or cut short, so that it has to be built again.
            ClaimLost: so is the claim; nothing was written.
        """
        path = self.path(name, fingerprint.digest)
        files = {file: vars(entry) for file, entry in sorted(facts["files"].items())}
        manifest = {
            "format": FORMAT,
            "name": name,
            "fingerprint": fingerprint.digest,
            **fingerprint.as_dict(),
            **facts,
            "files": files,
            "bytes": sum(entry["bytes"] for entry in files.values()),
            "content": content_hash({file: entry for file, entry in files.items() if file not in facts["timed"]}),
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        if told := lacking(path, facts["files"]):
            raise InfrastructureError(told)
        if claim:
            claim.beat()
        storage.sweep(path)
        storage.remove(storage.join(path, FORGOTTEN))  # of an earlier build, whose discarding was killed
        publish = claim.publish if claim else storage.publish
        publish(text.encode(), storage.join(path, MANIFEST))
        return Artifact(name, path, json.loads(text))


def lacking(path: str, files: Mapping[str, FileEntry]) -> str | None:
    """Which files of an artifact are missing or have another size, in words; None where all are there."""
    sizes = storage.sizes(path)
    found = sorted(name for name, entry in files.items() if sizes.get(name) != entry.bytes)
    if not found:
        return None
    more = ", ..." if len(found) > NAMED else ""
    return f"{len(found)} of {len(files)} files in {path} are missing or cut short: {', '.join(found[:NAMED])}{more}"


def content_hash(files: Mapping[str, Mapping[str, Any]]) -> str:
    """sha256 over the sorted (file name, sha256) pairs: equal for two builds with equal bytes."""
    lines = "".join(f"{name} {entry['sha256']}\n" for name, entry in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_manifest(folder: str) -> dict[str, Any] | None:
    """An artifact's manifest, with what was taken out since; None where there is none, or where it is damaged.

    Raises:
        CorruptFile: it has an unknown format.
    """
    path = storage.join(folder, MANIFEST)
    manifest = json_files.read(path, _whole)
    if manifest is None:
        return None
    if manifest["format"] != FORMAT:
        raise CorruptFile(f"{path} has format {manifest['format']}; this version reads format {FORMAT}")
    removed = Removals.found(folder)
    return _without(manifest, removed) if removed else None


def _whole(told: dict[str, Any]) -> dict[str, Any]:
    """A manifest that says what every reader asks for; KeyError for another."""
    if told["format"] == FORMAT:
        for key in ("name", "fingerprint", "step", "settings", "parents", "files", "rows", "bytes", "created"):
            _ = told[key]
    return told


@dataclass
class Removals:
    """What was taken out of a finished artifact's files: the files as they are now (None: gone), and the rows left.

    `before` are the files as they were before the latest change of each: a kill between this record and the file itself
    leaves the old one, which is then still known.
    """

    files: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    before: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: int | None = None
    forgotten: int = 0

    @classmethod
    def read(cls, folder: str) -> "Removals":
        """Those of a finished artifact; empty ones where there are none."""
        found = cls.found(folder)
        assert found is not None, f"{folder} was finished a moment ago"
        return found

    @classmethod
    def found(cls, folder: str) -> "Removals | None":
        """Those of an artifact, empty ones where there are none; None where nobody can know, which is told."""
        path = storage.join(folder, FORGOTTEN)
        return json_files.read(path, lambda told: cls(**told)) if storage.exists(path) else cls()

    def publish(self, folder: str) -> None:
        """Write them beside the manifest."""
        storage.publish(json.dumps(vars(self), indent=1).encode(), storage.join(folder, FORGOTTEN))


def _without(manifest: dict[str, Any], removed: Removals) -> dict[str, Any]:
    """A manifest as it reads after removals; its fingerprint and content hash stay those of the build."""
    if removed.rows is None:
        return manifest
    files = {name: entry for name, entry in {**manifest["files"], **removed.files}.items() if entry}
    notes = dict(manifest["notes"])
    if "lost" in notes:
        notes["lost"] = {**notes["lost"], "forgotten": notes["lost"].get("forgotten", 0) + removed.forgotten}
    now = {"files": files, "bytes": sum(entry["bytes"] for entry in files.values()), "rows": removed.rows}
    return {**manifest, **now, "notes": notes, "forgotten": removed.forgotten}


def rewrite(artifact: Artifact, name: str, change: Callable[[bytes], bytes | None], fence: Fence = unfenced) -> bool:
    """Replace a file of a finished artifact by what `change` makes of it (None: delete it); False where it is the same.

    The removals are recorded first; killed in between, the same call goes on. The caller holds the artifact's claim,
    with this fence.

    Raises:
        CorruptFile: the file holds neither what it should nor what it held before.
    """
    path = storage.join(artifact.path, name)
    removed = Removals.read(artifact.path)
    entry = artifact.manifest["files"].get(name)
    if entry is None:  # gone, or about to be
        fence()
        storage.remove(path)
        return False
    content = storage.read(path)
    found = vars(storage.entry_of(content))
    if found not in (entry, removed.before.get(name)):
        raise CorruptFile(f"{path} does not hold the bytes that its manifest names; delete its artifact's folder")
    new = change(content)
    if new == content:
        return False
    removed.files[name] = vars(storage.entry_of(new)) if new is not None else None
    removed.before[name] = found
    removed.rows = artifact.manifest["rows"] if removed.rows is None else removed.rows
    fence()
    removed.publish(artifact.path)
    if new is None:
        storage.remove(path)
    else:
        storage.publish(new, path)
    return True
