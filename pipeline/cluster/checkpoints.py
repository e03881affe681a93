"""Checkpoints of an unfinished training, in its artifact's building folder.

The newest few stay, and those at milestones. A safetensors file for each part of a checkpoint, and a small marker with
its size and sha256, written last. The newest checkpoint all of whose parts their markers vouch for wins; a damaged or
unfinished one is skipped, and said so. A marker also tells which training this is (`recipe`), and may name an earlier
step whose checkpoint is kept along with its own: the best one so far.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets.files import json_files, storage
from datasets.files.fence import Fence, unfenced
from datasets.files.storage import CorruptFile, FileEntry, Pieces

KEEP = 2


@dataclass(frozen=True, order=True)
class Saved:
    """A checkpoint: the state after `step` steps, in so many parts."""

    step: int
    parts: int

    def name(self, part: int, suffix: str) -> str:
        """File of a part (`safetensors`) or of its marker (`json`)."""
        return f"{self.step:09d}-{part}of{self.parts}.{suffix}"


@dataclass(frozen=True)
class Found:
    """A checkpoint that can be read: its parts, in their order, each once."""

    saved: Saved
    parts: Sequence[Callable[[], bytes]]


def _alone(own: Any) -> list[Any]:
    """What one rank tells all ranks."""
    return [own]


class Checkpoints:
    """The checkpoints of one training below a folder, as one of the ranks that write a part of each sees them."""

    def __init__(
        self,
        folder: str,
        warn: Callable[[str], None],
        part: int = 0,
        parts: int = 1,
        milestones: Sequence[int] = (),
        fence: Fence = unfenced,
    ):
        self.folder, self.part, self.parts, self.milestones = folder, part, parts, milestones
        self.warn, self.fence = warn, fence

    def save(self, step: int, data: bytes | Pieces, recipe: Mapping[str, object], best: int | None = None) -> None:
        """Publish our part of the state after `step` steps, to be kept together with that after `best` steps.

        The first part's rank drops all but the newest few, the best one that each of these names, and milestones.

        Raises:
            ClaimLost: the training has passed to another run.
        """
        saved = Saved(step, self.parts)
        entry = storage.publish(data, self._path(saved, self.part, "safetensors"))
        marker = {"file": vars(entry), "recipe": recipe, "best": best}
        marked = json.dumps({**marker, "sha256": _digest(marker)})
        self.fence()
        storage.publish(marked.encode(), self._path(saved, self.part, "json"))
        if self.part == 0:
            markers = self._markers()
            whole = sorted(found for found, parts in markers.items() if len(parts) == found.parts)
            newest = whole[-KEEP:]
            named = {self._told(found, "best") for found in newest}
            kept = {found for found in whole if found.step in named or found.step in self.milestones}
            for old in [found for found in markers if newest and found < newest[0] and found not in kept]:
                for part in range(old.parts):
                    storage.remove(self._path(old, part, "json"))
                    storage.remove(self._path(old, part, "safetensors"))

    def newest(self, rank: int = 0, world: int = 1, told: Callable[[Any], list[Any]] = _alone) -> Found | None:
        """The newest checkpoint that is whole and valid, or None.

        Where several ranks ask together, and get the same one, each reads its share of the parts, and keeps them until
        they are asked for. `told` gives what each rank tells all others.
        """
        for saved in told(sorted(self._markers(), reverse=True))[0]:
            held = self._valid(saved, range(rank, saved.parts, world))
            if all(told(held is not None)):
                return Found(saved, [partial((held or {}).pop, part) for part in range(saved.parts)])
        return None

    def _valid(self, saved: Saved, parts: Iterable[int]) -> dict[int, bytes] | None:
        """Parts of a checkpoint by number; nothing, said so, where one of them is not whole and valid."""
        try:
            return {part: self._read(saved, part) for part in parts}
        except (CorruptFile, FileNotFoundError) as error:
            self.warn(f"checkpoint of step {saved.step} skipped: {error}")
            return None

    def recipes(self) -> list[Mapping[str, object]]:
        """Which training each checkpoint is of, as far as its marker can be read."""
        told = [self._told(saved, "recipe") for saved in sorted(self._markers())]
        return [recipe for recipe in told if recipe]

    def after(self, step: int) -> Found:
        """The checkpoint of the state after `step` steps, none of which is read yet.

        Raises:
            CorruptFile: it is not there, or not whole.
        """
        found = [saved for saved, parts in self._markers().items() if saved.step == step and len(parts) == saved.parts]
        if not found:
            raise CorruptFile(f"{self.folder} has lost the checkpoint of step {step}; --force the training")
        return Found(found[0], [partial(self._read, found[0], part) for part in range(found[0].parts)])

    def _read(self, saved: Saved, part: int) -> bytes:
        entry = FileEntry(**self._marker(saved, part)["file"])
        return storage.read(self._path(saved, part, "safetensors"), expect=entry)

    def _marker(self, saved: Saved, part: int) -> dict[str, Any]:
        path = self._path(saved, part, "json")
        return json_files.parse(path, storage.read(path), _whole)

    def _told(self, saved: Saved, key: str) -> Any:
        """What a checkpoint's marker tells; nothing where it is damaged, which `newest` tells of."""
        try:
            return self._marker(saved, 0)[key]
        except (CorruptFile, FileNotFoundError):
            return None

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


def _whole(told: dict[str, Any]) -> dict[str, Any]:
    """A marker without its own sha256; ValueError where that is another's."""
    marker = {key: value for key, value in told.items() if key != "sha256"}
    if told["sha256"] != _digest(marker):
        raise ValueError("it does not hold the bytes that it was written with")
    return marker


def _digest(marker: Mapping[str, object]) -> str:
    return storage.entry_of(json.dumps(marker, sort_keys=True).encode()).sha256
