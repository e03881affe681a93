"""What lies beside a picture, in a folder and in a tar alike: which texts caption it, and what a `.json` says of it.

x.txt, .cap, .caption, .text   captions of x.jpg, and of x.png where it is there too; x.jpg.txt those of x.jpg alone
x.json                         captions under `caption`, `text` or `captions`; LAION's other columns, and `url`, the
                               picture's origin, which a removal list may name
"""

import json
import posixpath
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from datasets.left_out import LeftOut
from datasets.sources import laion
from datasets.sources.captions import SHOWN, Loss, Parts, best, number, parts_of, text

TEXTS = (".txt", ".cap", ".caption", ".text", ".json")  # the first that says something is a picture's caption
_KEYS = ("caption", "text", "captions")  # of a .json
_SCORES = ("similarity", "punsafe", "pwatermark", "aesthetic")
SCHEMA = pa.schema(
    [("URL", pa.string()), ("TEXT", pa.binary()), ("WIDTH", pa.float64()), ("HEIGHT", pa.float64())]
    + [(laion.COLUMNS[name], pa.float64()) for name in _SCORES]
    + [(laion.COLUMNS[name], pa.binary()) for name in ("licence", "origin")]
)
"""Of rows that have the `columns`."""

Refused = tuple[str, str, str]  # what is no caption: the cause, where it stands, a sentence
About = tuple[dict[str, Any], Loss | None]  # what a .json says, and why it says nothing
Found = tuple[str, list[str], list[Refused]]  # a picture, its captions in a text or a row, and what of it is none


class Said:
    """What texts and tables say of pictures: `captions`, and what was `refused` of places that have none."""

    def __init__(self, left_out: LeftOut) -> None:
        self.captions: dict[str, list[str]] = {}
        self.refused: dict[str, list[Refused]] = {}
        self._left_out = left_out

    def take(self, found: Iterable[Found]) -> None:
        """Add what was found. Beside captions of one place, each part of it that is none is a row that is lost."""
        for name, texts, losses in found:
            if texts:
                self.captions.setdefault(name, []).extend(texts)
                for loss in losses:
                    self._left_out.add(*loss)
            else:
                self.refused.setdefault(name, []).extend(losses)

    def lose(self, name: str, why: Sequence[Refused]) -> None:
        """Count a picture without a caption once, by what says most of what was refused, or else of `why`."""
        refused = self.refused.pop(name, []) or list(why)
        told = min(refused, key=lambda loss: loss[0] == "no_caption")
        self._left_out.add(*told)
        self.refused[name] = [loss for loss in refused if loss is not told]

    def pass_over(self) -> None:
        """Note what was refused of pictures that are counted already, or have other captions."""
        for _, place, sentence in (loss for losses in self.refused.values() for loss in losses):
            self._left_out.pass_over("captions", place, sentence)


def is_text(name: str) -> bool:
    """Whether a file may say something of a picture, by its name."""
    return name.lower().endswith(TEXTS)


def is_json(name: str) -> bool:
    """Whether it would say it as a JSON object."""
    return name.lower().endswith(".json")


def found(
    pictures: Collection[str],
    texts: Collection[str],
    done: Collection[str],
    read: Callable[[str], Parts],
    left_out: LeftOut,
    where: Callable[[str], str] = str,
) -> Iterator[Found]:
    """What texts say of pictures, each of its own until one has captions; not of those that are `done`.

    Left out: `no_picture`. All else that was not read is passed over, but for a .json, which says more than captions.

    Args:
        pictures, texts: names in Unicode's NFC.
        read: gives what a text holds.
        where: says a name as it is told.
    """
    beside, used = texts_of(pictures, texts), set[str]()
    for name, own in beside.items():
        for each in own if name not in done else ():
            used.add(each)
            said = placed(read(each), where(each))
            yield name, *said
            if said[0]:
                break
    owned, alone = {each for own in beside.values() for each in own}, set[str]()
    for each in sorted(texts, key=_rank):
        stem = posixpath.splitext(each)[0]
        if each in owned:
            if each not in used and not is_json(each):
                told = "another file has the caption of its picture: tables, then .txt, count"
                left_out.pass_over("captions", where(each), told)
        elif stem not in alone and (not is_json(each) or read(each)[0]):
            alone.add(stem)
            left_out.add("no_picture", where(each), "there is no picture of that name beside it")
        else:
            left_out.pass_over(posixpath.splitext(each)[1].lower(), where(each), "there is no picture beside it")


def placed(parts: Parts, place: str) -> tuple[list[str], list[Refused]]:
    """Captions, and what of a value is none with where it stands."""
    texts, losses = parts
    return texts, [(cause, place, sentence) for cause, sentence in losses]


def texts_of(pictures: Collection[str], texts: Collection[str]) -> dict[str, list[str]]:
    """The texts beside each picture that has any, the one that counts first first; names in Unicode's NFC."""
    there, by_stem = frozenset(pictures), dict[str, list[str]]()
    for name in sorted(texts, key=_rank):
        by_stem.setdefault(posixpath.splitext(name)[0], []).append(name)
    found = {}
    for name in pictures:
        stem = posixpath.splitext(name)[0]
        shared = () if stem in there else by_stem.get(stem, ())  # a picture called x.jpg.png takes none of x.jpg's
        if own := [*by_stem.get(name, ()), *shared]:
            found[name] = own
    return found


def about(content: bytes, read: Callable[[bytes], str] = bytes.decode) -> About:
    """The object in a .json, its names in lower case; where it is none, an empty one, and why.

    JSON is in UTF-8, 16 or 32, and tells which; `read` makes letters of other bytes.
    """
    try:
        try:
            found = json.loads(content)
        except UnicodeDecodeError:
            found = json.loads(read(content))
    except UnicodeError as error:
        return {}, ("encoding", f"it is no text ({error})")
    except (ValueError, RecursionError) as error:
        return {}, ("no_text", f"it is no JSON object ({error})")
    if not isinstance(found, dict):
        return {}, ("no_text", f"it is no JSON object (it is {type(found).__name__} {repr(found)[:SHOWN]})")
    return {name.lower(): value for name, value in found.items()}, None


def captions(said: About) -> Parts:
    """The captions in a .json."""
    columns, wrong = said
    if wrong:
        return [], [wrong]
    return best(parts_of(columns[key]) for key in _KEYS if key in columns)


def columns(said: dict[str, Any]) -> dict[str, Any]:
    """LAION's columns in what a .json says, without caption and size."""
    texts = {"licence": said.get(laion.COLUMNS["licence"].lower()), "origin": said.get("url")}
    return {laion.COLUMNS[score]: number(said.get(laion.COLUMNS[score].lower())) for score in _SCORES} | {
        laion.COLUMNS[name]: (text(value) or "").encode(errors="replace")  # JSON can spell halves of characters
        for name, value in texts.items()
    }


def _rank(name: str) -> tuple[int, bool, str]:
    suffix = posixpath.splitext(name)[1]
    return TEXTS.index(suffix.lower()), not suffix.islower(), name
