"""`python -m pipeline VERB conf=NAME [key=value ...] [flags]`: parse, dispatch, end with the documented exit code."""

import contextlib
import json
import logging
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

if not all(map(find_spec, ("pyarrow", "pydantic", "hydra"))):
    sys.exit("error: this Python lacks the packages: run `make setup`, then `source .venv/bin/activate`")

from datasets import storage
from pipeline import __version__, compose, cost, obstacles, run
from pipeline.config import Config
from pipeline.dag import order
from pipeline.errors import NotBuilt, UsageError, exit_code
from pipeline.mlflow_store import locate_store
from pipeline.removal_list import names_of, requests
from pipeline.screen import Summary, console, show_plan, show_summary
from pipeline.steps import table
from pipeline.words import Words, parse, usage


def main(arguments: list[str]) -> int:
    """Run one command; returns its exit code."""
    if not arguments or arguments[0] == "help" or {"-h", "--help"}.intersection(arguments):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    logging.getLogger("pipeline").addHandler(logging.NullHandler())
    try:
        _handle(parse(arguments))
    except BaseException as error:
        code = exit_code(error)
        if code is None:
            raise
        console.print(str(error) or "stopped" if code > 128 else f"error: {error}", markup=False)
        return code
    return 0


def _handle(words: Words) -> None:
    try:
        HANDLERS[words.verb](words)
    except NotBuilt as error:
        overrides = [*words.overrides, error.override] if error.override else words.overrides
        same = replace(words, overrides=overrides).same
        raise UsageError(f"{error}; build it with: python -m pipeline run {same}") from None


def _config(words: Words) -> tuple[Config, str]:
    """The checked config and the absolute root; `seed=` of `run` and `plan` is a plain override."""
    loaded = compose.load(words.required_conf(), words.overrides)
    root = storage.absolute(words.root)
    locate_store(root, loaded.tracking.uri)
    return loaded, root


def _run(words: Words) -> None:
    from pipeline.tracking import send_unsent

    loaded, root = _config(words)
    planned = run.planned_steps(loaded, root, words.selection)
    todo = [item for item in planned if item.state != "done"]
    if not todo:
        console.print(f"nothing to do: all {len(planned)} steps of conf={words.conf} are done in {root}", markup=False)
        if told := send_unsent(locate_store(root, loaded.tracking.uri), loaded.tracking.experiment):
            console.print(told, markup=False)
        _print_json(words, {"outcome": "nothing to do", "steps": [item.step.output for item in planned]})
        return
    summary = run.run(loaded, words.required_conf(), root, planned, _command())
    summary.next_command = _next_command(words, summary)
    show_summary(summary)
    _print_json(words, {"outcome": "done", "steps": [vars(step) for step in summary.steps]})


def _command() -> str:
    return "python -m pipeline " + " ".join(shlex.quote(word) for word in sys.argv[1:])


def _next_command(words: Words, summary: Summary) -> str:
    """What a person may want to do now, with the same conf, root and overrides."""
    if summary.metrics:
        return f'python -m pipeline sample {words.same} prompt="red heart" out=pictures'
    return f"python -m pipeline ui root={shlex.quote(words.root)}"


def _plan(words: Words) -> None:
    loaded, root = _config(words)
    planned = run.planned_steps(loaded, root, words.selection)
    costs = cost.estimates(planned, loaded)
    forgotten = names_of(requests(root))
    if not words.json:
        show_plan(planned, costs)
        if forgotten:
            console.print(f"left out of everything: {len(forgotten)} keys and URLs that this root was asked to forget")
    steps = [
        {
            "step": item.step.name,
            "artifact": item.step.output,
            "state": item.state,
            "reason": item.reason,
            "fingerprint": item.fingerprint.digest,
            "cost": estimate,
        }
        for item, estimate in zip(planned, costs, strict=True)
    ]
    _print_json(words, {"steps": steps, "forgotten": len(forgotten)})
    for sentence in obstacles.every(loaded, planned):
        console.print(f"a run would stop at once: {sentence}", style="yellow", markup=False)
    for sentence in cost.large_trainings(planned, loaded):
        console.print(sentence, style="yellow", markup=False)
    cost.check_memory(planned, loaded)


def _status(words: Words) -> None:
    from pipeline.reports import status

    status(storage.absolute(words.root), words.json)


def _show(words: Words) -> None:
    from pipeline.reports import show

    loaded, root = _config(words)
    show(loaded, root, words.own.get("artifact"), words.json)


def _show_config(words: Words) -> None:
    if words.rest == ["list"]:
        print("confs: " + ", ".join(compose.names()))
        for group, options in compose.groups().items():
            print(f"{group}: " + ", ".join(options))
        return
    if words.rest:
        raise UsageError(f"'{words.rest[0]}' is not key=value; config takes conf=NAME and overrides, or the word list")
    loaded, _ = _config(words)
    order(table(loaded), loaded.targets)  # refuses unknown ones
    print(compose.commented_yaml(words.required_conf(), words.overrides), end="")


def _sample(words: Words) -> None:
    from pipeline.sampling import check_overrides_of_release, sample, sample_release

    own = dict(words.own)
    run_seed, folder = own.pop("run_seed", None), own.pop("from", None)  # `seed=` is the picture's
    overrides = [*words.overrides, *([f"seed={run_seed}"] if run_seed is not None else [])]
    if folder is None:
        loaded, root = _config(replace(words, overrides=overrides))
        sample(loaded, root, own)
    else:
        overridden = {word.partition("=")[0] for word in words.overrides}
        check_overrides_of_release(overridden | ({"run_seed"} & words.own.keys()))
        loaded, _ = _config(words if words.conf else replace(words, conf="release"))
        sample_release(loaded, storage.absolute(folder), own, overridden)


def _export(words: Words) -> None:
    from pipeline.reports import export

    loaded, root = _config(words)
    export(loaded, root, words.own.get("out"))


def _import(words: Words) -> None:
    from pipeline.importing import bring, composed

    found, overrides = composed(words.required_conf(), words.overrides, words.own.get("from"))
    words = replace(words, overrides=overrides)
    loaded, root = _config(words)
    bring(loaded, words.required_conf(), root, found, words.same, _command())


def _weights(words: Words) -> None:
    from pipeline.weights import FOLDER, weights

    weights(words.rest, words.own.get("out", FOLDER), words.json)


def _report(words: Words) -> None:
    from pipeline.reports import hours

    if words.rest != ["hours"]:
        raise UsageError("report knows one table: python -m pipeline report hours")
    hours(storage.absolute(words.root), words.json)


def _data(words: Words) -> None:
    from pipeline import data

    if words.rest == ["forget"]:  # concerns all that lies under the root, whatever its config
        if words.conf or words.overrides:
            raise UsageError("data forget takes keys=, urls=, from=FILE and root=; it concerns every conf's pictures")
        data.forget(storage.absolute(words.root), words.own, words.json)
        return
    if words.own.keys() & {"keys", "urls", "from"}:
        raise UsageError("keys=, urls= and from= go with `data forget`")
    loaded, root = _config(words)
    match words.rest:
        case ["funnel"]:
            data.funnel(loaded, root, words.json)
        case ["verify"]:
            data.verify(loaded, root, words.json)
        case ["retry"]:
            data.retry(loaded, root, words, _command())
        case ["dedup"]:
            data.dedup(loaded, root, words, _command())
        case ["trace", key]:
            data.trace(loaded, root, key, words.json)
        case _:
            raise UsageError("data needs one of: funnel, verify, trace KEY, retry, dedup, forget")


def _gc(words: Words) -> None:
    from pipeline.garbage import collect

    collect(storage.absolute(words.root), words.own.get("days"), words.yes, words.json)


def _ui(words: Words) -> None:
    from pipeline.ui import serve_ui

    port = words.own.get("port", "5000")
    if not port.isdigit():
        raise UsageError(f"port={port}: not a number")
    uri = compose.load(words.conf, words.overrides).tracking.uri if words.conf else None
    store = locate_store(storage.absolute(words.root), uri)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must not outlive us
    with contextlib.suppress(KeyboardInterrupt), serve_ui(store, int(port)) as url:
        console.print(f"MLflow: {url} (Ctrl-C ends it)")
        threading.Event().wait()


def _doctor(words: Words) -> None:
    from pipeline.doctor import examine

    conf = words.required_conf() if words.conf or words.overrides else None
    examine(storage.absolute(words.root), words.json, conf, words.overrides)


def _print_json(words: Words, document: object) -> None:
    if words.json:
        print(json.dumps(document, indent=1, ensure_ascii=False))


HANDLERS: dict[str, Callable[[Words], None]] = {
    "run": _run,
    "plan": _plan,
    "status": _status,
    "show": _show,
    "config": _show_config,
    "sample": _sample,
    "export": _export,
    "import": _import,
    "weights": _weights,
    "report": _report,
    "data": _data,
    "gc": _gc,
    "ui": _ui,
    "doctor": _doctor,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
