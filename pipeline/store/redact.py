"""Taking secrets out of what is kept before anybody else gets to see it: configs, command lines, logs.

Hidden are the values of telling keys, passwords and signatures in URLs, and what a config takes from the environment.
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

SECRET = re.compile(
    r"(^|_)(token|secrets?|passwords?|passwd|passphrase|credentials?|(api|access|private|account)_?key)(_|$)"
)

SHORTEST = 6  # signs of a hidden value that is looked for within other texts
_from_environment: set[str] = set()

PASSWORD = re.compile(r"(?<=\w://)[^/\s@:]*:(?!\d+/)[^\s@]+@")  # a secret key may have slashes; a port has one after it


def hide(value: str) -> None:
    """From now on, leave out a value that the environment gives to a config. Numbers, URIs and paths are no secrets."""
    if value.strip() and not re.match(r"-?[\d.]+$|\w+://", value) and not os.path.exists(value):
        _from_environment.add(value)


def hidden() -> tuple[str, ...]:
    """What is hidden so far, for a process that works for this one: it is to be handed over, and never written."""
    return tuple(sorted(_from_environment))


def hide_all(values: Iterable[str]) -> None:
    """From now on, leave out what another process has hidden."""
    _from_environment.update(values)


def redact(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the values of telling keys, the passwords in URLs, URLs' queries (signatures), and hidden ones."""
    return {key: _redacted(value, _is_secret(key)) for key, value in config.items()}


def _is_secret(key: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-.]", "_", key)
    return bool(SECRET.search(words.lower()))


def _redacted(value: Any, secret: bool = False) -> Any:
    if isinstance(value, Mapping):
        return {key: _redacted(item, secret or _is_secret(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item, secret) for item in value]
    if secret and value is not None:
        return "***"
    return redact_line(value) if isinstance(value, str) else value


def redact_text(word: str) -> str:
    """A word of a command line without what `redact` would leave out."""
    key, separator, value = word.partition("=")
    return f"{key}=***" if separator and value and _is_secret(key) else redact_line(word)


def redact_line(text: str) -> str:
    """A text, such as a line of a log, without what `redact` would leave out of one."""
    for value in sorted(_from_environment, key=len, reverse=True):
        text = "***" if text == value else text.replace(value, "***") if len(value) >= SHORTEST else text
    return _without_urls(text)


def holds_password(value: Any) -> bool:
    """Whether a value, or one in it, has a URI with a password in it, such as `s3://KEY:SECRET@bucket`."""
    if isinstance(value, Mapping):
        return any(map(holds_password, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_password, value))
    return isinstance(value, str) and bool(PASSWORD.search(value))


def _without_urls(text: str) -> str:
    text = re.sub(r"(?<=://)[^/\s@]+@", "***@", PASSWORD.sub("***@", text))
    return re.sub(r"(\w://[^\s?#]*)\?[^\s#]+", r"\1?***", text)
