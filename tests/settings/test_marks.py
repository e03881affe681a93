"""Marks on the fields of the typed config: which of them are paths, and of what."""

import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel

from pipeline.settings.config import Config
from settings import FILES, MANNER, PLACE, TABLE, Settings, Text, paths


class Weights(Settings):
    """A section whose path may be a number too."""

    path: Annotated[int | Text | None, FILES] = None
    count: Annotated[int, MANNER] = 1


class Whole(Settings):
    """A config with all kinds of marks, at several depths."""

    rows: Annotated[Text, TABLE] = "rows/*.parquet"
    folder: Annotated[Text | None, PLACE] = None
    first: Weights = Weights(path="a.pt")
    others: dict[str, Weights]


def test_paths_are_found_by_their_marks_at_any_depth():
    whole = Whole(folder="cache", others={"b": Weights(path="b.pt"), "none": Weights(), "third phase": Weights(path=3)})
    assert paths(whole, FILES) == {"first.path": "a.pt", "others.b.path": "b.pt"}
    assert paths(whole, TABLE, PLACE) == {"rows": "rows/*.parquet", "folder": "cache"}
    assert paths(Whole(others={}), PLACE) == {}


def fields(settings: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[tuple[str, str, list[object]]]:
    """Name, meaning and marks of every field of these settings and of all that they are made of."""
    if settings in seen:
        return
    seen.add(settings)
    for name, field in settings.model_fields.items():
        yield f"{settings.__name__}.{name}", field.description or "", field.metadata
        yield from (found for part in sections(field.annotation) for found in fields(part, seen))


def sections(annotation: object) -> Iterator[type[BaseModel]]:
    """The settings in an annotation, wherever they stand in it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from sections(part)


def test_every_key_that_is_described_as_a_path_is_marked_as_one():
    """One without a mark would be read from another folder by workers, and count by its text in fingerprints."""
    located = re.compile(r"\b(URI|Path|local folder|Folder of|: a text file|[Ff]iles? `)")
    said = {name: marks for name, meaning, marks in fields(Config, set()) if located.search(meaning)}
    assert len(said) >= 15
    assert [name for name, marks in said.items() if {FILES, TABLE, PLACE}.isdisjoint(marks)] == []
