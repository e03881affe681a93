"""What a server says of the use of a picture: the headers X-Robots-Tag and TDM-Reservation, by their specifications.

X-Robots-Tag is a list of directives, some with a value: `noai, max-image-preview:large`. A name with a colon before a
directive says for whom that and all that follow are meant, up to the next such name: `otherbot: noindex, ours: noai`.
Values may hold colons and commas, as dates do. TDM-Reservation (W3C, TDMRep) is 1 where the right is reserved.
"""

import re
from collections.abc import Iterator
from email.message import Message

OPT_OUTS = ["noai", "noimageai", "noindex", "noimageindex", "none"]  # `none` is noindex and nofollow
_WITH_VALUE = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
_DIRECTIVES = {
    *OPT_OUTS, *_WITH_VALUE, "all", "index", "follow", "nofollow", "archive", "noarchive", "cache", "nocache",
    "snippet", "nosnippet", "notranslate", "nositelinkssearchbox", "indexifembedded", "noodp", "noydir", "noyaca",
    "noml", "nopagereadaloud", "noimagepreview",
}  # fmt: skip
_AGENT = re.compile(r"(?!\d{1,4}\b)([!#$%&'*+.^_`|~0-9a-z-]+)(/\S*)?")  # a product's name (RFC 9110); no part of a date
_ROBOT = re.compile("bot|spider|crawl")
_EVERYBODY = "*"


def product_of(user_agent: str) -> str:
    """The name by which servers call who introduces himself so: `product/1.0 (contact)` is `product`."""
    return re.split(r"[/\s(]", user_agent.strip(), maxsplit=1)[0].lower()


def reservation(headers: Message, product: str) -> str | None:
    """The words of an answer's headers that forbid `product` (lower case) the use for training; None: none do."""
    for line in headers.get_all("X-Robots-Tag", ()):
        for agent, directive in _directives(line, product):
            if agent in (None, _EVERYBODY, product) and directive in OPT_OUTS:
                return f"X-Robots-Tag: {directive}"
    reserved = (value.strip() for line in headers.get_all("TDM-Reservation", ()) for value in line.split(","))
    return "TDM-Reservation: 1" if "1" in reserved else None


def _directives(line: str, product: str) -> Iterator[tuple[str | None, str]]:
    """Each directive of a header with whom it is meant for (None: everybody), in lower case, without its value."""
    agent = None
    for part in line.lower().split(","):
        name, colon, rest = (piece.strip() for piece in part.partition(":"))
        while colon and (named := _agent(name, rest, product)):
            agent = named
            name, colon, rest = (piece.strip() for piece in rest.partition(":"))
        yield agent, name


def _agent(name: str, rest: str, product: str) -> str | None:
    """Whom the word before a colon names; None where it is a directive with a value, or part of a date.

    A word that nobody knows, before another that nobody knows, is taken for a directive: what comes after it then still
    counts for everybody.
    """
    match = _AGENT.fullmatch(name)
    if not match or name in _WITH_VALUE:
        return None
    following = rest.partition(":")[0].strip()
    named = match[1] == product or _ROBOT.search(name) or not following or following in _DIRECTIVES
    return match[1] if named else None
