"""What runs are called in MLflow, and their parameters: what somebody typed, so that they know it again."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from pipeline.settings.keys import flatten
from pipeline.store.redact import redact

ELSEWHERE = ("root", "conf", "scale", "cluster", "tracking", "workers", "budget")  # or of no matter for the result
DIGITS = 4  # of an id or fingerprint, which tell runs of one name apart


def typed(command: str) -> dict[str, str]:
    """The words `key=value` of a command line, and its flags with their values."""
    words, found = shlex.split(command), {}
    for word, following in zip(words, [*words, ""][1:], strict=True):
        key, equals, value = word.partition("=")
        if equals:
            found[key.lstrip("+-")] = value
        elif word.startswith("--") and following and "=" not in following:
            found[word.lstrip("-")] = following
    return {key: str(value) for key, value in redact(found).items() if key != "root"}


def of_command(conf: str, command: str, invocation: str) -> str:
    """Such as `learning_rate=2e-4 · stage_c micro · 3fa2`."""
    said = typed(command)
    changed = [
        f"{key.rpartition('.')[2]}={value}" for key, value in said.items() if key.partition(".")[0] not in ELSEWHERE
    ]
    what = " ".join([conf, *([said["scale"]] if "scale" in said else [])])
    return " · ".join([*([" ".join(changed)] if changed else []), what, invocation[-DIGITS:]])


def of_step(name: str, fingerprint: str) -> str:
    """Such as `train_c · 6e3b`."""
    return f"{name} · {fingerprint[:DIGITS]}"


def plain(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as parameters, by dotted key: texts as they are, else as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in flatten(dict(settings)).items()
    }
