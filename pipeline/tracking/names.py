"""What runs are called in MLflow, and their parameters: what somebody typed, so that they know it again."""

import json
import shlex
from collections.abc import Collection, Mapping
from typing import Any

from pipeline.settings.keys import flatten
from pipeline.settings.words import WITH_VALUE
from pipeline.store.redact import redact

ELSEWHERE = ("root", "conf", "scale", "cluster", "tracking", "workers", "budget")  # or of no matter for the result
# First sections of a run's page. MLflow sorts them by code points, capitals first, and once more of them come, by
# letters alone: numbers come first in both.
LOSS, PICTURES = "1 Loss", "2 Pictures"
FIRST = {"loss": "", "validation_loss": " validation", "validation_loss_ema": " validation of the average"}
LONGEST = 200  # signs of a name; MLflow's column takes 250, which Postgres holds to
DIGITS = 4  # of an id or fingerprint, which tell runs of one name apart


def typed(command: str) -> dict[str, str]:
    """The words `key=value` of a command line, and its flags with their values."""
    words, found = iter(shlex.split(command)), dict[str, str]()
    for word in words:
        key, equals, value = word.partition("=")
        if key in WITH_VALUE:  # as often as it is given
            name = key.lstrip("-")
            found[name] = " ".join([*filter(None, [found.get(name)]), value if equals else next(words, "")])
        elif equals:
            found[key.lstrip("+-")] = value
    return {key: str(value) for key, value in redact(found).items() if key != "root"}


def of_command(conf: str, command: str, invocation: str) -> str:
    """Such as `learning_rate=2e-4 · stage_c micro · 3fa2`, the words cut short where they are many."""
    said = typed(command)
    keys = [key for key in said if key.partition(".")[0] not in ELSEWHERE]
    changed = [f"{_short(key, keys)}={said[key]}" for key in keys]
    what = " ".join([conf, *([said["scale"]] if "scale" in said else [])])
    end = f" · {what} · {invocation[-DIGITS:]}"
    return _cut(" ".join(changed), LONGEST - len(end)) + end if changed else end.removeprefix(" · ")


def _short(key: str, others: Collection[str]) -> str:
    """The shortest end of a dotted key that no other one has."""
    parts = key.split(".")
    ends = (".".join(parts[-length:]) for length in range(1, len(parts)))
    return next((end for end in ends if sum(f".{one}".endswith(f".{end}") for one in others) == 1), key)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def of_step(name: str, fingerprint: str) -> str:
    """Such as `train_c · 6e3b`."""
    end = f" · {fingerprint[:DIGITS]}"
    return _cut(name, LONGEST - len(end)) + end


def seen_first(values: Mapping[str, float]) -> dict[str, float]:
    """A training's losses once more, in the first section of its run's page: `1 Loss/stage_c` is `stage_c/loss`."""
    split = ((name.partition("/"), value) for name, value in values.items())
    return {f"{LOSS}/{training}{FIRST[what]}": value for (training, _, what), value in split if what in FIRST}


def of_picture(name: str) -> str:
    """A picture's name, in the section of the pictures; else MLflow puts it behind all figures."""
    return f"{PICTURES}/{name}"


def plain(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as parameters, by dotted key: texts as they are, else as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in flatten(dict(settings)).items()
    }
