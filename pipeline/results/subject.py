"""Of what a report is: the artifacts that one config asks for, finished or not, and the run that made them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.settings.config import Config
from pipeline.store.artifacts import Artifact, Store


@dataclass(frozen=True)
class Subject:
    """What is told of.

    `prints` are the fingerprints of all that is asked for, `artifacts` those of them that are finished, by name.
    `record` is the run's, and `earlier` are those of the same conf before it, the newest first. `config` is what they
    were made by; None where nobody knows all of it any more.
    """

    root: str
    conf: str
    prints: Mapping[str, str]
    artifacts: Mapping[str, Artifact]
    record: Mapping[str, Any] | None = None
    earlier: tuple[Mapping[str, Any], ...] = ()
    config: Config | None = None

    def state(self, name: str) -> str:
        """`done`, `unfinished` or `missing`."""
        if name in self.artifacts:
            return "done"
        return "unfinished" if Store(self.root).started(name, self.prints[name]) else "missing"


def of_prints(root: str, conf: str, prints: Mapping[str, str], **about: Any) -> Subject:
    """The subject of what some fingerprints name, with all that it was made from."""
    store = Store(root)
    found = {name: artifact for name, digest in prints.items() if (artifact := store.find(name, digest))}
    every = found | {name: one for name, one in ancestors(found.values(), store).items() if name not in prints}
    named = {name: artifact.manifest["fingerprint"] for name, artifact in every.items()}
    return Subject(root, conf, {**named, **prints}, every, **about)


def of_artifacts(inputs: Mapping[str, Artifact], **about: Any) -> Subject:
    """The subject of finished artifacts, with all that they were made from."""
    first = next(iter(inputs.values()))
    root = first.path.removesuffix(f"/artifacts/{first.name}/{first.manifest['fingerprint']}")
    every = dict(inputs) | ancestors(inputs.values(), Store(root))
    prints = {name: artifact.manifest["fingerprint"] for name, artifact in every.items()}
    return Subject(root, "", prints, every, **about)


def ancestors(artifacts: Iterable[Artifact], store: Store) -> dict[str, Artifact]:
    """What artifacts were made from, directly or not, by name, as far as it is still there."""
    found: dict[str, Artifact] = {}
    waiting = list(artifacts)
    while waiting:
        for name, digest in waiting.pop().manifest["parents"].items():
            if name not in found and (artifact := store.find(name, digest)):
                found[name] = artifact
                waiting.append(artifact)
    return found
