"""`docs/reference/config.md`: each key of the config with type, default, range and meaning, from the typed config."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from pipeline.settings.config import Config

Schema = dict[str, Any]  # JSON schema, as pydantic makes it

HEAD = """\
# Every key of the config

Made from the typed config (`pipeline/settings/`, `datasets/config.py`, `datasets/source_settings.py`,
`stages/settings/`); do not edit, but run

```
python -m pipeline config reference > docs/reference/config.md
```

A key is set in a file of `conf/`, or on the command line as `key=value`. Where no default stands, a conf gives the
value, most often its `scale=`. `NAME` in a key is a name of your own; `0` is the number of an item of a list, counted
from 0. `python -m pipeline config conf=NAME` shows the values of a conf with the same meanings. A value that is out of
range, of another type, or that does not fit another key is refused before anything is created; so is a text that is
blank, but for `sample.negative`.
"""


@dataclass(frozen=True)
class Section:
    """A table: the keys of one kind of settings, wherever they stand.

    `prefix` stands before each key. Several `places` have one table where their last names are the same: under the
    place that is nearest to the top, or under these names.
    """

    prefix: str
    places: tuple[str, ...]
    kind: str
    schema: Schema

    @property
    def title(self) -> str:
        """Heading: the key, and what tells it from other kinds of settings at the same place."""
        tag = self.schema["properties"].get("model", {})
        chosen = [tag["const"]] if "const" in tag else tag.get("enum", [])
        suffix = f", model {' or '.join(f'`{name}`' for name in chosen)}" if chosen and "NAME" in self.prefix else ""
        return f"`{self.prefix}`{suffix}" if self.prefix else "The experiment"

    @property
    def anchor(self) -> str:
        """What GitHub makes of the heading."""
        return re.sub(r"[^\w\- ]", "", self.title.lower()).replace(" ", "-")


def markdown() -> str:
    """The whole page."""
    sections = _sections(_schema())
    anchors = {(section.kind, place): section.anchor for section in sections for place in section.places}
    index = "\n".join(f"- [{section.title}](#{section.anchor})" for section in sections)
    return "\n".join([HEAD, index, "", *(_table(section, anchors) for section in sections)])


def _schema() -> Schema:
    """The config's schema; pydantic leaves out what a field means where that is what its section says of itself."""
    schema = Config.model_json_schema()
    for kind in (schema, *schema["$defs"].values()):
        for field in kind["properties"].values():
            field.setdefault("description", schema["$defs"].get(field.get("$ref", "")[8:], {}).get("description"))
    return schema


def _sections(schema: Schema) -> list[Section]:
    """All tables, in the order in which the config names them; what several equal places share comes at the end."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for place, kind in _places(schema, schema["$defs"], ""):
        kinds[kind].append(place)
    found = []
    for kind, places in kinds.items():
        if len(places) > 1 and (shared := _last_names(places)):
            found.append(Section(_nearest(places) or shared, tuple(places), kind, schema["$defs"][kind]))
        else:
            found += [Section(place, (place,), kind, schema["$defs"][kind]) for place in places]
    found.sort(
        key=lambda section: (
            section.prefix not in section.places,
            list(schema["properties"]).index(_first_name(section)),
        )
    )
    return [Section("", ("",), "Config", schema), *found]


def _first_name(section: Section) -> str:
    return section.places[0].partition(".")[0]


def _nearest(places: list[str]) -> str:
    """The place that is nearest to the top, if one is."""
    first, second = sorted(places, key=lambda place: place.count("."))[:2]
    return first if first.count(".") < second.count(".") else ""


def _last_names(places: list[str]) -> str:
    """The names with which all places end, if any."""
    ends = zip(*(reversed(place.split(".")) for place in places), strict=False)
    same = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, ends)]
    return ".".join(reversed(same))


def _places(schema: Schema, kinds: Schema, prefix: str) -> Iterator[tuple[str, str]]:
    """Every place where settings of their own stand, with their kind; parents before what they hold."""
    for name, field in schema["properties"].items():
        for kind, below in _kinds(field):
            place = f"{prefix}{name}{below}"
            yield place, kind
            yield from _places(kinds[kind], kinds, f"{place}.")


def _kinds(field: Schema) -> Iterator[tuple[str, str]]:
    """The kinds of settings that a key may hold, with what stands between it and their keys."""
    if "$ref" in field:
        yield field["$ref"].rpartition("/")[2], ""
    below = [("", part) for part in (*field.get("anyOf", ()), *field.get("oneOf", ()))]
    below += [(".0", field["items"])] if "items" in field else []
    below += [(".NAME", part) for part in field.get("patternProperties", {}).values()]
    for name, part in below:
        yield from ((kind, f"{name}{deeper}") for kind, deeper in _kinds(part))


def _table(section: Section, anchors: dict[tuple[str, str], str]) -> str:
    """A heading, what the section is, and a row a key."""
    words = _words(section.schema)
    places = f" At {', '.join(f'`{place}`' for place in section.places)}." if len(section.places) > 1 else ""
    lines = [f"## {section.title}", "", words + places, ""]
    lines += ["| key | type | default | range | meaning |", "|---|---|---|---|---|"]
    required = section.schema.get("required", [])
    for name, field in section.schema["properties"].items():
        key = f"{section.prefix}.{name}" if section.prefix else name
        links = [anchors[kind, f"{section.places[0]}.{name}{below}".strip(".")] for kind, below in _kinds(field)]
        default = "" if name in required else _default(field)
        cells = (f"`{key}`", _type(field, links), default, _range(field), _words(field))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _default(field: Schema) -> str:
    if "$ref" in field:
        return "its own defaults"
    return f"`{json.dumps(field.get('default', {}), ensure_ascii=False)}`"


def _type(field: Schema, links: list[str]) -> str:
    """What a value is; `links` are the tables of the sections that it may be."""
    if "$ref" in field:
        return f"[section](#{links.pop(0)})"
    if parts := field.get("anyOf") or field.get("oneOf"):
        return (", or " if parts[0].get("type") == "array" else " or ").join(_type(part, links) for part in parts)
    if "enum" in field or "const" in field:
        return " or ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    match field["type"]:
        case "array" if "prefixItems" in field:
            return f"{len(field['prefixItems'])} {_type(field['prefixItems'][0], links)}s"
        case "array":
            item = _type(field["items"], links)
            return f"list of {item}{'s' * (item in ('integer', 'number', 'text'))}"
        case "object":
            parts = list(field.get("patternProperties", {}).values()) or [field["additionalProperties"]]
            return f"by name: {_type(parts[0], links)}"
        case "boolean":
            return "true or false"
        case "string":
            return "text"
        case kind:
            return str(kind)


def _range(field: Schema) -> str:
    """What a value must keep to, beside its type; of a list or mapping, its items too."""
    return "; ".join(dict.fromkeys(bounds for part in _parts(field) if (bounds := _bounds(part))))


def _parts(field: Schema) -> Iterator[Schema]:
    """A value's schema and those of what it holds or may be."""
    yield field
    inside = [*field.get("anyOf", ()), *field.get("prefixItems", ())]
    inside += [field[name] for name in ("items", "additionalProperties") if isinstance(field.get(name), dict)]
    for part in inside:
        yield from _parts(part)


def _bounds(field: Schema) -> str:
    found = []
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum", field.get("exclusiveMaximum"))
    if low is not None:
        above = "above " * ("exclusiveMinimum" in field)
        below = "below " * ("exclusiveMaximum" in field)
        found.append(f"{above}{low:,.15g} to {below}{high:,.15g}")
    if "multipleOf" in field:
        found.append(f"a multiple of {field['multipleOf']}")
    if "pattern" in field:
        found.append(f"`{field['pattern']}`")
    if "prefixItems" not in field and ("minItems" in field or "minProperties" in field or "maxItems" in field):
        fewest, most = field.get("minItems", field.get("minProperties", 0)), field.get("maxItems")
        found.append(f"{fewest} to {most:,} of them" if most else f"{fewest} or more of them")
    return ", ".join(found)


def _words(schema: Schema) -> str:
    """What a schema says of itself, in one line."""
    return " ".join(schema["description"].split())
