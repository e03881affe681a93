"""The trainings of an experiment: how long, on how many pictures, their curves by step and by device-hour, and what
they showed on the way."""

from collections.abc import Mapping
from typing import Any

from pipeline.plan.dag import Step
from pipeline.plan.table import rows as steps_of
from pipeline.results.subject import Subject
from pipeline.settings.config import TRAININGS
from pipeline.settings.sections import training_key
from pipeline.store.artifacts import Artifact
from pipeline.terminal import counted
from pipeline.tracking.mlflow_history import History, Picture
from pipeline.tracking.projection import SO_FAR

CURVES = ("loss", "validation_loss", "validation_loss_ema")
STEPS = {key.partition(".")[0]: step for step, keys in TRAININGS.items() for key in keys}  # by training
TITLES = {
    "stage_a": "Stage A",
    "compressor": "Compressor, warm-up",
    "stage_b": "Stage B",
    "stage_c": "Stage C",
    "previewer": "Previewer",
    "baseline": "Baseline",
}
OUTPUTS = {  # where no config tells
    "train_a": ("stage_a",),
    "train_b": ("stage_b",),
    "train_c": ("stage_c_phases", "stage_c"),
    "train_previewer": ("previewer",),
    "train_baseline": ("baseline",),
}


def section(subject: Subject, history: History | None) -> tuple[list[dict[str, Any]], dict[str, list[Picture]]]:
    """A row a training that the experiment needed, and the pictures of each, by training."""
    found, pictures = [], {}
    shown: dict[str, tuple[dict[str, Any], list[Picture]]] = {}
    for training, step in STEPS.items():
        output = _output(subject, step)
        if output is None:
            continue
        artifact, digest = subject.artifacts.get(output), subject.prints[output]
        if artifact and artifact.manifest["step"] != step:
            continue  # existing weights
        settings = _settings(subject, artifact, training_key(training))
        if settings is None and (artifact or training == "compressor"):
            continue  # no warm-up
        if digest not in shown and history:
            shown[digest] = history.curves(digest, _is_wanted), history.pictures(digest)
        points, panels = shown.get(digest, ({}, []))
        pictures[training] = [one for one in panels if one.name.startswith(f"{training} panel")]
        found.append(
            {
                "name": training,
                "step": step,
                "artifact": output,
                "fingerprint": digest,
                "state": subject.state(output),
                "steps": sum(phase["steps"] for phase in settings["phases"]) if settings else None,
                "pictures_seen": artifact.manifest["metrics"].get(f"{training}/images") if artifact else None,
                "left_out": left_out(artifact.manifest["metrics"]).get(training) if artifact else None,
                "trained_on": _trained_on(artifact, training) if artifact else None,
                "seconds": artifact.manifest["seconds"] if artifact else None,
                "final": _final(artifact, training),
                "curves": _curves(points, training),
                "shown": [{"name": one.name, "step": one.step} for one in pictures[training]],
            }
        )
    return found, pictures


def left_out(metrics: Mapping[str, float]) -> dict[str, str]:
    """What an artifact's trainings left out since steps of them went wrong, in words, by training."""
    found = {}
    for training in STEPS:
        if bad := int(metrics.get(f"{training}/bad_steps", 0)):
            pictures = metrics.get(f"{training}/images_left_out")  # none in what was built before they were counted
            told = [counted(bad, "bad step"), *([] if pictures is None else [counted(int(pictures), "picture")])]
            found[training] = ", ".join(told)
    return found


def _output(subject: Subject, step: str) -> str | None:
    """The artifact that a training step makes, where the subject has one."""
    for name, artifact in subject.artifacts.items():
        if artifact.manifest["step"] == step:
            return name
    made = [one.output for one in _known(subject) if one.name == step] or OUTPUTS[step]
    return next((name for name in made if name in subject.prints), None)


def _known(subject: Subject) -> list[Step]:
    return steps_of(subject.config) if subject.config else []


def _settings(subject: Subject, artifact: Artifact | None, key: str) -> dict[str, Any] | None:
    """How a training is configured: as its artifact says, else the config."""
    section, *path = key.split(".")
    if artifact:
        settings = artifact.manifest["settings"]
        if key in settings:  # a step that reads no more of its section
            return settings[key]
        told: Any = settings.get(section)
    elif subject.config:
        told = getattr(subject.config, section).model_dump(mode="json")
    else:
        return None
    for part in path:
        told = told.get(part) if isinstance(told, Mapping) else None
    return told


def _is_wanted(name: str) -> bool:
    training, _, curve = name.partition("/")
    return (training in STEPS and curve in CURVES) or name.startswith(SO_FAR)


def _curves(points: Mapping[str, list[tuple[int, float]]], training: str) -> dict[str, list[dict[str, Any]]]:
    """Step, value and device-hours of each point; hours are None where nobody logged them."""
    hours = dict(points.get(f"{SO_FAR}/{training}") or points.get(SO_FAR, []))
    return {
        curve: [{"step": step, "value": value, "hours": hours.get(step)} for step, value in points[name]]
        for curve in CURVES
        if (name := f"{training}/{curve}") in points
    }


def _final(artifact: Artifact | None, training: str) -> dict[str, float]:
    """What the last entry measured, but speeds."""
    every = artifact.manifest["metrics"] if artifact else {}
    start = f"{training}/"
    names = [name for name in every if name.startswith(start) and not name.startswith(f"{start}speed/")]
    return {name.removeprefix(start): every[name] for name in names}


def _trained_on(artifact: Artifact, training: str) -> int:
    """How many pictures a training has learned from: no more than it has seen, each once before any twice."""
    rows: int = artifact.manifest["rows"]
    return min(rows, int(artifact.manifest["metrics"].get(f"{training}/images", rows)))
