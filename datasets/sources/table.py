"""Where rows and pictures come from: the table of sources.

To add one, write a module with the functions of `Source`, and its settings as `SourceConfig.<name>`; then add its line
here and `conf/data/<name>.yaml`. `laion_aesthetic` has no line: Parquet with LAION's columns can take the place of any
source's own rows (`data.metadata`), and its pictures are on the web.

A plan is made of one of them or of several (`DataConfig.parts`). They know their settings as `data.<name>`, and their
reserved hosts by one name; what is otherwise in a mixture is done here.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote

import pyarrow as pa

from datasets.config import DataConfig, DataError
from datasets.left_out import LeftOut
from datasets.source_settings import Part
from datasets.sources import coco_captions, folder, localized_narratives, openmoji, webdataset
from datasets.sources.loopback import RESERVED, Address, Hosts

_LOCAL = "|".join(re.escape(source.HOST) for source in (openmoji, folder, webdataset))
_PICTURE = re.compile(rf"https?://(?:[^/?#]*\.)?(?:{_LOCAL})/([^?#]*)(?:\?(.*))?")  # that a source serves: name, query
_ON_RESERVED = re.compile(rf"^(https?://)([^/]*\.{RESERVED}\.?(:\d+)?/)")  # of a normalised URL


class Source(Protocol):
    """What a source can do, given its settings, a section of `data`."""

    def tables(self, settings: Any, left_out: LeftOut, /) -> Iterable[pa.Table]:
        """Rows in LAION's schema, scores left out where there are none.

        What no row could be made of is counted in `left_out` by reason, complete when the last table has been taken.
        Raises DataError, naming key and path, for what cannot be read or holds nothing.
        """

    def hosts(self, settings: Any, /) -> AbstractContextManager[Hosts]:
        """Serve what lies on this machine on loopback meanwhile; the map is empty for a source on the web."""

    def identity(self, settings: Any, /) -> dict[str, Any]:
        """The settings as fingerprints know them: for a path the files that it stands for, as `datasets.files.inputs`.

        Raises DataError for files that are not there, or broken at their start: it is called before a run begins.
        """

    def licence(self, settings: Any, /) -> dict[str, str | None]:
        """Terms for manifest and model card: licence (an identifier), licence_url, attribution, ..."""


SOURCES: dict[str, Source] = {
    "openmoji": openmoji,
    "folder": folder,
    "coco_captions": coco_captions,
    "localized_narratives": localized_narratives,
    "webdataset": webdataset,
}


@contextmanager
def naming(part: Part) -> Iterator[None]:
    """Let refusals name the keys of a source as they are where it is one of several."""
    try:
        yield
    except DataError as error:
        raise type(error)(part.renamed(str(error))) from error


def tables(part: Part, left_out: LeftOut) -> Iterable[pa.Table]:
    """The source's own rows, as `Source.tables`."""
    return SOURCES[part.config.source].tables(part.config.settings, left_out)


def apart(part: Part, url: str) -> str:
    """A normalised URL; one on a reserved host names no picture of another source of the mixture, whoever wrote it."""
    return _ON_RESERVED.sub(rf"\1{part.name}.\2", url) if part.apart else url


def known_as(place: str) -> str:
    """What a person calls a picture: one that a source serves by its name, in a tar after the tar's; others, and all
    that is no URL, as it is."""
    if not (found := _PICTURE.fullmatch(place)):
        return place
    member = parse_qs(found[2] or "", errors="replace").get("member", [])
    return "/".join([unquote(found[1], errors="replace"), *member[:1]])


@contextmanager
def hosts(data: DataConfig) -> Iterator[Hosts]:
    """Addresses of reserved hosts: a source on this machine is served from the process that downloads."""
    found: dict[str, Address] = {}
    with ExitStack() as stack:
        for part in data.parts:
            if part.config.settings:
                with naming(part):
                    served = stack.enter_context(SOURCES[part.config.source].hosts(part.config.settings))
                found |= {f"{part.name}.{host}" if part.apart else host: place for host, place in served.items()}
        yield found


def identity(part: Part) -> dict[str, Any]:
    """The source's settings as fingerprints know them."""
    with naming(part):
        return SOURCES[part.config.source].identity(part.config.settings) if part.config.settings else {}


def licence(part: Part) -> dict[str, str | None]:
    """The source's terms; none are known of rows that `data.metadata` brings."""
    config = part.config
    return SOURCES[config.source].licence(config.settings) if config.settings and config.metadata is None else {}
