"""How a run's config differs from that of the run before it: key by key, then and now."""

from collections.abc import Mapping
from typing import Any

from pipeline.results.subject import Subject
from pipeline.settings.keys import flatten
from pipeline.store.artifacts import Store
from pipeline.store.readers import asked_for
from pipeline.store.redact import redact

NOT_THERE = "not there"


def section(subject: Subject) -> dict[str, Any] | None:
    """The differences to the last run of the same conf whose config was another; `same` counts those between, with the
    same one. None where no run came before.

    Where a record does not have the config, as those of earlier versions, the settings of what was built stand for it:
    of keys that only one side knows nothing is said then.
    """
    ours, whole = _settings(subject.root, subject.record) if subject.record else (_of_artifacts(subject), False)
    same = 0
    for record in subject.earlier:
        theirs, known = _settings(subject.root, record)
        keys = sorted(ours.keys() | theirs.keys() if whole and known else ours.keys() & theirs.keys())
        changes = [
            {"key": key, "before": theirs.get(key, NOT_THERE), "now": ours.get(key, NOT_THERE)}
            for key in keys
            if theirs.get(key, NOT_THERE) != ours.get(key, NOT_THERE)
        ]
        if changes:
            about = {key: record.get(key) for key in ("id", "started", "outcome", "command")}
            return {"before": about, "same": same, "changes": changes, "whole": whole and known}
        same += 1
    return {"before": None, "same": same, "changes": [], "whole": whole} if same else None


def _settings(root: str, record: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """What a run was configured with, by dotted key, and whether that is all of it."""
    if "config" in record:
        return flatten(dict(record["config"])), True
    store = Store(root)
    found: dict[str, Any] = {}
    for name, digest in asked_for(record).items():
        if artifact := store.find(name, digest):
            found |= flatten(redact(artifact.manifest["settings"]))
    return found, False


def _of_artifacts(subject: Subject) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for artifact in subject.artifacts.values():
        found |= flatten(redact(artifact.manifest["settings"]))
    return found
