"""What a root tells of a run: `<root>/invocations/<id>.json`, written when a step begins and ends, and in between.

`status` reads it, from anywhere; `gc` and `report` do too (`store.readers`).
"""

import json
import logging
import time
from datetime import UTC, datetime
from typing import Any

from datasets.files import storage
from pipeline.store import log_files, readers
from pipeline.store.process import ProcessId
from pipeline.store.redact import redact_line

EVERY_S = 15.0  # between two signs of a step's progress; on a store, each is a request

log = logging.getLogger(__name__)


class Record:
    """The record of a run that goes on; `told` is what is known of it beforehand, `id` with it."""

    def __init__(self, root: str, told: dict[str, Any]):
        self.path = storage.join(root, readers.FOLDER, f"{told['id']}.json")
        self._root = root
        self.told: dict[str, Any] = {
            **told,
            "process": vars(ProcessId.own()),
            "started": _now(),
            "outcome": "running",
            "steps": {},
        }
        self._signed = time.monotonic()
        self._write()

    def begin(self, output: str, step: str, artifact: str) -> str:
        """A step begins that makes an artifact; returns the path for its log."""
        path = log_files.of_step(self._root, self.told["id"], output)
        told = {"state": "running", "log": path, "artifact": artifact, "step": step, "begun": _now()}
        self.told["steps"][output] = told
        self._write()
        return path

    def progress(self, output: str, done: int, total: int, unit: str, device_hours: float | None = None) -> None:
        """How far a step is; written now and then. That it cannot be is no reason to end a run."""
        told = self.told["steps"][output]
        before = told.get("progress")
        if not before or (before["unit"], before["total"]) != (unit, total) or done < before["first"]:
            before = {"first": done, "since": time.time(), "unit": unit, "total": total}
        told["progress"] = {**before, "done": done, "at": time.time(), "device_hours": device_hours}
        if time.monotonic() - self._signed >= EVERY_S:
            self._signed = time.monotonic()
            try:
                self._write()
            except OSError as error:
                log.warning("progress is not shown by `status`: %s", error)

    def end_step(self, output: str, state: str) -> None:
        """How a step ended; written with the next step, or with the run's end."""
        self.told["steps"][output] |= {"state": state, "ended": _now()}

    def end(self, error: BaseException | None) -> None:
        """How the run ended."""
        self.told["outcome"] = "done" if error is None else redact_line(f"{type(error).__name__}: {error}")
        self.told["ended"] = _now()
        self._write()

    def _write(self) -> None:
        storage.publish(json.dumps(self.told, indent=1, ensure_ascii=False).encode(), self.path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
