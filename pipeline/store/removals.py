"""What was taken out of finished artifacts: a record beside the manifest, which is never written again.

<artifact>/forgotten.json   the files as they are now, and the rows left
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypedDict

from datasets.files import json_files, notices, storage
from datasets.files.fence import Fence, unfenced
from datasets.files.notices import PassedOver
from datasets.files.storage import CorruptFile, FileEntry
from datasets.formats import shard_table, shards
from datasets.formats.shards import Receipt

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.store.artifacts import Artifact

FORGOTTEN = "forgotten.json"


class Told(TypedDict, total=False):
    """What the file holds."""

    files: dict[str, FileEntry | None]
    before: dict[str, FileEntry]
    rows: int | None
    forgotten: int
    bytes: int | None
    build: str


@dataclass
class Removals:
    """What was taken out of a finished artifact's files: the files as they are now (None: gone), and the rows left.

    It is of one build. That of an earlier one, whose discarding was killed or which a repair made anew, does not count:
    nobody has to delete it, at a moment when it may be another's. `before` are the files as they were before the latest
    change of each: a kill between this record and the file itself leaves the old one, which is then still known.
    """

    files: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    before: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: int | None = None
    forgotten: int = 0
    bytes: int | None = None  # of all files; earlier versions did not say
    build: str = ""  # of its manifest; earlier versions did not say

    @classmethod
    def of(cls, artifact: "Artifact") -> "Removals":
        """Those of a finished artifact; empty ones where there are none."""
        found = cls.found(artifact.path, artifact.manifest.get("build", ""))
        assert found is not None, f"{artifact.path} was finished a moment ago"
        return found

    @classmethod
    def told(cls, told: dict[str, Any]) -> "Removals":
        """What a file says; TypeError for another."""
        return cls(**json_files.of(Told, told))

    @classmethod
    def found(cls, folder: str, build: str) -> "Removals | None":
        """Those of a build, empty ones where there are none; None where nobody can know, which is told."""
        path, none = storage.join(folder, FORGOTTEN), cls(build=build)
        found = json_files.read(path, cls.told, absent=none)
        return none if found and found.build != build else found

    def recorded(self, artifact: "Artifact", name: str) -> dict[str, Any] | None:
        """A file of the artifact, as it is or is about to be; None where it is not there any more."""
        if name in self.files:
            return self.files[name]
        entry = artifact.files.get(name)
        return vars(entry) if entry else None

    def record(self, artifact: "Artifact", name: str, entry: dict[str, Any] | None) -> None:
        """What a file is from now on."""
        self.rows = artifact.manifest["rows"] if self.rows is None else self.rows
        before = artifact.manifest["bytes"] if self.bytes is None else self.bytes
        sizes = [told["bytes"] if told else 0 for told in (self.recorded(artifact, name), entry)]
        self.bytes = before - sizes[0] + sizes[1]
        self.files[name] = entry

    def shards(self, folder: str) -> list[int]:
        """The shards in a folder of which a file was changed."""
        files = (PurePosixPath(name) for name, entry in self.files.items() if entry)
        return sorted(
            {int(file.stem) for file in files if str(file.parent) == (folder or ".") and file.stem.isdecimal()}
        )

    def publish(self, folder: str) -> None:
        """Write them beside the manifest."""
        storage.publish(json.dumps(vars(self), indent=1).encode(), storage.join(folder, FORGOTTEN))


def without(manifest: dict[str, Any], removed: Removals) -> dict[str, Any]:
    """A manifest as it reads after removals; its fingerprint and content hash stay those of the build."""
    if removed.rows is None:
        return manifest
    files = {name: entry for name, entry in {**manifest["files"], **removed.files}.items() if entry}
    notes = dict(manifest["notes"])
    if "lost" in notes:
        notes["lost"] = {**notes["lost"], "forgotten": notes["lost"].get("forgotten", 0) + removed.forgotten}
    size = sum(entry["bytes"] for entry in files.values()) if removed.bytes is None else removed.bytes
    now = {"files": files, "bytes": size, "rows": removed.rows}
    return {**manifest, **now, "notes": notes, "forgotten": removed.forgotten}


def rewrite(
    artifact: "Artifact",
    name: str,
    change: Callable[[bytes], bytes | None],
    fence: Fence = unfenced,
    *,
    shard: bool = False,
) -> bool:
    """Replace a file of a finished artifact by what `change` makes of it (None: delete it); False where it is the same.

    The removals are recorded first; killed in between, the same call goes on. The caller holds the artifact's claim,
    with this fence. With that of a `shard` the table of shards is out of force until `tabulate`.

    Raises:
        CorruptFile: the file holds neither what it should nor what it held before.
    """
    path = storage.join(artifact.path, name)
    removed = Removals.of(artifact)
    entry = removed.recorded(artifact, name)
    if entry is None:  # gone, or about to be
        fence()
        storage.remove(path)
        return False
    content = storage.read(path)
    found = vars(storage.entry_of(content))
    if found not in (entry, removed.before.get(name)):
        raise CorruptFile(
            f"{path} does not hold the bytes that its manifest names; delete its artifact's folder, and go on"
        )
    new = change(content)
    if new == content:
        return False
    if shard:
        if table := removed.recorded(artifact, shard_table.FILE):
            removed.before[shard_table.FILE] = table
        removed.record(artifact, shard_table.FILE, None)
    removed.record(artifact, name, vars(storage.entry_of(new)) if new is not None else None)
    removed.before[name] = found
    fence()
    removed.publish(artifact.path)
    if new is None:
        storage.remove(path)
    else:
        storage.publish(new, path)
    return True


def tabulate(artifact: "Artifact", folders: Iterable[str], fence: Fence = unfenced) -> None:
    """Put the table of a finished artifact's shards in these folders into force again, after a `rewrite`.

    It says what it said before, and of the shards that were changed since the build what their receipts say. Killed in
    between, it counts for nothing, and the receipts of all are read in its place.
    """
    removed = Removals.of(artifact)
    if removed.files.get(shard_table.FILE, ...) is not None:
        return
    before = _table_before(artifact, removed)
    receipts: dict[str, list[Receipt]] = {}
    for folder in folders:
        where = storage.join(artifact.path, folder)
        if before is None:
            receipts[folder] = list(shards.receipts(where).values())
        else:
            receipts[folder] = [shards.receipt(where, number) for number in removed.shards(folder)]
    fence()
    entry = storage.publish(shard_table.dump(receipts, before), storage.join(artifact.path, shard_table.FILE))
    removed.record(artifact, shard_table.FILE, vars(entry))
    removed.publish(artifact.path)


def _table_before(artifact: "Artifact", removed: Removals) -> "pa.Table | None":
    """The table of shards that was in force before the first of the changes; None where it is not there any more."""
    entry = removed.before.get(shard_table.FILE)
    path = storage.join(artifact.path, shard_table.FILE)
    try:
        return shard_table.load(storage.read(path, expect=FileEntry(**entry))) if entry else None
    except (CorruptFile, FileNotFoundError) as error:
        notices.tell(PassedOver(path, f"{error}; the receipts of all shards are read in its place"))
        return None
