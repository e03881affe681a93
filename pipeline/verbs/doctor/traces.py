"""A root is left as it was found: what checks write below it is gone afterwards, and nothing that is others'."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from datasets.files import storage


@contextmanager
def no_traces(root: str) -> Iterator[str]:
    """A folder below the root for what a check writes, gone afterwards with all that is in it.

    A root that was not there goes too, but only a folder in which nothing is: meanwhile a run may have begun there. A
    store has no folders of its own.
    """
    existed = storage.exists(root)
    folder = storage.join(root, f".doctor-{uuid.uuid4().hex}")
    try:
        yield folder
    finally:
        storage.remove(folder)
        if not existed and not storage.is_remote(root):
            with suppress(OSError):  # it is not empty, or was never made
                Path(storage.absolute(root)).rmdir()
