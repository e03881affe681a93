"""A step's log: what the driver says while the step is built, in a file of its own."""

import contextlib
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

from datasets.files import storage
from pipeline.errors import Interrupted


@contextlib.contextmanager
def logging_to(path: str) -> Iterator[None]:
    """Send the driver's log records to a step's file: at once on a local root, at the end on a remote one."""
    local = Path(path) if not storage.is_remote(path) else Path(f"/tmp/{uuid.uuid4().hex}.log")
    local.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(local)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("pipeline")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        logger.info("stopped on request: %s", error or "at once, without a save")
        raise
    except Exception:
        logger.exception("the step ended with an error")
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
        if storage.is_remote(path):
            storage.publish(local, path)
            local.unlink()
