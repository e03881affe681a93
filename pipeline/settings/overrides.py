"""Words `key=value`: what the typed config says of their keys, and hints at others, each tried before it is given."""

import copy
import difflib
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from pipeline.errors import UsageError
from pipeline.settings.config import Config
from settings import FILES, PLACE, TABLE

TRIED = 5  # keys that are most like a wrong one
QUOTES = ("'", '"')


def is_literal(key: str, value: str) -> bool:
    """Whether a value is taken as it is written: at keys of paths, and of other texts unless quotes are around it.

    Where a path may stand, and a number or names with values too, those are what they look like. One pair of quotes
    around a path is none of it.
    """
    others = set(_kinds(key)) - {str, NoneType}
    if str not in _kinds(key):
        return False
    if _is_path(key):
        return not (int in others and value.isdecimal()) and not (value.startswith("{") and others - {int})
    return not others and not _is_quoted(value)


def literal(key: str, value: str) -> str | None:
    """The value that a text key gets: null where there may be none, else the text."""
    if value == "null" and NoneType in _kinds(key):
        return None
    return value[1:-1] if _is_quoted(value) else value


def _is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] and value[0] in QUOTES


def check_places(key: str) -> None:
    """Refuse a key that goes into a list without saying to which of its items.

    Raises:
        UsageError: names the list.
    """
    parts = key.split(".")
    for depth in range(1, len(parts)):
        kinds = list(_kinds(".".join(parts[:depth])))
        if any(get_origin(kind) in (tuple, list) for kind in kinds) and not parts[depth].isdigit():
            place = ".".join([*parts[:depth], "0", *parts[depth:]])
            hint = f", such as {place}" if list(_kinds(place)) else ""
            raise UsageError(f"{key}: {'.'.join(parts[:depth])} is a list; say which of its items by number{hint}")


def hint_at_group(word: str, value: object, groups: Mapping[str, Sequence[str]]) -> str:
    """A hint at the config group that is most like a wrong word and that has such an option; else nothing."""
    near = difflib.get_close_matches(word, groups, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near and value in groups[near[0]] else ""


def hint_at_key(
    key: str, known: Iterable[str], tree: dict[str, Any], fits: Callable[[dict[str, Any], str], bool]
) -> str:
    """A hint at the known key that is most like a wrong one and that could have its value; else nothing.

    Of a bare word that is the last one of keys, those come first, the shorter before others. Where the nearest is a
    section beside it, no key further away is meant, whatever could have the value. `fits(tree, key)` tells whether a
    tree is refused for a key.
    """
    above, _, last = key.rpartition(".")
    known = list(known)
    named = sorted((name for name in known if name.endswith(f".{key}")), key=len)
    for near in (*named, *difflib.get_close_matches(key, sorted(known), n=TRIED, cutoff=0.6)):
        tried = copy.deepcopy(tree)
        source, target = _parent(tried, key), _parent(tried, near)
        if source is None or target is None or last not in source:  # names with dots in them
            continue
        beside, _, right = near.rpartition(".")
        if beside == above and isinstance(own := target.get(right), dict) and not isinstance(source[last], dict):
            if own:
                return f" (did you mean {near}? It has keys of its own, such as {near}.{next(iter(own))})"
            continue
        target[right] = _laid_over(target.get(right), source.pop(last))
        if fits(tried, near):
            return f" (did you mean {near}?)"
    return ""


def _laid_over(below: Any, value: Any) -> Any:
    """A value, or a section's with what it leaves unsaid."""
    if not isinstance(below, dict) or not isinstance(value, dict):
        return value
    return below | {key: _laid_over(below.get(key), part) for key, part in value.items()}


def hint_at_quotes(key: str, value: str, read: Callable[[str], Any]) -> str:
    """How a value that cannot be read may be written as a text or a list, for a shell; `read` gives what a word means.

    Nothing where neither is a way.
    """
    kinds = list(_kinds(key))
    if str in kinds:
        ways: dict[str, Any] = {f"{quote}{value}{quote}": value for quote in QUOTES}
    elif any(get_origin(kind) in (tuple, list) for kind in kinds):
        texts = [text.strip() for text in value.strip("[]").split(",")]
        marks = ["'" if '"' in text else '"' for text in texts]
        quoted = (f"{mark}{text}{mark}" for text, mark in zip(texts, marks, strict=True))
        ways = {f"[{','.join(quoted)}]": texts}
    else:
        return ""
    for way, meant in ways.items():
        word = f"{key}={way}"
        try:
            if read(word) == meant:
                return f" (did you mean {shlex.quote(word)}?)"
        except ValueError:
            continue
    return ""


def _kinds(key: str) -> Iterator[Any]:
    """The types that the value of a dotted key may have; none where the config has no such key."""
    kinds = [Config]
    for part in key.split("."):
        kinds = [below for kind in kinds for below in _below(kind, part)]
    yield from kinds


def _is_path(key: str) -> bool:
    """Whether a dotted key, or the one that holds it by a name, is marked as that of a path."""
    above, _, last = key.rpartition(".")
    marked = (kind.model_fields[last] for kind in _sections(above) if last in kind.model_fields)
    if any(not {FILES, TABLE, PLACE}.isdisjoint(field.metadata) for field in marked):
        return True
    return any(get_origin(kind) is dict for kind in _kinds(above)) and _is_path(above)


def _sections(key: str) -> Iterator[type[BaseModel]]:
    """The models that a dotted key may hold; that of all for no key."""
    kinds = _kinds(key) if key else iter([Config])
    return (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))


def _below(kind: Any, part: str) -> Iterator[Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if part in kind.model_fields:
            yield from _members(kind.model_fields[part].annotation)
    elif get_origin(kind) is dict:
        yield from _members(get_args(kind)[1])
    elif get_origin(kind) in (tuple, list) and part.isdigit():
        yield from _members(get_args(kind)[0])


def _members(annotation: Any) -> Iterator[Any]:
    """What an annotation is a choice of, bounds left out."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _parent(tree: dict[str, Any], key: str) -> dict[str, Any] | None:
    """The section in which the last part of a key stands; None where the way there does not exist."""
    node: Any = tree
    for part in key.split(".")[:-1]:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else None
