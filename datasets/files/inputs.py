"""What a config names that lies outside of it; a fingerprint holds its content in its place."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Whole:
    """A file, or a folder whose files count by name: weights, a list, a rival's pictures."""

    path: str


@dataclass(frozen=True)
class Rows:
    """A table in one or more files with a suffix, of which only the order counts: a file, folder, pattern or URI."""

    path: str
    suffix: str


@dataclass(frozen=True)
class Named:
    """Files given as path by name; names count."""

    files: Mapping[str, str]


@dataclass(frozen=True)
class Made:
    """Content that installed packages bring along or make, named by their distributions."""

    by: tuple[str, ...]


@dataclass(frozen=True)
class Bundled:
    """A file that an installed package brings along, by its path within the package."""

    package: str
    file: str


Input = Whole | Rows | Named | Made | Bundled
