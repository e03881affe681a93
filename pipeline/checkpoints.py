"""Checkpoints of an unfinished training, in its artifact's building folder.

The newest few stay, and those at milestones. A safetensors file for each part of a checkpoint, and a small marker with
its size and sha256, written last. The newest checkpoint all of whose parts their markers vouch for wins; a damaged or
unfinished one is skipped, and said so.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

from datasets import storage
from datasets.storage import CorruptFile, FileEntry

KEEP = 2


@dataclass(frozen=True, order=True)
class Saved:
    """A checkpoint: the state after `step` steps, in so many parts."""

    step: int
    parts: int

    def name(self, part: int, suffix: str) -> str:
        """File of a part (`safetensors`) or of its marker (`json`)."""
        return f"{self.step:09d}-{part}of{self.parts}.{suffix}"


class Checkpoints:
    """The checkpoints of one training below a folder, as one of the ranks that write a part of each sees them."""

    def __init__(
        self,
        folder: str,
        warn: Callable[[str], None],
        part: int = 0,
        parts: int = 1,
        milestones: Container[int] = (),
    ):
        self.folder, self.part, self.parts, self.milestones = folder, part, parts, milestones
        self.warn = warn

    def save(self, step: int, data: bytes) -> None:
        """Publish our part of the state after `step` steps; the first part's rank drops what is not kept."""
        saved = Saved(step, self.parts)
        entry = storage.publish(data, self._path(saved, self.part, "safetensors"))
        storage.publish(json.dumps(vars(entry)).encode(), self._path(saved, self.part, "json"))
        if self.part == 0:
            markers = self._markers()
            whole = sorted(found for found, parts in markers.items() if len(parts) == found.parts)
            kept = {*whole[-KEEP:], *(found for found in whole if found.step in self.milestones)}
            for old in [found for found in markers if whole[-KEEP:] and found < whole[-KEEP:][0] and found not in kept]:
                for part in range(old.parts):
                    storage.remove(self._path(old, part, "json"))
                    storage.remove(self._path(old, part, "safetensors"))

    def newest(self, step: int | None = None) -> Saved | None:
        """The newest checkpoint that is whole and valid, or None; with `step`, of those after so many steps."""
        for saved in sorted(self._markers(), reverse=True):
            if step not in (None, saved.step):
                continue
            try:
                for part in range(saved.parts):
                    self._read(saved, part)
                return saved
            except (CorruptFile, FileNotFoundError, ValueError, TypeError) as error:
                self.warn(f"checkpoint of step {saved.step} skipped: {error}")
        return None

    def read(self, saved: Saved) -> Iterator[bytes]:
        """The parts of a checkpoint that this rank needs: its own where it was written by as many, else all."""
        if saved.parts == self.parts:
            yield self._read(saved, self.part)
        else:
            yield from self.read_all(saved)

    def read_all(self, saved: Saved) -> Iterator[bytes]:
        """All parts of a checkpoint, in their order."""
        for part in range(saved.parts):
            yield self._read(saved, part)

    def _read(self, saved: Saved, part: int) -> bytes:
        entry = FileEntry(**json.loads(storage.read(self._path(saved, part, "json"))))
        return storage.read(self._path(saved, part, "safetensors"), expect=entry)

    def _markers(self) -> dict[Saved, set[int]]:
        """The parts of each checkpoint that have a marker."""
        found = defaultdict(set)
        for name in storage.listing(self.folder):
            if match := re.fullmatch(r"(\d+)-(\d+)of(\d+)\.json", name):
                step, part, parts = map(int, match.groups())
                found[Saved(step, parts)].add(part)
        return dict(found)

    def _path(self, saved: Saved, part: int, suffix: str) -> str:
        return storage.join(self.folder, saved.name(part, suffix))
