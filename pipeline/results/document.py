"""The whole document, `report.json`: everything that the report shows, and the model card says, comes from here."""

from collections.abc import Mapping
from typing import Any

from datasets.files.storage import CorruptFile
from pipeline.results import changes, comparisons, cost, data, lineage, scores, trainings, verdict
from pipeline.results.subject import Subject
from pipeline.store.artifacts import Artifact, Store
from pipeline.tracking.mlflow_history import History, Picture

FORMAT = 1
RUN = ("id", "conf", "command", "user", "started", "ended", "outcome", "commit", "versions")


def document(
    subject: Subject, history: History | None = None, missing: list[str] | None = None
) -> tuple[dict[str, Any], dict[str, list[Picture]]]:
    """The document, of JSON values alone, and the trainings' pictures.

    `missing` are sentences about what could not be known; those about what is not finished are added.
    """
    lacks = [*(missing or []), *_lacking(subject)]
    try:
        told, pictures = trainings.section(subject, history)
    except Exception as error:  # of MLflow's, in the middle of it: all else can be told
        lacks.append(f"MLflow does not answer any more: {error}")
        told, pictures = trainings.section(subject, None)
    earlier = changes.section(subject)
    begun = [one for one in told if history and one["state"] != "missing"]
    lacks += [f"no curve of {one['name']} is in MLflow" for one in begun if not one["curves"]]
    found: dict[str, Any] = {
        "format": FORMAT,
        "conf": subject.conf,
        "root": subject.root,
        "run": _run(subject.record) if subject.record else None,
        "config": earlier,
        "data": _data(subject.artifacts, lacks),
        "trainings": told,
        "scores": scores.section(subject.artifacts.get("scores"), _before(subject, earlier)),
        "comparisons": comparisons.section(subject),
        "cost": cost.section(subject),
        "lineage": lineage.section(subject),
        "missing": lacks,
    }
    return {"verdict": verdict.section(found), **found}, pictures


def _run(record: Mapping[str, Any]) -> dict[str, Any]:
    steps = [
        {"artifact": name, "step": step.get("step"), "state": step.get("state")}
        for name, step in record["steps"].items()
    ]
    return {key: record.get(key) for key in RUN} | {"steps": steps}


def _data(artifacts: Mapping[str, Artifact], lacks: list[str]) -> dict[str, Any]:
    try:
        return data.section(artifacts)
    except (CorruptFile, KeyError) as error:  # counts from before pictures were forgotten, or of an earlier version
        lacks.append(f"the data's funnel cannot be told: {error}")
        return {"funnel": [], "trained_on": {}}


def _before(subject: Subject, earlier: Mapping[str, Any] | None) -> Artifact | None:
    """The scores of the run that the config is compared with."""
    before = (earlier or {}).get("before")
    record = next((one for one in subject.earlier if before and one["id"] == before["id"]), None)
    digest = record.get("fingerprints", {}).get("scores") if record else None
    return Store(subject.root).find("scores", digest) if digest else None


def _lacking(subject: Subject) -> list[str]:
    states = {name: subject.state(name) for name in subject.prints}
    words = {"unfinished": "not finished", "missing": "not there"}
    found = []
    for state, word in words.items():
        if names := [name for name, its in states.items() if its == state]:
            found.append(f"{word}: {', '.join(names)}")
    if "scores" not in subject.prints:
        found.append("nothing was to be scored: this conf's targets have no scores")
    return found
