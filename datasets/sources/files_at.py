"""The files of a kind that a path stands for; where there are none, what lies there and which source reads that."""

import posixpath
from collections import Counter
from collections.abc import Mapping
from itertools import islice

from datasets import pictures
from datasets.config import DataError
from datasets.files import storage
from datasets.left_out import in_words

_READ_BY = {
    **dict.fromkeys(pictures.SUFFIXES, "data=folder reads pictures"),
    **dict.fromkeys((".tar", ".tgz"), "data=webdataset reads tars"),
}
_NAMED = 5  # suffixes in a sentence


def files_at(path: str, key: str, suffixes: str | tuple[str, ...], kind: str, give: str) -> dict[str, str]:
    """The files that `path` stands for, by their names (`storage.matching`).

    Raises:
        DataError: there is none; names `key`, the `kind` of file, what is there, and what to `give`.
    """
    if files := storage.matching(path, suffixes):
        return files
    found = Counter(posixpath.splitext(name)[1].lower() or "no suffix" for name in storage.listing(path))
    raise DataError(f"{key}: there is no {kind} at {path}{there_are(dict(found.most_common()))}; give {give}")


def there_are(kinds: Mapping[str, int]) -> str:
    """How many files of which suffixes there are, and which source reads some of them, in brackets."""
    named = in_words(dict(islice(kinds.items(), _NAMED))) + ", ..." * (len(kinds) > _NAMED)
    readers = dict.fromkeys(_READ_BY[kind] for kind in kinds if kind in _READ_BY)
    return f" ({'; '.join([named, *readers])})" if kinds else ""
