"""What verbs share: the checked config and root that their words mean, and JSON on stdout."""

import shlex
import sys

from datasets.files import storage
from pipeline import terminal
from pipeline.plan import rivals
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.settings.words import Words
from pipeline.tracking.mlflow_store import locate_store


def configured(words: Words) -> tuple[Config, str]:
    """The checked config and the absolute root; `seed=` of `run` and `plan` is a plain override."""
    loaded = compose.load(words.required_conf(), words.overrides)
    root = storage.absolute(words.root)
    return rivals.with_runs(loaded, root), root


def configured_run(words: Words) -> tuple[Config, str]:
    """The same of what MLflow hears of: a run, or what tells of one beforehand.

    Raises:
        UsageError: `tracking.uri` and the root name no place for MLflow; before a remote root is asked anything.
    """
    tracking = compose.load(words.required_conf(), words.overrides).tracking
    locate_store(storage.absolute(words.root), tracking.uri)
    return configured(words)


def command() -> str:
    return "python -m pipeline " + " ".join(shlex.quote(word) for word in sys.argv[1:])


def print_json(words: Words, document: object) -> None:
    if words.json:
        terminal.print_json(document)
