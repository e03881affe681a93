"""JSON files of ours, among whatever other programs, people and full disks leave in the same folders.

What is there but not what it should be is passed over, and told (`notices.PassedOver`).
"""

import errno
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from numbers import Real
from types import GenericAlias, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints, is_typeddict

from datasets.files import notices, storage
from datasets.files.errors import StorageError, StoreAway, StoreRefuses
from datasets.files.storage import CorruptFile

T = TypeVar("T")
Make = Callable[[dict[str, Any]], T]
Kind = type | UnionType | GenericAlias
NUMBER = int | float
_NOT_OURS = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)


def read(path: str, make: Make[T], absent: T | None = None) -> T | None:
    """What `make` makes of the object in a file; `absent` where there is no file, None where it is not one that `make`
    can take."""
    try:
        content = storage.read(path)
    except StorageError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return absent
        if isinstance(error, StoreAway | StoreRefuses):
            raise
        notices.tell(notices.PassedOver(path, f"no file: {error.strerror}"))  # a folder, or links in a circle
        return None
    return _passing(path, content, make)


def read_each(
    folder: str,
    name: str,
    make: Make[T],
    also: str = "",
    last: int | None = None,
    wanted: Callable[[str], bool] = bool,
) -> dict[str, T]:
    """What `make` makes of each file of a folder whose name matches the pattern `name`, by their sorted names.

    All other files are passed over; those that match `also` belong there, so nothing is told of them. Of ours only the
    `wanted` are read, and with `last` only so many of the last names.
    """
    found = {file: _passing(path, content, make) for file, path, content in _contents(folder, name, also, last, wanted)}
    return {file: made for file, made in found.items() if made is not None}


def read_every(folder: str, name: str, make: Make[T], also: str = "") -> dict[str, T]:
    """As `read_each`, where none of ours may be damaged.

    Raises:
        CorruptFile: one is.
    """
    return {file: parse(path, content, make) for file, path, content in _contents(folder, name, also)}


def parse(path: str, content: bytes, make: Make[T]) -> T:
    """What `make` makes of the object that the file at `path` holds.

    Raises:
        CorruptFile: it holds none that `make` can take.
    """
    try:
        told = json.loads(content)
        if not isinstance(told, dict):
            raise TypeError("no JSON object")
        return make(told)
    except _NOT_OURS as error:
        raise CorruptFile(f"{path} is damaged: {_why(content, error)}") from error


def require(told: Mapping[Any, Any], kind: Kind, *keys: Any) -> None:
    """For `make`: let an object pass that has these keys, each with a value of a kind (see `of`).

    Raises:
        KeyError, TypeError: it has not.
    """
    for key in keys:
        if wrong := _wrong(told[key], kind, str(key)):
            raise TypeError(wrong)


def of(kind: type, told: dict[str, Any]) -> dict[str, Any]:
    """For `make`: an object that is of a kind all the way down.

    A kind is a `TypedDict`, which may hold more than it names, or a dataclass, which may not; of values also one of
    Python's own, `dict` and `list` with or without kinds of what is in them, or a union. Numbers are finite, but for
    those of kind `Real`.

    Raises:
        TypeError: it is not; the message names the place.
    """
    if wrong := _wrong(told, kind, ""):
        raise TypeError(wrong)
    return told


def _wrong(value: Any, kind: Any, name: str) -> str | None:
    """What keeps a value from being of a kind, in words; None where nothing does.

    Pydantic, where it is strict, takes no object for a dataclass, or, from JSON, no text with a lone surrogate, as
    names of files on POSIX have them.
    """
    if isinstance(kind, UnionType):
        every = [_wrong(value, one, name) for one in get_args(kind)]
        return None if None in every else every[0]
    whole = get_origin(kind) or kind
    if whole is Any:
        return None
    if whole is float:
        whole = NUMBER
    if is_typeddict(whole) or is_dataclass(whole):
        return _wrong_in(value, whole, name) if isinstance(value, dict) else _told(name, value)
    if whole is Sequence:
        whole = list | tuple
    if not isinstance(value, whole) or (whole is not Real and isinstance(value, float) and not math.isfinite(value)):
        return _told(name, value)
    parts = get_args(kind)
    if not parts:
        return None
    inner = value.items() if whole is dict else enumerate(value)
    kind_of = parts[1] if whole is dict else parts[0]
    return next(filter(None, (_wrong(one, kind_of, _below(name, key)) for key, one in inner)), None)


def _wrong_in(told: dict[str, Any], kind: Any, name: str) -> str | None:
    """The same of an object and a `TypedDict` or dataclass."""
    known, needed = _fields(kind)
    for key in sorted(needed - told.keys()):
        return f"it has no {_below(name, key)}"
    for key in sorted(told.keys() - known.keys()) if is_dataclass(kind) else ():
        return f"it has a {_below(name, key)}"
    both = known.keys() & told.keys()
    return next(filter(None, (_wrong(told[key], known[key], _below(name, key)) for key in sorted(both))), None)


def _below(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _told(name: str, value: object) -> str:
    return f"its {name} is {str(value)[:40]!r}"


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Kinds of the fields of a `TypedDict` or dataclass, and the names of those that may not lack."""
    if is_typeddict(kind):
        return get_type_hints(kind), kind.__required_keys__
    given = {field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING}
    return get_type_hints(kind), frozenset(given)


def lines(content: bytes, make: Make[T]) -> Iterator[T | None]:
    """What `make` makes of the object on each line, None where a line is cut off or holds another."""
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            yield parse(f"line {number}", line, make)
        except CorruptFile:
            yield None


def _contents(
    folder: str, name: str, also: str, last: int | None = None, wanted: Callable[[str], bool] = bool
) -> Iterator[tuple[str, str, bytes]]:
    """Name, path and content of each file of ours; others are passed over."""
    names = storage.listing(folder)
    for other in names:
        if not re.fullmatch(f"{name}|{also}", other):
            notices.tell(notices.PassedOver(storage.join(folder, other), "none of our files"))
    ours = [file for file in names if re.fullmatch(name, file) and wanted(file)][-last if last else 0 :]
    paths = [storage.join(folder, file) for file in ours]
    return zip(ours, paths, storage.read_all(paths), strict=True)


def _passing(path: str, content: bytes, make: Make[T]) -> T | None:
    try:
        return parse(path, content, make)
    except CorruptFile as error:
        notices.tell(notices.PassedOver(path, str(error).removeprefix(f"{path} is ")))
        return None


def _why(content: bytes, error: Exception) -> str:
    if not content.strip():
        return "it is empty"
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)
