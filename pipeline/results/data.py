"""The data of an experiment: from the rows of its source to what each training saw, and what was lost on the way."""

from collections.abc import Mapping
from typing import Any

from datasets.files.storage import CorruptFile
from pipeline.store.artifacts import Artifact

Level = dict[str, Any]  # level, rows, and lost by cause


def section(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Source and licence, the funnel, and pictures held out of all trainings; as far as there is any of it."""
    metadata, held = artifacts.get("metadata"), artifacts.get("held_out")
    told: dict[str, Any] = {"funnel": funnel(metadata, artifacts) if metadata else []}
    if metadata:
        notes = metadata.manifest["notes"]
        terms = notes.get("licence", {})
        told |= {"source": notes.get("source"), "licence": terms.get("licence"), "credit": terms.get("attribution")}
    if held:
        told["held_out"] = held.manifest["rows"]
    trained = {
        name: artifact.manifest["rows"]
        for name, artifact in artifacts.items()
        if artifact.manifest["step"].startswith("train_")
    }
    return told | {"trained_on": trained}


def funnel(metadata: Artifact, artifacts: Mapping[str, Artifact]) -> list[Level]:
    """How many pictures are left after each step, and why not the others.

    Raises:
        CorruptFile: the counts of a step do not add up.
    """
    notes = metadata.manifest["notes"]
    levels = [_level("read", notes["read"], {})]
    levels.append(_level("planned", metadata.manifest["rows"], notes["rejected"], of=levels[-1]))
    if images := artifacts.get("images"):
        levels.append(_level("kept", images.manifest["rows"], images.manifest["notes"]["lost"], of=levels[-1]))
        for name, artifact in artifacts.items():
            if name.startswith(("text_", "latents_")):
                levels.append(_level(f"encoded: {name}", artifact.manifest["rows"], {}))
            elif name == "aesthetic":
                levels.append(_level("scored", artifact.manifest["rows"], {}))
    return levels


def _level(name: str, rows: int, lost: Mapping[str, int], of: Level | None = None) -> Level:
    causes = dict(sorted(((cause, count) for cause, count in lost.items() if count), key=lambda item: -item[1]))
    if of is not None and rows + sum(causes.values()) != of["rows"]:
        gone = sum(causes.values())
        raise CorruptFile(f"{of['rows']} rows were {of['level']}, but {rows} are {name} and {gone} lost")
    return {"level": name, "rows": rows, "lost": causes}
