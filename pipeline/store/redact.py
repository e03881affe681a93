"""Taking secrets out of what others get to see: sentences, logs, configs, command lines, what MLflow is told.

Hidden are the values of telling keys, passwords and signatures in URLs, and what a config takes from the environment.
Whatever leaves a process as words goes through here at its door: both consoles, tracebacks, logs, records, manifests,
MLflow, reports. JSON on stdout is exact: it is made of what is kept, or of rows of the data.
"""

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

SECRET = re.compile(
    r"(^|_)(token|secrets?|passwords?|passwd|passphrase|credentials?|authorization|signature|sig"
    r"|(api|access|private|account)_?key|(?<=_)pwd)(?!_name$)(_|$)"  # but for what a secret is called
)

SHORTEST = 6  # signs of a hidden value that is looked for within other texts
_from_environment: set[str] = set()

# A secret key may have slashes; a port has one after it
PASSWORD = re.compile(r"(?<=\w://)(?!\[)[^/\s@:]{0,99}:(?!\d+/)[^\s@]{1,999}@")
USER = re.compile(r'(?<=\w://)[^/\s?#"]*@')  # up to the last @: passwords have some too
QUERY = re.compile(r'(\w://[^\s?#"]{0,4000})\?[^\s#"]+')
# The same within other URLs, escaped once or more often, and keys that tell it of their values
ESCAPED_USER = re.compile(r"((?:%(?:25)*2F){2})(?:(?!%(?:25)*2F)[^/\s])*(%(?:25)*40)", re.IGNORECASE)
GIVEN = re.compile(
    r"""(?<![\w.-])(?:(?<=%)(?:25)*(?:3F|26))?([\w.-]{1,99})(?:=|%(?:25)*3D|["']\s*:\s*(?=["']))""", re.IGNORECASE
)
# Up to a space, or what begins another one: a value may have commas and ampersands in it
VALUE = re.compile(
    r"""(?:"[^"\n]*"|'[^'\n]*'"""
    r"""|(?:(?![,;](?:\s|$)|(?:&|%(?:25)*26)[\w.-]*(?:=|%(?:25)*3D))[^\s"'<>])*)""",
    re.IGNORECASE,
)
BEARER = re.compile(r"""\b(authorization["']?\s*[:=]\s*["']?(?:bearer|basic|token)\s+)[^\s"']+""", re.IGNORECASE)


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
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[-.]", "_", key)
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


def redact_command(command: str) -> str:
    """A command line, quoted for a shell, without what `redact` would leave out of its words."""
    return shlex.join(redact_text(word) for word in shlex.split(command))


def redact_line(text: str) -> str:
    """A text, such as a sentence or a line of a log, without what `redact` would leave out of one."""
    for value in sorted(_from_environment, key=len, reverse=True):
        text = "***" if text == value else text.replace(value, "***") if len(value) >= SHORTEST else text
    return _without_urls(text)


def redact_path(path: str) -> str:
    """A path, or a URI without user, password and query; whatever else its names hold is the path's own.

    In S3's URIs a question mark is a sign of a name: what follows it tells who reads which artifact.
    """
    known = _without_users(path)
    return known if known.lower().startswith("s3://") else QUERY.sub(r"\1?***", known)


def holds_password(value: Any) -> bool:
    """Whether a value, or one in it, has a URI with a password in it, such as `s3://KEY:SECRET@bucket`."""
    if isinstance(value, Mapping):
        return any(map(holds_password, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_password, value))
    return isinstance(value, str) and bool(PASSWORD.search(value))


def _without_users(text: str) -> str:
    for pattern in (PASSWORD, USER):
        text = pattern.sub("***@", text)
    return text


def _without_urls(text: str) -> str:
    text = QUERY.sub(r"\1?***", _without_users(text))
    text = BEARER.sub(r"\1***", ESCAPED_USER.sub(r"\1***\2", text))
    kept, end = [], 0
    for key in GIVEN.finditer(text):
        if key.start() >= end and _is_secret(key[1]) and (value := VALUE.match(text, key.end())) and value[0]:
            kept.append(f"{text[end : key.end()]}***")
            end = value.end()
    return "".join([*kept, text[end:]])
