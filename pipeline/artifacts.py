"""Artifacts: folders on shared storage whose manifest, written last, is what "done" means.

    <root>/artifacts/<name>/<fingerprint>/
        manifest.json       files with sizes and sha256, rows, parents, settings, seconds, device-seconds, metrics
        ...                 the files themselves
        building/           receipts and checkpoints of an unfinished build; gone once the manifest stands

A fingerprint is the hash of what a step does: its name and version, the settings it reads, and its parents'
fingerprints. Equal fingerprints mean equal content, so a finished artifact is never built twice.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import storage
from datasets.storage import FileEntry

FORMAT = 1
MANIFEST = "manifest.json"
BUILDING = "building"
LEASE = f"{BUILDING}/lease.json"


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
        return storage.read(storage.join(self.path, name), expect=self.files[name])

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
        """The finished artifact, or None."""
        path = self.path(name, digest)
        manifest = storage.join(path, MANIFEST)
        if not storage.exists(manifest):
            return None
        return Artifact(name, path, read_manifest(manifest))

    def started(self, name: str, digest: str) -> bool:
        """Whether an unfinished build has left something to go on from."""
        files = storage.listing(self.path(name, digest))
        return any(file != LEASE for file in files)

    def finished(self, name: str | None = None) -> Iterator[Artifact]:
        """Every finished artifact (of one name), oldest first."""
        folder = storage.join(self.root, "artifacts", *([name] if name else []))
        found = []
        for file in storage.listing(folder):
            if file.endswith("/" + MANIFEST) and file.count("/") == (1 if name else 2):
                path = storage.join(folder, file)
                manifest = read_manifest(path)
                found.append(Artifact(manifest["name"], path.removesuffix("/" + MANIFEST), manifest))
        return iter(sorted(found, key=lambda artifact: artifact.manifest["created"]))

    def commit(self, name: str, fingerprint: Fingerprint, facts: Mapping[str, Any]) -> Artifact:
        """Write the manifest of a completely built artifact, then drop its building folder.

        `facts["files"]` maps relative names to `FileEntry`; the other facts (rows, seconds, metrics, ...) are kept
        as they are. The content hash leaves out the files named in `facts["timed"]`: they tell of times.
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
        storage.sweep(path)
        storage.publish(text.encode(), storage.join(path, MANIFEST))
        artifact = Artifact(name, path, json.loads(text))
        self.tidy(artifact)
        return artifact

    def tidy(self, artifact: Artifact) -> None:
        """Delete what only the build of a finished artifact needed; a killed run may have left it."""
        storage.remove(storage.join(artifact.path, BUILDING))

    def discard(self, name: str, digest: str) -> None:
        """Delete an artifact's files, its manifest first so that no reader sees half of it; a lease on it stays."""
        path = self.path(name, digest)
        storage.remove(storage.join(path, MANIFEST))
        for file in storage.listing(path):
            if file != LEASE:
                storage.remove(storage.join(path, file))


def content_hash(files: Mapping[str, Mapping[str, Any]]) -> str:
    """sha256 over the sorted (file name, sha256) pairs: equal for two builds with equal bytes."""
    lines = "".join(f"{name} {entry['sha256']}\n" for name, entry in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_manifest(path: str) -> dict[str, Any]:
    """A manifest; refused when it is damaged or of a format this version does not know."""
    try:
        manifest: dict[str, Any] = json.loads(storage.read(path))
    except ValueError as error:
        raise storage.CorruptFile(
            f"{path} is not readable as JSON ({error}); delete its folder and run again"
        ) from error
    if manifest.get("format") != FORMAT:
        raise storage.CorruptFile(f"{path} has format {manifest.get('format')}; this version reads format {FORMAT}")
    return manifest
