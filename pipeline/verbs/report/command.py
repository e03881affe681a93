"""The verb `report`: which table or page is asked for, of what, and where it goes."""

import json
from functools import partial

from datasets.files import storage
from pipeline.errors import UsageError
from pipeline.results.document import document
from pipeline.results.subject import Subject
from pipeline.settings.resources import Tracking
from pipeline.settings.words import Words
from pipeline.store.redact import redact
from pipeline.terminal import console, print_json
from pipeline.tracking.mlflow_history import History, opened
from pipeline.tracking.mlflow_store import locate_store
from pipeline.verbs.report import asked, hours, page
from pipeline.verbs.report.pictures import Album

HTML, JSON = ".html", ".json"


def handle(words: Words) -> None:
    if words.rest == ["hours"]:
        if found := [f"{key}=" for key in words.own]:
            raise UsageError(f"report hours takes no {', '.join(found)}; it is of a whole root")
        root = storage.absolute(words.root)
        if words.rebuild_mlflow:
            hours.rebuild(words, root)
        hours.hours(root, words.json)
    elif words.rest or words.rebuild_mlflow:
        raise UsageError(
            "report knows one table, python -m pipeline report hours, and the page of an experiment, "
            "python -m pipeline report conf=stage_c out=report.html"
        )
    else:
        experiment(words)


def experiment(words: Words) -> None:
    """Write the page of an experiment, and the JSON that it is made from beside it and into MLflow's run; with
    `--json` and no `out=`, print that."""
    out = words.own.get("out")
    if out is None and not words.json:
        raise UsageError("report needs out=FILE.html, or --json for its figures alone")
    if out is not None and not out.endswith(HTML):
        raise UsageError(f"out={out}: the page is one file; give a name that ends in {HTML}")
    subject, tracking = asked.subject(words)
    missing: list[str] = []
    history = _history(subject.root, tracking, missing)
    told, shown = document(subject, history, missing)
    told = redact(told)
    text = json.dumps(told, indent=1, ensure_ascii=False)
    if out is not None:
        html = page.page(told, Album(subject, shown))
        path = storage.absolute(out)
        storage.publish(text.encode(), f"{path.removesuffix(HTML)}{JSON}")
        storage.publish(html.encode(), path)
        _keep(subject, history, {"report.json": text, "report.html": html})
        console.print(f"{told['verdict']['headline']}\n{path}, made from {path.removesuffix(HTML)}{JSON}", markup=False)
    if words.json:
        print_json(told)


def _history(root: str, tracking: Tracking, missing: list[str]) -> History | None:
    """What MLflow has; None where it has nothing or nobody says where it is, which is told, here and on the page."""
    history = None
    try:
        history = opened(locate_store(root, tracking.uri), tracking.experiment, missing.append)
    except UsageError as error:
        missing.append(str(error))
    for reason in missing:
        console.print(f"without curves and panels: {reason}", style="yellow", markup=False)
    return history


def _keep(subject: Subject, history: History | None, texts: dict[str, str]) -> None:
    """Put the report into MLflow's run of the command; what keeps it from that is told."""
    tell = partial(console.print, style="yellow", markup=False)
    if not (history and subject.record):
        return
    try:
        if not history.keep(subject.record["id"], texts):
            tell(f"MLflow has no run {subject.record['id']} to keep the report in")
    except Exception as error:  # the page is written all the same
        tell(f"MLflow does not keep the report: {error}")
