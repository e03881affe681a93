"""Checkpoints of an unfinished training, in its artifact's building folder.

The newest few stay, and those at milestones. A safetensors file for each part of a checkpoint, and a small marker with
its size and sha256, written last. The newest checkpoint all of whose parts their markers vouch for wins; a damaged or
unfinished one is skipped, and said so. A marker also tells which training this is (`recipe`), and may name an earlier
step whose checkpoint is kept along with its own: the best one so far.

Whenever ranks agree on what they go on from, they begin a new attempt, which names its files: two that were killed at
the same step each leave some parts of it, of the same training and still not of one state.
"""

import json
import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets.files import json_files, storage
from datasets.files.fence import Fence, unfenced
from datasets.files.storage import CorruptFile, FileEntry, Pieces

KEEP = 2
NAME = r"(\d+)-(\d+)of(\d+)(?:-([0-9a-f]+))?\.(json|safetensors)"  # earlier versions named no attempt


@dataclass(frozen=True, order=True)
class Saved:
    """A checkpoint: the state after `step` steps, in so many parts, all of one attempt."""

    step: int
    parts: int
    attempt: str = ""

    def name(self, part: int, suffix: str) -> str:
        """File of a part (`safetensors`) or of its marker (`json`)."""
        return f"{self.step:09d}-{part}of{self.parts}{f'-{self.attempt}' if self.attempt else ''}.{suffix}"


@dataclass(frozen=True)
class Found:
    """A checkpoint that can be read: its parts, in their order, each once."""

    saved: Saved
    parts: Sequence[Callable[[], bytes]]


@dataclass(frozen=True)
class Followed:
    """A file's pieces; `goes_on` is called before each, for the watchdog to see that saving gets further."""

    pieces: Pieces
    goes_on: Callable[[], None]

    def __len__(self) -> int:
        return len(self.pieces)

    def __iter__(self) -> Iterator[memoryview]:
        for piece in self.pieces:
            self.goes_on()
            yield piece


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
        self.attempt = ""  # as of versions that named none, until `newest` begins one
        self._from: Saved | None = None  # what this attempt goes on from: it could be read

    def save(self, step: int, data: bytes | Pieces, recipe: Mapping[str, object], best: int | None = None) -> None:
        """Publish our part of the state after `step` steps, to be kept together with that after `best` steps.

        The first part's rank drops all but the newest few, the best one that each of these names, and milestones; and
        what attempts that were killed have left of earlier ones.

        Raises:
            ClaimLost: the training has passed to another run.
        """
        saved = Saved(step, self.parts, self.attempt)
        entry = storage.publish(data, self._path(saved, self.part, "safetensors"))
        marker = {"file": vars(entry), "recipe": recipe, "best": best}
        marked = json.dumps({**marker, "sha256": _digest(marker)})
        self.fence()
        storage.publish(marked.encode(), self._path(saved, self.part, "json"))
        if self.part == 0:
            self._drop_old()

    def _drop_old(self) -> None:
        found = self._found()
        whole = self._whole(found)
        newest = sorted(whole)[-KEEP:]
        named = {self._told(whole[step], "best") for step in newest}
        kept = {whole[step] for step in {*newest, *named, *self.milestones}.intersection(whole)}
        for old in [saved for saved in found if newest and saved.step <= newest[0] and saved not in kept]:
            for part, suffix in sorted(found[old], key=lambda file: file[1]):  # "json" first: it vouches for the other
                storage.remove(self._path(old, part, suffix))

    def newest(self, rank: int = 0, world: int = 1, told: Callable[[Any], list[Any]] = _alone) -> Found | None:
        """The newest checkpoint that is whole and valid, or None; what is saved from now on is of a new attempt.

        Where several ranks ask together, and get the same one, each reads its share of the parts, and keeps them until
        they are asked for. `told` gives what each rank tells all others.
        """
        marked, self.attempt = told((self._marked(), uuid.uuid4().hex[:8]))[0]
        for saved in reversed(marked):
            held = self._valid(saved, range(rank, saved.parts, world))
            if all(told(held is not None)):
                self._from = saved
                return Found(saved, [partial((held or {}).pop, part) for part in range(saved.parts)])
        return None

    def _valid(self, saved: Saved, parts: Iterable[int]) -> dict[int, bytes] | None:
        """Parts of a checkpoint by number; nothing, said so, where one of them is not whole and valid."""
        try:
            return {part: self._read(saved, part) for part in parts}
        except (CorruptFile, FileNotFoundError) as error:
            self.warn(f"checkpoint of step {saved.step} skipped: {error}")
            return None

    def recipes(self) -> Iterator[Mapping[str, object]]:
        """Which training each checkpoint is of, the newest first, as far as its marker can be read."""
        return filter(None, (self._told(saved, "recipe") for saved in reversed(self._marked())))

    def after(self, step: int) -> Found:
        """The checkpoint of the state after `step` steps, none of which is read yet.

        Raises:
            CorruptFile: it is not there, or not whole.
        """
        saved = self._whole(self._found()).get(step)
        if saved is None:
            raise CorruptFile(f"{self.folder} has lost the checkpoint of step {step}; --force the training")
        return Found(saved, [partial(self._read, saved, part) for part in range(saved.parts)])

    def _read(self, saved: Saved, part: int) -> bytes:
        entry = FileEntry(**self._marker(saved, part)["file"])
        return storage.read(self._path(saved, part, "safetensors"), expect=entry)

    def _marker(self, saved: Saved, part: int) -> dict[str, Any]:
        path = self._path(saved, part, "json")
        return json_files.parse(path, storage.read(path), _marker)

    def _told(self, saved: Saved, key: str) -> Any:
        """What a checkpoint's marker tells; nothing where it is damaged, which `newest` tells of."""
        try:
            return self._marker(saved, 0)[key]
        except (CorruptFile, FileNotFoundError):
            return None

    def _marked(self) -> list[Saved]:
        """The checkpoints of which a part has a marker, oldest first."""
        return sorted(saved for saved, files in self._found().items() if any(suffix == "json" for _, suffix in files))

    def _whole(self, found: Mapping[Saved, set[tuple[int, str]]]) -> dict[int, Saved]:
        """Of what there is, the checkpoint of each step all of whose parts have a marker; our own where there are more.

        Whoever saves a step again could not read what was there, and what we went on from could be read.
        """
        marked = (saved for saved, files in found.items() if files >= {(part, "json") for part in range(saved.parts)})

        def trust(saved: Saved) -> tuple[bool, bool, Saved]:
            return saved.attempt == self.attempt, saved == self._from, saved

        return {saved.step: saved for saved in sorted(marked, key=trust)}

    def _found(self) -> dict[Saved, set[tuple[int, str]]]:
        """What there is of each checkpoint: part and suffix of each file."""
        found = defaultdict(set)
        for match in filter(None, (re.fullmatch(NAME, name) for name in storage.listing(self.folder))):
            step, part, parts = map(int, match.groups()[:3])
            found[Saved(step, parts, match[4] or "")].add((part, match[5]))
        return dict(found)

    def _path(self, saved: Saved, part: int, suffix: str) -> str:
        return storage.join(self.folder, saved.name(part, suffix))


def _marker(told: dict[str, Any]) -> dict[str, Any]:
    """A marker without its own sha256; ValueError where that is another's."""
    marker = {key: value for key, value in told.items() if key != "sha256"}
    if told["sha256"] != _digest(marker):
        raise ValueError("it does not hold the bytes that it was written with")
    return marker


def _digest(marker: Mapping[str, object]) -> str:
    return storage.entry_of(json.dumps(marker, sort_keys=True).encode()).sha256
