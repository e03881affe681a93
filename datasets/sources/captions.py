"""What others have written where a caption or a number should stand."""

import math
import re
from collections.abc import Iterable

from datasets.caption_settings import is_blank
from datasets.left_out import LeftOut

SHOWN = 60  # characters of a value in a sentence
BOM = "\ufeff"

Loss = tuple[str, str]  # cause and sentence
Parts = tuple[list[str], list[Loss]]  # the captions in a value, and what of it is none
HALF = re.compile("[\ud800-\udfff]")  # of a character: what JSON can spell, and what bytes that are no text come as
_CONTROL = re.compile("[\\x00-\\x08\\x0e-\\x1f]")  # characters that a text has by accident only
_STRAY = 0.3  # of its characters, at most


def captions(value: object, left_out: LeftOut, place: object) -> list[str]:
    """The captions in a foreign value: a text is one, a list holds several; everything else is left out by cause.

    `no_caption`: there is nothing, or a blank text. `no_text`: a number, an object or another thing that nobody has
    written as a caption. `encoding`: bytes that are no UTF-8, or half a character, as JSON can spell it.
    """
    return first([value], left_out, place)


def first(values: Iterable[object], left_out: LeftOut, place: object) -> list[str]:
    """The `captions` of the first value that has any; else why there are none, as of `best`."""
    texts, losses = best(map(parts_of, values))
    for cause, sentence in losses:
        left_out.add(cause, place, sentence)
    return texts


def best(found: Iterable[Parts]) -> Parts:
    """Of what several values hold the first that has captions; where none has, the first that is more than a blank."""

    def rank(parts: Parts) -> int:
        return 0 if parts[0] else 1 + all(cause == "no_caption" for cause, _ in parts[1])

    return min(found, key=rank, default=parts_of(None))


def parts_of(value: object) -> Parts:
    """The captions in a value, and why others of its parts are none."""
    parts = [_one(part) for part in (value if isinstance(value, list | tuple) and value else [value])]
    return [part for part in parts if isinstance(part, str)], [part for part in parts if not isinstance(part, str)]


def _one(value: object) -> str | Loss:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            return "encoding", f"its caption is no UTF-8 ({error.reason} at byte {error.start})"
    if isinstance(value, str):
        if garbled(value):
            return "encoding", "its caption is full of control characters: it was read in an encoding that it is not in"
        if half := HALF.search(value):
            return "encoding", f"its caption has half a character (U+{ord(half[0]):04X}), which is no text"
        said = value.removeprefix(BOM)
        return ("no_caption", "its caption is blank") if is_blank(said) else said
    if value is None or value == [] or (isinstance(value, float) and math.isnan(value)):
        return "no_caption", "it has no caption"
    return "no_text", f"its caption is no text but {type(value).__name__} {repr(value)[:SHOWN]}"


def garbled(said: str) -> bool:
    """Whether these are no letters that somebody wrote: UTF-16 without its mark passes for UTF-8."""
    letters = said.strip("\0")  # which fill fields of a fixed width
    return len(_CONTROL.findall(letters)) > _STRAY * len(letters)


def text(value: object) -> str | None:
    """A foreign text that is no caption, such as a licence, which may be a number; None for what is none."""
    return (str(value) or None) if isinstance(value, str | int) and not isinstance(value, bool) else None


def number(value: object) -> float | None:
    """A foreign number; None for what is none, and for what no picture's size or score comes to."""
    return float(value) if isinstance(value, float | int) and abs(value) < 1e9 else None
