"""What others have written where a caption or a number should stand."""

import math

from datasets.left_out import LeftOut

SHOWN = 60  # characters of a value in a sentence


def captions(value: object, left_out: LeftOut, place: object) -> list[str]:
    """The captions in a foreign value: a text is one, a list holds several; everything else is left out by cause.

    `no_caption`: there is nothing, or a blank text. `no_text`: a number, an object or another thing that nobody has
    written as a caption. `encoding`: bytes that are no UTF-8.
    """
    if isinstance(value, list | tuple) and value:
        return [text for part in value for text in _one(part, left_out, place)]
    return _one(value, left_out, place)


def _one(value: object, left_out: LeftOut, place: object) -> list[str]:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            left_out.add("encoding", place, f"its caption is no UTF-8 ({error.reason} at byte {error.start})")
            return []
    if isinstance(value, str):
        if value.strip():
            return [value]
        left_out.add("no_caption", place, "its caption is blank")
    elif value is None or value == [] or (isinstance(value, float) and math.isnan(value)):
        left_out.add("no_caption", place, "it has no caption")
    else:
        shown = repr(value)[:SHOWN]
        left_out.add("no_text", place, f"its caption is no text but {type(value).__name__} {shown}")
    return []


def number(value: object) -> float | None:
    """A foreign number; None for what is none, and for what no picture's size or score comes to."""
    return float(value) if isinstance(value, float | int) and abs(value) < 1e9 else None
