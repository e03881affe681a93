"""A config as YAML in which each key has its comment: the first paragraph of the docstring under its field."""

import re
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

RARE_BREAKS = re.compile("[\x85\u2028\u2029]")
WIDTH = 120  # columns; what is longer goes on lines of its own


def commented_yaml(config: BaseModel) -> str:
    """The values of a config, each behind its key and with what the key means behind or above it.

    Of a list of sections, such as the phases of a training, the first one explains the keys.
    """
    return "".join(f"{line}\n" for line in _section(config, config.model_dump(mode="json"), ""))


def meaning(settings: type[BaseModel], field: str) -> str:
    """What a key means, in a line."""
    description = settings.model_fields[field].description
    assert description, f"{settings.__name__}.{field} has no docstring"
    return " ".join(description.split("\n\n")[0].split()).removesuffix(".")


def _section(settings: BaseModel, shown: dict[str, Any], indent: str) -> Iterator[str]:
    for field, value in shown.items():
        yield from _entry(field, getattr(settings, field), value, meaning(type(settings), field), indent)


def _entry(key: str, value: Any, shown: Any, comment: str, indent: str) -> Iterator[str]:
    """The lines of one key; `shown` is its value as plain data."""
    below = f"{indent}  "
    match value:
        case BaseModel():
            yield from _commented(f"{indent}{key}:", comment)
            yield from _section(value, shown, below)
        case dict() if any(isinstance(part, BaseModel) for part in value.values()):
            yield from _commented(f"{indent}{key}:", comment)
            for name, part in value.items():
                yield from _entry(name, part, shown[name], _title(part), below)
        case tuple() if any(isinstance(part, BaseModel) for part in value):
            yield from _commented(f"{indent}{key}:", comment)
            first, *others = _section(value[0], shown[0], below)
            yield f"{indent}- {first.removeprefix(below)}"
            yield from others
            yield from (f"{indent}- {_flow(part)}" for part in shown[1:])
        case _:
            first, *others = _plain(key, shown, indent)
            yield from _commented(first, comment)
            yield from others


def _title(section: BaseModel) -> str:
    """The first sentence of what a section is."""
    return (type(section).__doc__ or "").split("\n")[0].rstrip(".")


def _plain(key: str, shown: Any, indent: str) -> list[str]:
    """A key and its plain value: on one line where that is short enough."""
    line = f"{indent}{_flow(key)}: {_flow(shown)}"
    if len(line) <= WIDTH or not isinstance(shown, dict | list):
        return [line]
    return [indent + part for part in _dumped({key: shown}, flow=False).split("\n")]


def _flow(value: Any) -> str:
    """A value in one line of YAML."""
    return _dumped(value, flow=True).removesuffix("\n...")


def _dumped(value: Any, flow: bool) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10**9, default_flow_style=flow)
    if RARE_BREAKS.search(text):  # which PyYAML writes as they are, and reads as blanks
        text = yaml.safe_dump(value, sort_keys=False, width=10**9, default_flow_style=flow)
    return text.removesuffix("\n")


def _commented(line: str, comment: str) -> list[str]:
    """A line with its comment behind it, or above it where both are too long for one."""
    whole = f"{line}  # {comment}"
    mark = line[: len(line) - len(line.lstrip())] + "# "
    above = textwrap.wrap(comment, WIDTH, initial_indent=mark, subsequent_indent=mark)
    return [whole] if len(whole) <= WIDTH else [*above, line]
