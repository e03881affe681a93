"""URLs of pictures: the spelling that keys are made of, and which of them mean the same."""

import re
from collections.abc import Iterable
from urllib.parse import quote, urlsplit, urlunsplit

_DEFAULT_PORTS = {"http": 80, "https": 443}
_URL_CHARACTERS = "/%:@!$&'()*+,;=~-._?"  # what `quote` leaves alone: reserved characters, existing escapes
_ESCAPE = re.compile("%[0-9a-fA-F]{2}")
ODD = r"%|/\.|\.[/:]|\.$"  # somewhere in every URL that `equal` spells otherwise, as a regular expression


def normalised_url(url: str) -> str:
    """A URL in the spelling that keys are made of: scheme and host in lower case, no fragment, all escaped.

    Raises:
        ValueError: no http(s) URL with a host, or one that carries a password, or escapes, which hide another host.
    """
    parts = urlsplit(url.strip())
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname or not {"@", "%"}.isdisjoint(parts.netloc):
        raise ValueError(f"{url!r} is no http(s) URL of a public file")
    host = parts.hostname.encode("idna").decode() if ":" not in parts.hostname else f"[{parts.hostname}]"
    port = f":{parts.port}" if parts.port not in (None, _DEFAULT_PORTS[parts.scheme]) else ""
    path, query = (quote(part, safe=_URL_CHARACTERS) for part in (parts.path or "/", parts.query))
    return urlunsplit((parts.scheme, host + port, path, query, ""))


def with_equals(names: Iterable[str]) -> frozenset[str]:
    """Keys and normalised URLs, and of each URL the spelling by which `equal` tells those that mean the same."""
    return frozenset(spelling for name in names for spelling in (name, equal(name)))


def equal(url: str) -> str:
    """One name for all normalised URLs that mean the same to every server (RFC 3986, 6.2.2): escapes in capitals, and
    only where there have to be some, no dot segments, no dot at the end of the host.

    Keys are made of a URL as `normalised_url` has it; whether a picture is one that is not wanted goes by this.
    """
    if not re.search(ODD, url):
        return url
    scheme, host, path, query, _ = urlsplit(_ESCAPE.sub(_escape, url))
    return urlunsplit((scheme, re.sub(r"\.(?=:|$)", "", host), _without_dots(path), query, ""))


def _without_dots(path: str) -> str:
    """A path without its segments `.` and `..` (RFC 3986, 5.2.4)."""
    kept: list[str] = []
    for segment in path.split("/"):
        if segment == ".." and len(kept) > 1:
            kept.pop()
        elif segment not in (".", ".."):
            kept.append(segment)
    in_a_folder = [""] if path.endswith(("/.", "/..")) else []
    return "/".join([*kept, *in_a_folder])


def _escape(found: re.Match[str]) -> str:
    sign = chr(int(found[0][1:], 16))
    return sign if re.fullmatch("[A-Za-z0-9._~-]", sign) else found[0].upper()
