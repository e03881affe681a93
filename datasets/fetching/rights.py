"""What a server says of the use of a picture: the headers X-Robots-Tag and TDM-Reservation, by their specifications.

X-Robots-Tag is a list of directives, some with a value: `noai, max-image-preview:large`. A name with a colon before a
directive says for whom that and all that follow are meant, up to the next such name: `otherbot: noindex, ours: noai`.
Values may hold colons and commas, as dates do. TDM-Reservation (W3C, TDMRep) is 1 where the right is reserved.
"""

import re
from collections.abc import Iterator, Set
from email.message import Message
from itertools import pairwise

OPT_OUTS = ["noai", "noimageai", "noindex", "noimageindex", "none"]  # `none` is noindex and nofollow
_WITH_VALUE = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
_DIRECTIVES = {
    *OPT_OUTS, *_WITH_VALUE, "all", "index", "follow", "nofollow", "archive", "noarchive", "cache", "nocache",
    "snippet", "nosnippet", "notranslate", "nositelinkssearchbox", "indexifembedded", "noodp", "noydir", "noyaca",
    "noml", "nopagereadaloud", "noimagepreview",
}  # fmt: skip
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_SEPARATORS = re.compile("[,;]")  # the second is in no specification; nor are blanks and quotes alone
_QUOTES = re.compile("[\"']")
_WORD = re.compile(r"""([\s,;"']*)([^\s,;:"']+)\s*(:?)""")  # commas or semicolons, blanks and quotes stand between
_AGENT = re.compile(rf"(?!\d{{1,4}}\b)({_TOKEN}+)(/\S*)?")  # a product's name (RFC 9110); no part of a date
_ROBOT = re.compile("bot|spider|crawl")
_EVERYBODY = {"*", "all"}  # the second is in no specification, before a colon


def products_of(user_agent: str) -> frozenset[str]:
    """The names (lower case) by which servers may call who introduces himself so.

    `product/1.0 (contact)` is `product`, `Mozilla/5.0 (compatible; ours/1.0)` is `ours` too.
    """
    first = re.split(r"[/\s(]", user_agent.strip(), maxsplit=1)[0]
    return frozenset(name.lower() for name in (first, *re.findall(rf"({_TOKEN}+)/\d", user_agent)))


def reservation(headers: Message, products: Set[str]) -> str | None:
    """The words of an answer's headers that forbid `products` (`products_of`) the use for training; None: none do."""
    for line in headers.get_all("X-Robots-Tag", ()):
        for agent, directive in _directives(line, products):
            if (agent is None or agent in products) and directive in OPT_OUTS:
                return f"X-Robots-Tag: {directive}"
    lines = (_QUOTES.sub("", line) for line in headers.get_all("TDM-Reservation", ()))
    values = (value.strip() for line in lines for value in _SEPARATORS.split(line))
    return "TDM-Reservation: 1" if "1" in values else None


def _directives(line: str, products: Set[str]) -> Iterator[tuple[str | None, str]]:
    """Each word of a header with whom it is meant for (None: everybody), in lower case.

    Of a value the first word is left out, which may be `none`; a date's others are among them, and are no directives.
    """
    agent, before = None, ""
    words = [(bool(_SEPARATORS.search(found[1])), found[2], bool(found[3])) for found in _WORD.finditer(line.lower())]
    for (apart, word, named), (_, following, _) in pairwise((*words, (False, "", False))):
        if named and word in _EVERYBODY:
            agent = None
        elif named and (called := _agent(word, following, products)):
            agent = called
        elif apart or before not in _WITH_VALUE:
            yield agent, word
        before = word if named else ""


def _agent(name: str, following: str, products: Set[str]) -> str | None:
    """Whom the word before a colon names; None where it is a directive, or part of a date.

    A word that nobody knows, before another that nobody knows, is taken for a directive: what comes after it then still
    counts for everybody.
    """
    match = _AGENT.fullmatch(name)
    if not match or name in _DIRECTIVES:
        return None
    named = match[1] in products or _ROBOT.search(name) or not following or following in _DIRECTIVES
    return match[1] if named else None
