"""Pictures by other models: of a folder or a tar, found by key or by prompt, and looked through before use."""

import csv
import io
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import PurePosixPath

import numpy as np

from datasets import pictures
from datasets.config import DataError
from datasets.files import compressed, storage, tars
from datasets.outcomes import Lost
from datasets.reading.prompts import Prompt

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
GENERATED = "generated/"  # where an artifact of samples has what was drawn
LISTED = "prompts.csv"  # columns file and prompt
SMALLEST = 32  # px: no metric says anything of less
SHOWN = 3  # names in a sentence

Wanted = tuple[str, str]  # key and prompt
_CONTENTS = compressed.Unpacked()  # of tars


@dataclass(frozen=True)
class Findings:
    """What is wrong with a rival's pictures for a set of prompts, by names; `usable` are the keys of the others."""

    usable: frozenset[str]
    missing: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    undecodable: tuple[str, ...] = ()
    of_other_size: tuple[str, ...] = ()

    @property
    def lacking(self) -> int:
        """Prompts without a usable picture."""
        return sum(map(len, (self.missing, self.repeated, self.undecodable, self.of_other_size)))

    def told(self) -> str:
        """Counts and the first names of each kind, in words; empty where there is nothing to tell."""
        kinds = {
            "missing": self.missing,
            "there more than once": self.repeated,
            "undecodable": self.undecodable,
            f"of another size, or of less than {SMALLEST} px": self.of_other_size,
        }
        return "; ".join(f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds.items() if names)


class Rival:
    """The pictures of one place.

    A folder (its `generated/`, if it has one), or a tar, compressed or not, with png, jpg or webp files. Their names
    are keys, as those of our samples, or `prompts.csv` (file, prompt) says which prompt each is for.

    Raises:
        DataError: there is no such place, it holds no picture, or `prompts.csv` names others; names `config_key`.
    """

    def __init__(self, path: str, config_key: str) -> None:
        self.path, self.config_key = path, config_key
        if not storage.exists(path):
            raise DataError(f"{config_key}: there are no pictures at {path}; give a folder or a tar")
        self._tar = storage.is_file(path)
        names = [name for name in self._names if name.lower().endswith(SUFFIXES)]
        names = [name for name in names if name.startswith(GENERATED)] or names
        if not names:
            raise DataError(
                f"{config_key}: {path} holds no picture ({', '.join(SUFFIXES)}); give another folder or tar"
            )
        self._files: dict[str, list[str]] = {}
        for key, name in self._keyed(names):
            self._files.setdefault(key, []).append(name)

    def file(self, wanted: Wanted) -> str | None:
        """Name of the picture for a prompt, the first if there are several."""
        return next(iter(self._all(wanted)), None)

    def pixels(self, wanted: Wanted) -> np.ndarray:
        """uint8 (H, W, 3) of the picture for a prompt, which must be there; raises `Lost` where it is none."""
        name = self.file(wanted)
        assert name is not None, wanted
        return np.asarray(pictures.opened(self._read(name)))

    def examine(self, prompts: Sequence[Wanted], one_size: bool = True) -> Findings:
        """Look for a picture for each prompt, and into all that are there: they must decode, and have one size where a
        model drew them."""
        there = [wanted for wanted in prompts if len(self._all(wanted)) == 1]
        sizes = dict(zip(there, storage.ahead(partial(self._size, wanted) for wanted in there), strict=True))
        ((usual, _),) = Counter(size for size in sizes.values() if size).most_common(1) or (((0, 0), 0),)
        fitting = {key: size for (key, _), size in sizes.items() if size and (size == usual or not one_size)}
        good = {key for key, size in fitting.items() if min(size) >= SMALLEST}
        return Findings(
            usable=frozenset(good),
            missing=tuple(text for key, text in prompts if not self._all((key, text))),
            repeated=tuple(str(self.file(wanted)) for wanted in prompts if len(self._all(wanted)) > 1),
            undecodable=tuple(str(self.file(wanted)) for wanted, size in sizes.items() if size is None),
            of_other_size=tuple(str(self.file(w)) for w, size in sizes.items() if size and w[0] not in good),
        )

    def everything(self) -> list[Wanted]:
        """Whatever is there, for a look before the prompts are known."""
        return [(key, key) for key in self._files]

    def _all(self, wanted: Wanted) -> list[str]:
        key, text = wanted
        return self._files.get(key) or self._files.get(Prompt(text).key, [])

    def _size(self, wanted: Wanted) -> tuple[int, int] | None:
        try:
            height, width, _ = self.pixels(wanted).shape
        except Lost:
            return None
        return width, height

    def _keyed(self, names: Iterable[str]) -> Iterable[tuple[str, str]]:
        """Key and name of each picture: by the list of prompts, else by the names themselves."""
        if LISTED not in self._names:
            return [(PurePosixPath(name).stem, name) for name in names]
        known = set(names)
        try:
            text = self._read(LISTED).decode("utf-8-sig")
            rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            told = f"{self.config_key}: {self.path}/{LISTED} is no CSV in UTF-8 ({error}); write it anew"
            raise DataError(told) from error
        if not rows or not {"file", "prompt"} <= rows[0].keys():
            raise DataError(f"{self.config_key}: {self.path}/{LISTED} has no rows with file and prompt; write some")
        unknown = [row["file"] for row in rows if row["file"] not in known]
        if unknown:
            raise DataError(
                f"{self.config_key}: {self.path}/{LISTED} names pictures that are not there ({_first(unknown)}); "
                "bring them or take their rows out"
            )
        return [(Prompt(" ".join(str(row["prompt"]).split())).key, row["file"]) for row in rows]

    @cached_property
    def _names(self) -> list[str]:
        return sorted(self._members) if self._tar else storage.listing(self.path)

    @cached_property
    def _members(self) -> dict[str, tuple[int, int]]:
        """Offset and size of each file of a tar."""
        try:
            with tars.opened(self.path, tars.TEXT_BYTES) as file:
                return {
                    posixpath.normpath(member.name): (held.offset_data, held.size)
                    for member, held in tars.members(file)
                    if held
                }
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise DataError(
                f"{self.config_key}: {self.path} is no folder, and no whole tar ({error}); give one"
            ) from error

    def _read(self, name: str) -> bytes:
        if not self._tar:
            return storage.read(storage.join(self.path, name))
        offset, size = self._members[name]
        return _CONTENTS.read_at(self.path, size, offset)


def _first(names: Sequence[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more
