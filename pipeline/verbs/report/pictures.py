"""Pictures in a page: small JPEGs in the page itself, of which all together stay within a budget."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from datasets.files.storage import CorruptFile
from datasets.outcomes import Lost
from datasets.reading.rivals import Rival
from pipeline.results.subject import Subject
from pipeline.tracking.mlflow_history import Picture

BUDGET = 4_000_000  # bytes of JPEG as text, so that a page stays below 5 MB
SIDE, SHEET = 160, 1280  # px, of a picture's longer side and a panel's width
QUALITY = 82
STEPS = 5  # of a training, whose panels are shown
FINAL = ("panel.png", "grid.png")  # sheets of artifacts


class Album:
    """The pictures of a subject, by what the document says of where they lie; `shown` are those of its trainings."""

    def __init__(self, subject: Subject, shown: Mapping[str, Sequence[Picture]]) -> None:
        self.left_out = 0  # beyond the budget
        self._subject, self._shown = subject, shown
        self._room = BUDGET
        self._known: dict[str, str | None] = {}
        self._rivals: dict[str, Rival] = {}

    def of(self, place: Mapping[str, str]) -> str | None:
        """The data URI of a picture of the document; None where it is gone, no picture, or beyond the budget."""
        key = repr(sorted(place.items()))
        if key not in self._known:
            read = self._outside if "outside" in place else self._inside
            self._known[key] = self._made(lambda: read(place), SIDE)
        return self._known[key]

    def panels(self, training: str) -> list[dict[str, Any]]:
        """Some of a training's panels, from the first to the last."""
        every = self._shown.get(training, ())
        names = list(dict.fromkeys(one.name for one in every))
        found = []
        for name in names:
            ours = [one for one in every if one.name == name]
            for one in _spread(ours, STEPS):
                if picture := self._made(lambda one=one: _opened(one.read()), SHEET):  # type: ignore[misc]
                    found.append({"name": name, "step": one.step, "picture": picture})
        return sorted(found, key=lambda one: (one["step"], one["name"]))

    def sheet(self, artifact: str) -> str | None:
        """The sheet that an artifact has for people."""
        found = self._subject.artifacts.get(artifact)
        names = [name for name in FINAL if found and name in found.files]
        return self._made(lambda: _opened(found.read(names[0])), SHEET) if found and names else None

    def _inside(self, place: Mapping[str, str]) -> Image.Image:
        return _opened(self._subject.artifacts[place["artifact"]].read(place["file"]))

    def _outside(self, place: Mapping[str, str]) -> Image.Image:
        path = place["outside"]
        if path not in self._rivals:
            self._rivals[path] = Rival(path, place["config_key"])
        rival, wanted = self._rivals[path], (place["key"], place["prompt"])
        if rival.file(wanted) is None:
            raise FileNotFoundError(place["key"])
        return Image.fromarray(rival.pixels(wanted))

    def _made(self, read: Callable[[], Image.Image], width: int) -> str | None:
        try:
            picture = read()
        except (OSError, KeyError, ValueError, CorruptFile, Lost):  # forgotten, damaged, or moved away since
            return None
        uri = jpeg(picture, width)
        if len(uri) > self._room:
            self.left_out += 1
            return None
        self._room -= len(uri)
        return uri


def jpeg(picture: Image.Image, side: int) -> str:
    """A data URI of the picture, no side longer than `side` px, on white."""
    small = picture.convert("RGB")
    small.thumbnail((side, 4 * side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _opened(content: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(content))
    picture.load()
    return picture


def _spread(items: Sequence[Picture], count: int) -> list[Picture]:
    """Some of many, evenly, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]
