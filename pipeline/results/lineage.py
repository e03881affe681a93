"""What an experiment consists of: every artifact with its digests, what it was made from, by whom, at which commit."""

from typing import Any

from pipeline.hours.table import parents_first
from pipeline.results.subject import Subject


def section(subject: Subject) -> list[dict[str, Any]]:
    """A row an artifact, parents first; of what is not finished no more than its fingerprint."""
    made = {name: artifact.manifest["parents"] for name, artifact in subject.artifacts.items()}
    ordered = (name for name in parents_first(made, made) if name in made)
    return [_row(subject, name) for name in dict.fromkeys([*ordered, *subject.prints])]


def _row(subject: Subject, name: str) -> dict[str, Any]:
    told = {"name": name, "state": subject.state(name), "fingerprint": subject.prints[name]}
    artifact = subject.artifacts.get(name)
    if artifact is None:
        return told
    manifest = artifact.manifest
    keys = ("step", "rows", "bytes", "seconds", "created", "content", "user", "commit", "versions")
    return told | {key: manifest.get(key) for key in keys} | {"parents": manifest["parents"], "path": artifact.path}
