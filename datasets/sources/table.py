"""Where rows and pictures come from: the table of sources.

To add one, write a module with the functions of `Source`, and its settings as `DataConfig.<name>`; then add its line
here and `conf/data/<name>.yaml`. `laion_aesthetic` has no line: Parquet with LAION's columns can take the place of any
source's own rows (`data.metadata`), and its pictures are on the web.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import pyarrow as pa

from datasets.config import DataConfig
from datasets.left_out import LeftOut
from datasets.sources import coco_captions, folder, localized_narratives, openmoji, webdataset
from datasets.sources.loopback import Hosts


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


def tables(data: DataConfig, left_out: LeftOut) -> Iterable[pa.Table]:
    """The source's own rows, as `Source.tables`."""
    return SOURCES[data.source].tables(data.settings, left_out)


def hosts(data: DataConfig) -> AbstractContextManager[Hosts]:
    """Addresses of reserved hosts: a source on this machine is served from the process that downloads."""
    return SOURCES[data.source].hosts(data.settings) if data.settings else nullcontext({})


def identity(data: DataConfig) -> dict[str, Any]:
    """The source's settings as fingerprints know them."""
    return SOURCES[data.source].identity(data.settings) if data.settings else {}


def licence(data: DataConfig) -> dict[str, str | None]:
    """The source's terms; none are known of rows that `data.metadata` brings."""
    return SOURCES[data.source].licence(data.settings) if data.settings and data.metadata is None else {}
