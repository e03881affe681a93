"""`python -m pipeline VERB conf=NAME [key=value ...] [flags]`: parse, dispatch, end with the documented exit code."""

import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # while libraries are imported it is no error of theirs
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # closed by who started us: what is opened next would be written into
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115

import importlib
import logging
import threading
import traceback
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if not all(map(find_spec, ("pyarrow", "pydantic", "hydra"))):
    sys.exit("error: this Python lacks the packages: run `make setup`, then `source .venv/bin/activate`")

from datasets.files import local, notices, storage
from pipeline import __version__
from pipeline.environment import name_and_home
from pipeline.errors import BudgetExceeded, NotBuilt, UsageError, as_told, exit_code
from pipeline.settings.words import Words, parse, usage
from pipeline.store.redact import redact_line
from pipeline.terminal import Notices, console, escape_what_cannot_be_shown

HANDLERS = {  # verb: the module of `pipeline.verbs` whose `handle(words)` does it
    "run": "run",
    "plan": "plan",
    "status": "status",
    "logs": "logs",
    "show": "show",
    "config": "config",
    "sample": "sample",
    "export": "export",
    "import": "importing",
    "weights": "weights",
    "report": "report.command",
    "study": "study.verb",
    "data": "data.command",
    "gc": "gc",
    "ui": "ui",
    "doctor": "doctor.examine",
    "infra": "infra.render",
}
_stopped: list[bool] = []
SAVED = 6  # the budget is used up, which is no error
NO_READER = 128 + signal.SIGPIPE  # what stdout went to has ended, as `head` does


def main(arguments: list[str]) -> int:
    """Run one command; returns its exit code."""
    escape_what_cannot_be_shown()
    name_and_home()
    logging.getLogger("pipeline").addHandler(logging.NullHandler())
    told = Notices()
    try:
        with notices.heard_by(told):
            _do(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        _let_go_of_stdout()
        return NO_READER
    except BaseException as caught:
        _let_go_of_stdout()
        error = KeyboardInterrupt() if _stopped else as_told(caught)
        code = exit_code(error)
        if code is None:
            raise
        console.print(str(error) or "stopped" if code > 128 or code == SAVED else f"error: {error}", markup=False)
        return code
    finally:
        told.say_what_was_passed_over()
    return 0


def _let_go_of_stdout() -> None:
    """What it cannot take any more goes nowhere; else the interpreter would try once more, and fail, at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_traceback(*error: Any) -> None:
    """Of a programming error, on stderr: without secrets, as all that is said there."""
    sys.stderr.write(redact_line("".join(traceback.format_exception(*error))))


def _stop(*_: object) -> None:
    """On Ctrl-C. Libraries may make another error of it."""
    _stopped.append(True)
    raise KeyboardInterrupt


def _do(arguments: list[str]) -> None:
    if not arguments or arguments[0] == "help" or {"-h", "--help"}.intersection(arguments):
        print(usage())
    elif arguments[0] == "--version":
        print(__version__)
    else:
        _handle(parse(arguments))


def _handle(words: Words) -> None:
    try:
        Path.cwd()
    except FileNotFoundError:  # paths are relative to it, and libraries ask for it
        raise UsageError("the folder that this was started in is gone; change to one that is there") from None
    if not storage.is_remote(words.root):
        local.share_as(Path(storage.absolute(words.root)))
    try:
        importlib.import_module(f"pipeline.verbs.{HANDLERS[words.verb]}").handle(words)
    except NotBuilt as error:
        raise UsageError(f"{error}; build it with: {_run(words, error.override)}") from None
    except BudgetExceeded as error:
        ways = "".join(f"; {remedy}: {_run(words, override)}" for remedy, override in error.ways)
        raise BudgetExceeded(f"{error}{ways}") from None


def _run(words: Words, override: str | None) -> str:
    """The command of a run with the same words, and an override more; of the steps that the flags leave in, too."""
    overrides = [*words.overrides, override] if override else words.overrides
    bounds = "".join(f" {flag} {step}" for flag, step in words.selection.bounds.items())
    return f"python -m pipeline run {replace(words, overrides=overrides).same}{bounds}"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _stop)
    sys.excepthook = _show_traceback
    threading.excepthook = lambda told: _show_traceback(told.exc_type, told.exc_value, told.exc_traceback)
    sys.exit(main(sys.argv[1:]))
