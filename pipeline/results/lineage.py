"""What an experiment consists of: every artifact with its digests, what it was made from, by whom, at which commit."""

from typing import Any

from pipeline.results.subject import Subject


def section(subject: Subject) -> list[dict[str, Any]]:
    """A row an artifact, parents first; of what is not finished no more than its fingerprint."""
    names = list(dict.fromkeys([*_parents_first(subject), *subject.prints]))
    return [_row(subject, name) for name in names]


def _parents_first(subject: Subject) -> list[str]:
    found: dict[str, None] = {}

    def visit(name: str) -> None:
        if name in subject.artifacts and name not in found:
            for parent in subject.artifacts[name].manifest["parents"]:
                visit(parent)
            found[name] = None

    for name in subject.artifacts:
        visit(name)
    return list(found)


def _row(subject: Subject, name: str) -> dict[str, Any]:
    told = {"name": name, "state": subject.state(name), "fingerprint": subject.prints[name]}
    artifact = subject.artifacts.get(name)
    if artifact is None:
        return told
    manifest = artifact.manifest
    keys = ("step", "rows", "bytes", "seconds", "created", "content", "user", "commit", "versions")
    return told | {key: manifest.get(key) for key in keys} | {"parents": manifest["parents"], "path": artifact.path}
