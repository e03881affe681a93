"""Prompt files: what models are compared on beside captions of pictures.

    .tsv    a column Prompt, and where there are any Category and Challenge: Parti's prompts, nothing quoted
    .txt    a prompt a line
    .json   COCO's captions_*.json: every annotation's caption
    .jsonl  Localized Narratives: every line's caption

All are text in UTF-8, with or without a byte order mark, with lines that end as any system ends them; blank lines
separate. A prompt that comes again is left out and counted, and so is a row or object whose prompt is blank, or has
half a character, as JSON can spell it. Where fewer are wanted than there are, a seed draws them: those whose hash with
it is lowest, so that the draw is the same wherever the file lies and in whatever order it is.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from datasets.caption_settings import is_blank
from datasets.config import DataError
from datasets.files import storage
from datasets.sources.captions import HALF

SHOWN = 200  # characters of a file in a message
Entry = tuple[str, str, str | None, str | None]  # where it stands, prompt, category, challenge


@dataclass(frozen=True)
class Prompt:
    """A prompt with the key of its picture, 32 hex digits of its text's sha256; category and challenge as Parti has."""

    text: str
    category: str | None = None
    challenge: str | None = None

    @property
    def key(self) -> str:
        """Name of its picture."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file that are taken, in its order; how many it has, how many came again, and what places there
    are without one: how many, and the first."""

    prompts: tuple[Prompt, ...]
    read: int
    repeated: int
    blank: int
    first_blank: str | None = None


def read(path: str, limit: int | None, seed: int, key: str) -> PromptFile:
    """The prompts of a file, at most `limit` of them.

    Args:
        path: a file of one of the forms above, or its URI.
        key: the config key that names it, for the messages.

    Raises:
        DataError: it is not there, of another form, or holds no prompt.
    """
    form = FORMS.get(PurePosixPath(path).suffix.lower())
    if form is None:
        raise DataError(f"{key}: {path} is no prompt file by its name; give one that ends in {', '.join(FORMS)}")
    if not storage.is_file(path):
        raise DataError(f"{key}: there is no prompt file at {path}; give another path")
    content, read, chosen, blank = storage.read(path), 0, dict[str, Prompt](), list[str]()
    if not _is_text(content):
        raise DataError(f"{key}: {path} is not in UTF-8, or has zero bytes; save it in that encoding, without them")
    try:
        with io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig") as lines:
            for place, said, category, challenge in form(lines):
                text = " ".join(said.split())
                if is_blank(text) or HALF.search(text):
                    blank.append(place)
                    continue
                read += 1
                chosen.setdefault(text, Prompt(text, category or None, challenge or None))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{key}: {path} is no prompt file of its form ({error}); see docs/guides/evaluation.md"
        ) from error
    if not chosen:
        raise DataError(f"{key}: {path} holds no prompt; give a file with some")
    prompts = _drawn(tuple(chosen.values()), limit, seed)
    return PromptFile(prompts, read, read - len(chosen), len(blank), next(iter(blank), None))


def _is_text(content: bytes) -> bool:
    """Whether it is text in UTF-8; that of UTF-16 can be valid UTF-8 too, between zeros that no text has."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def _drawn(prompts: tuple[Prompt, ...], limit: int | None, seed: int) -> tuple[Prompt, ...]:
    if limit is None or limit >= len(prompts):
        return prompts
    hashes = {one: hashlib.sha256(f"{seed}\0{one.text}".encode()).digest() for one in prompts}
    last = sorted(hashes.values())[limit - 1]
    return tuple(one for one in prompts if hashes[one] <= last)


def _tsv(lines: io.TextIOWrapper) -> Iterator[Entry]:
    names = [name.strip().lower() for name in lines.readline().rstrip("\r\n").split("\t")]
    prompt = names.index("prompt") if "prompt" in names else None
    if prompt is None:
        told = ", ".join(names)
        shown = told if len(told) <= SHOWN else f"{told[:SHOWN]}..."
        raise ValueError(f"its first line, cut at tabs, has no column Prompt, but {shown}")
    places = [names.index(name) if name in names else None for name in ("category", "challenge")]
    for number, line in _lines(lines, 2):
        cells = line.rstrip("\r\n").split("\t")
        if len(cells) <= prompt:
            raise ValueError(f"line {number} is cut short")
        category, challenge = (
            cells[place].strip() if place is not None and place < len(cells) else None for place in places
        )
        yield f"line {number}", cells[prompt], category, challenge


def _txt(lines: io.TextIOWrapper) -> Iterator[Entry]:
    return ((f"line {number}", line, None, None) for number, line in _lines(lines))


def _lines(lines: io.TextIOWrapper, first: int = 1) -> Iterator[tuple[int, str]]:
    """Those that are not blank, with their numbers."""
    return ((number, line) for number, line in enumerate(lines, first) if line.strip())


def _coco(lines: io.TextIOWrapper) -> Iterator[Entry]:
    told = json.load(lines)
    annotations = told.get("annotations") if isinstance(told, dict) else None
    if not isinstance(annotations, list):
        raise ValueError("it has no list of annotations")
    return (_captioned(one, f"annotation {number}") for number, one in enumerate(annotations, 1))


def _narratives(lines: io.TextIOWrapper) -> Iterator[Entry]:
    for number, line in _lines(lines):
        try:
            told = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is no JSON: {error.msg}") from None
        yield _captioned(told, f"line {number}")


def _captioned(told: object, where: str) -> Entry:
    if not isinstance(told, dict) or not isinstance(told.get("caption"), str):
        raise ValueError(f"{where} has no caption")
    return where, told["caption"], None, None


FORMS = {".tsv": _tsv, ".txt": _txt, ".json": _coco, ".jsonl": _narratives}
