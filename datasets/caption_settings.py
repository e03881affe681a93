"""Captions as they are planned, and settings of those beside the source's own: where they come from."""

import unicodedata
from collections.abc import Mapping, Set
from typing import Annotated, Literal

from pydantic import Field

from settings import FILES, MANNER, TABLE, WEIGHTS, Settings, Text

_BIDI_CONTROLS = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
ALT = "alt"  # the source's own captions
Name = Annotated[str, Field(pattern="^[a-z0-9_]+$", max_length=64)]
Weight = Annotated[float, Field(ge=0.0, le=1e6)]


def clean_caption(caption: str) -> str:
    """NFC, without control and text-direction characters, runs of white space as one space."""
    spaced = " ".join(caption.split())
    if spaced.isascii() and spaced.isprintable():  # most are, and going through the letters takes ten times as long
        return spaced
    visible = "".join(letter for letter in spaced if not _is_control(letter))
    return " ".join(unicodedata.normalize("NFC", visible).split())


def is_blank(text: str) -> bool:
    """Whether nothing of a text is to be seen: blanks, and characters of format alone, as a space of no width."""
    return all(letter.isspace() or unicodedata.category(letter) == "Cf" for letter in text)


def _is_control(letter: str) -> bool:
    return unicodedata.category(letter) == "Cc" or ord(letter) in _BIDI_CONTROLS


class RecapConfig(Settings):
    """Captions that others have written of the same pictures."""

    path: Annotated[Text, TABLE]
    """Parquet with captions by url (the pictures', or those they were copied from) or by key: a file, a folder, a
    pattern, or a URI."""
    column: Text | None = None
    """Its column of captions, a text or a list of several; null: re_caption as in Recap-DataComp-1B, else caption."""


class CaptionerConfig(Settings):
    """A model that writes a caption of each stored picture."""

    weights: Annotated[Text, FILES, WEIGHTS]
    """Local folder of an image-to-text model in transformers' layout, its processor and tokenizer included."""
    prompt: Text | None = None
    """What the model is asked, for those that take a prompt; null: nothing."""
    max_tokens: Annotated[int, Field(ge=1, le=10_000)] = 77
    """Longest caption, in tokens of the model."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of the model. CPUs that do not compute in bf16 are faster in fp32."""
    batch: Annotated[int, Field(ge=1, le=10_000), MANNER] = 8
    """Pictures captioned at a time on a device."""


def check_names(weights: Mapping[str, float], recaps: Set[str], captioners: Set[str]) -> None:
    """Refuse, with a `ValueError`, weights of captions that nobody gives, and captions without a weight."""
    given = {ALT} | recaps | captioners
    for name in sorted(recaps | captioners):
        key = f"{'recaps' if name in recaps else 'captioners'}.{name}"
        if name == ALT or name in recaps & captioners:
            raise ValueError(f"{key}: other captions are called {name}; give these another name")
        if name not in weights:
            raise ValueError(f"{key} has no weight; give data.captions={{{ALT}: 1, {name}: 1}}, or 0 to draw none")
    if unknown := sorted(set(weights) - given):
        raise ValueError(
            f"captions.{unknown[0]}: there are no captions of that name, only {', '.join(sorted(given))}; give "
            f"data.recaps.{unknown[0]}.path or data.captioners.{unknown[0]}.weights"
        )
    if weights and not any(weights.values()):
        raise ValueError("captions: all weights are 0; raise one")
