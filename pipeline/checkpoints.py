"""Checkpoints of an unfinished training, in its artifact's building folder.

One safetensors file a checkpoint; a small marker with its size and sha256 is written last. The newest one that its
marker vouches for wins; a damaged one is skipped, and said so.
"""

import json
from collections.abc import Callable

from datasets import storage
from datasets.storage import CorruptFile, FileEntry

KEEP = 2


class Checkpoints:
    """The checkpoints of one training below a folder."""

    def __init__(self, folder: str, warn: Callable[[str], None]):
        self.folder = folder
        self.warn = warn

    def save(self, step: int, data: bytes) -> None:
        """Publish the state after `step` steps, then drop all but the newest few."""
        entry = storage.publish(data, self._path(step, "safetensors"))
        storage.publish(json.dumps(vars(entry)).encode(), self._path(step, "json"))
        for old in self._steps()[:-KEEP]:
            storage.remove(self._path(old, "json"))
            storage.remove(self._path(old, "safetensors"))

    def load(self) -> bytes | None:
        """The newest valid state, or None."""
        for step in reversed(self._steps()):
            try:
                entry = FileEntry(**json.loads(storage.read(self._path(step, "json"))))
                return storage.read(self._path(step, "safetensors"), expect=entry)
            except (CorruptFile, FileNotFoundError, ValueError, TypeError) as error:
                self.warn(f"checkpoint of step {step} skipped: {error}")
        return None

    def _steps(self) -> list[int]:
        return sorted(
            int(name.removesuffix(".json")) for name in storage.listing(self.folder) if name.endswith(".json")
        )

    def _path(self, step: int, suffix: str) -> str:
        return storage.join(self.folder, f"{step:09d}.{suffix}")
