"""Taking secrets out of a config before anybody else gets to see it."""

import re
from collections.abc import Mapping
from typing import Any

SECRET = re.compile(
    r"(^|_)(token|secrets?|passwords?|passwd|passphrase|credentials?|(api|access|private|account)_?key)(_|$)"
)

PASSWORD = re.compile(r"(?<=\w://)[^/\s@:]*:(?!\d+/)[^\s@]+@")  # a secret key may have slashes; a port has one after it


def redact(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the values of telling keys, the passwords in URLs, and URLs' queries (signatures)."""
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
    return _without_urls(value) if isinstance(value, str) else value


def redact_text(word: str) -> str:
    """A word of a command line, or a sentence, without what `redact` would leave out."""
    key, separator, value = word.partition("=")
    return f"{key}=***" if separator and value and _is_secret(key) else _without_urls(word)


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
