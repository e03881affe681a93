"""The table of weights by others that a run may use: where they come from, what they are for, their licence."""

import shlex
from functools import cache
from pathlib import Path

import yaml
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as checked

from datasets.files import storage
from pipeline.errors import UsageError
from pipeline.store import identity

TABLE = Path(__file__).with_suffix(".yaml")
FOLDER = "weights"


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class Hub:
    """A file of a Hugging Face repository, or with path None all of it."""

    repo: str
    path: str | None

    def __str__(self) -> str:
        return f"huggingface.co/{self.repo}" + (f"/{self.path}" if self.path else "")


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class Url:
    """A file on the web."""

    url: str

    def __str__(self) -> str:
        return self.url


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class Torchvision:
    """An entry of torchvision's own list of weights, which knows its address."""

    torchvision: str

    def __str__(self) -> str:
        return f"torchvision's {self.torchvision}"


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class Row:
    """A row of the table; `sha256` may be a prefix of it."""

    name: str
    use: str
    file: str
    bytes: int | None
    sha256: str | None
    licence: str | None
    source: Hub | Torchvision | Url


@cache
def table() -> tuple[Row, ...]:
    """Every row of the table."""
    return TypeAdapter(tuple[Row, ...]).validate_python(yaml.safe_load(TABLE.read_text("utf-8"))["rows"])


def named(name: str) -> Row:
    """The row of a name; `UsageError` lists them all."""
    for row in table():
        if row.name == name:
            return row
    raise UsageError(f"weights: there is no '{name}'; there are {', '.join(row.name for row in table())}")


def _place_of(path: str) -> tuple[str, Row] | None:
    """The folder that `get` would have written a path below, and the row that is there."""
    rows, parts = {row.file: row for row in table()}, path.split("/")
    for number in reversed(range(len(parts))):  # a folder above may be called like one of the rows
        if row := rows.get(parts[number]):
            return "/".join(parts[:number]) or ".", row
    return None


def record(path: Path) -> Path:
    """Where the sha256 of weights is kept, from their first download or since their owner vouched for them."""
    return path.with_name(f"{path.name}.sha256")


def recorded(path: Path) -> str | None:
    """The sha256 that is kept of one file; of a whole repository there are many."""
    lines = record(path).read_text("utf-8").splitlines() if record(path).exists() else []
    return lines[0].partition("  ")[0] if len(lines) == 1 else None


def distinguished(name: str, path: str) -> str:
    """What tells a file from the one that the table knows by a name: nothing if its sha256 is the published one, or the
    one that is kept beside it (`weights get`, `weights verify`); else `:` and the first 8 digits of its own."""
    digest = str(identity.of_path(path)).rpartition(" ")[2]
    kept = None if storage.is_remote(path) else recorded(Path(storage.absolute(path)))
    vouched = [sha for sha in (named(name).sha256, kept) if sha]
    return "" if any(map(digest.startswith, vouched)) else f":{digest[:8]}"


def licence(path: str) -> str | None:
    """The licence of the weights at a path, where the table knows them by their file name."""
    found = _place_of(path)
    return found[1].licence if found else None


def source(path: str) -> str | None:
    """Where the table's weights of the name that stands last in a path come from."""
    return next((str(row.source) for row in table() if row.file == path.rpartition("/")[2]), None)


def how_to_get(*paths: str) -> str:
    """What to do about weights that are not at these paths."""
    names: dict[str, list[str]] = {}
    unknown = []
    for path in dict.fromkeys(paths):
        if (found := _place_of(path)) is None:
            unknown.append(path)
        else:
            folder, row = found
            names.setdefault(folder, []).append(row.name)
    told = [
        f"get {'them' if len(known) > 1 else 'it'} with: python -m pipeline weights get {' '.join(known)}"
        + ("" if folder == FOLDER else f" out={shlex.quote(folder)}")
        for folder, known in names.items()
    ]
    if unknown:
        it = "it" if len(paths) == 1 else ", ".join(unknown)
        told.insert(0, f"put {it} there or change the key")
    return "; ".join(told)
