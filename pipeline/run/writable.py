"""Whether a folder can be written, tried before anything else happens there."""

import uuid

from datasets.files import storage
from datasets.files.errors import StoreAway
from pipeline.errors import UsageError


def check_writable(folder: str, word: str) -> None:
    """Refuse a folder that cannot be written, before anything else happens there; `word` is what named it.

    Raises:
        StoreAway: nobody can tell.
        UsageError: it cannot.
    """
    probe = storage.join(folder, f".probe-{uuid.uuid4().hex[:8]}")
    try:
        storage.publish(b"", probe)
        storage.remove(probe)
    except StoreAway:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"{word}={folder}: cannot be written ({reason}); give another {word}=") from None
