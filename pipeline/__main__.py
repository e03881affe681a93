"""`python -m pipeline VERB conf=NAME [key=value ...] [flags]`: parse, dispatch, end with the documented exit code."""

import importlib
import logging
import sys
from dataclasses import replace
from importlib.util import find_spec

if not all(map(find_spec, ("pyarrow", "pydantic", "hydra"))):
    sys.exit("error: this Python lacks the packages: run `make setup`, then `source .venv/bin/activate`")

from pipeline import __version__
from pipeline.errors import NotBuilt, UsageError, exit_code
from pipeline.settings.words import Words, parse, usage
from pipeline.terminal import console

HANDLERS = {  # verb: the module of `pipeline.verbs` whose `handle(words)` does it
    "run": "run",
    "plan": "plan",
    "status": "status",
    "show": "show",
    "config": "config",
    "sample": "sample",
    "export": "export",
    "import": "importing",
    "weights": "weights",
    "report": "report",
    "data": "data",
    "gc": "gc",
    "ui": "ui",
    "doctor": "doctor.examine",
}


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
        importlib.import_module(f"pipeline.verbs.{HANDLERS[words.verb]}").handle(words)
    except NotBuilt as error:
        overrides = [*words.overrides, error.override] if error.override else words.overrides
        same = replace(words, overrides=overrides).same
        raise UsageError(f"{error}; build it with: python -m pipeline run {same}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
