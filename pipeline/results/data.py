"""The data of an experiment: from the rows of its source to what each training saw, and what was lost on the way."""

from collections.abc import Mapping
from typing import Any

from datasets.files.storage import CorruptFile
from pipeline.store.artifacts import Artifact

Level = dict[str, Any]  # level, rows, and lost by cause
_DONE = {"text": "encoded", "latents": "encoded", "captions": "captioned"}  # with pictures, by the artifact's name


def section(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Source and licence, the funnel, and pictures held out of all trainings; as far as there is any of it."""
    metadata, held = artifacts.get("metadata"), artifacts.get("held_out")
    told: dict[str, Any] = {"funnel": funnel(metadata, artifacts) if metadata else []}
    if metadata:
        told |= _terms(metadata, artifacts.get("images"))
    if held:
        told["held_out"] = held.manifest["rows"]
    trained = {
        name: artifact.manifest["rows"]
        for name, artifact in artifacts.items()
        if artifact.manifest["step"].startswith("train_")
    }
    return told | {"trained_on": trained}


def sources(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a plan's manifest says of each of its sources: name, licence, what became of the rows.

    What one of a single source says of its rows is said of all.
    """
    notes: dict[str, Any] = metadata["notes"]
    several: list[dict[str, Any]] | None = notes.get("sources")
    return several or [
        {"licence": {}, "licences": {}, **notes, "name": notes.get("source"), "planned": metadata["rows"]}
    ]


def _terms(metadata: Artifact, images: Artifact | None) -> dict[str, Any]:
    """Source, licence and credit; of several sources those of each, with its rows and what the download lost of it."""
    told = [
        {
            "source": source["name"],
            "licence": source["licence"].get("licence"),
            "credit": source["licence"].get("attribution"),
            "read": source.get("read"),
            "planned": source["planned"],
            "weight": source.get("weight"),
        }
        for source in sources(metadata.manifest)
    ]
    if len(told) == 1:
        return {name: told[0][name] for name in ("source", "licence", "credit")}
    lost = images.manifest["notes"].get("lost_of", {}) if images else {}
    return {
        "source": ", ".join(source["source"] for source in told),
        "licence": "; ".join(dict.fromkeys(source["licence"] for source in told if source["licence"])) or None,
        "credit": " ".join(dict.fromkeys(source["credit"] for source in told if source["credit"])) or None,
        "sources": [source | {"lost": lost.get(source["source"], {})} for source in told],
    }


def funnel(metadata: Artifact, artifacts: Mapping[str, Artifact]) -> list[Level]:
    """How many pictures are left after each step, and why not the others.

    Raises:
        CorruptFile: the counts of a step do not add up.
    """
    notes = metadata.manifest["notes"]
    levels = [_level("read", notes["read"], {})]
    planned = metadata.manifest["rows"]
    levels.append(_level("planned", notes.get("captions", planned), notes["rejected"], of=levels[-1]))
    for source in notes.get("sources", ()):
        levels.append(_level(f"of {source['name']}", source.get("captions", source["planned"]), source["rejected"]))
    if "captions" in notes:  # of which a planned picture has several
        levels.append(_level("pictures of these", planned, {}))
    if images := artifacts.get("images"):
        levels.append(_level("kept", images.manifest["rows"], images.manifest["notes"]["lost"], of=levels[-1]))
        for name, artifact in artifacts.items():
            if done := _DONE.get(name.partition("_")[0]):
                levels.append(_level(f"{done}: {name}", artifact.manifest["rows"], {}))
            elif name == "aesthetic":
                levels.append(_level("scored", artifact.manifest["rows"], {}))
    return levels


def _level(name: str, rows: int, lost: Mapping[str, int], of: Level | None = None) -> Level:
    causes = dict(sorted(((cause, count) for cause, count in lost.items() if count), key=lambda item: -item[1]))
    if of is not None and rows + sum(causes.values()) != of["rows"]:
        gone = sum(causes.values())
        raise CorruptFile(f"{of['rows']} rows were {of['level']}, but {rows} are {name} and {gone} lost")
    return {"level": name, "rows": rows, "lost": causes}
