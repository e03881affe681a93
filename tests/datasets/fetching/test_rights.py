"""Headers by which servers keep their pictures from trainings: parsed by their grammar, all directives and agents."""

import random
from email.message import Message

import pytest

from datasets.fetching import rights

US = "wuerstchen-pipeline"
OTHERS = ("googlebot", "GoogleBot", "otherbot", "BadBot", "80legs", "Wuerstchen", "wuerstchen-pipeline-2", "Bingbot")
OURS = (US, US.upper(), "Wuerstchen-Pipeline", f"{US}/0.1", "*")
OPEN = ("all", "nofollow", "noarchive", "nosnippet", "notranslate", "nositelinkssearchbox", "indexifembedded")
DATES = (
    "Saturday, 25 Jun 2027 15:00:00 GMT", "25 Jun 2010 15:00:00 PST", "2027-06-25T15:00:00+00:00", "2027-06-25",
    "Sat, 25-Jun-2027 15:00:00 GMT", "Saturday, 25-Jun-27 15:00:00 GMT", "Sat Jun 25 15:00:00 2027",
)  # fmt: skip


def headers(*tags: str, reservations: tuple[str, ...] = ()) -> Message:
    message = Message()
    for tag in tags:
        message["X-Robots-Tag"] = tag
    for reserved in reservations:
        message["TDM-Reservation"] = reserved
    return message


def forbidden(*tags: str, **others: tuple[str, ...]) -> bool:
    return rights.reservation(headers(*tags, **others), {US}) is not None


class Grammar:
    """Headers drawn from the grammar, with what is known of them."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def space(self) -> str:
        return self.random.choice(("", "", " ", "  ", "\t"))

    def cased(self, word: str) -> str:
        return self.random.choice((word, word, word.upper(), word.title()))

    def directive(self) -> tuple[str, bool]:
        """A directive, and whether it forbids the use."""
        kind = self.random.randrange(4)
        if kind == 0:
            return self.cased(self.random.choice(rights.OPT_OUTS)), True
        if kind == 1:
            return self.cased(self.random.choice(OPEN)), False
        name, value = self.random.choice(
            [("max-snippet", "-1"), ("max-image-preview", "none"), ("max-image-preview", "large"),
             ("max-video-preview", "0"), *(("unavailable_after", date) for date in DATES)]
        )  # fmt: skip
        return f"{self.cased(name)}{self.space()}:{self.space()}{value}", False

    def line(self) -> tuple[str, bool]:
        """A header, and whether it forbids us the use."""
        parts, reserved = [], False
        for section in range(self.random.randint(1, 3)):
            ours, named = True, ""
            if section or self.random.random() < 0.5:
                ours = self.random.random() < 0.5
                agent = self.random.choice(OURS if ours else OTHERS)
                named = f"{agent}{self.space()}:{self.space()}"
            for place in range(self.random.randint(1, 3)):
                text, forbids = self.directive()
                parts.append(f"{self.space()}{'' if place else named}{text}{self.space()}")
                reserved = reserved or (ours and forbids)
        return self.random.choice((",", " ")).join(parts), reserved

    def header(self) -> tuple[list[str], bool]:
        lines = [self.line() for _ in range(self.random.randint(1, 2))]
        return [text for text, _ in lines], any(reserved for _, reserved in lines)


def test_of_many_headers_none_is_ignored_and_none_falsely_obeyed():
    ignored, obeyed, kinds = [], [], set()
    for seed in range(2000):
        lines, reserved = Grammar(seed).header()
        kinds.add(reserved)
        if forbidden(*lines) != reserved:
            (ignored if reserved else obeyed).append(lines)
    assert (ignored, obeyed) == ([], [])
    assert kinds == {True, False}


def test_a_reservation_of_many_spellings_is_one():
    wrong = []
    for seed in range(500):
        grammar = Grammar(seed)
        values = [grammar.random.choice("0001") for _ in range(grammar.random.randint(1, 3))]
        padded = [f"{grammar.space()}{value}{grammar.space()}" for value in values]
        lines = tuple(padded) if seed % 2 else (",".join(padded),)
        if forbidden(reservations=lines) != ("1" in values):
            wrong.append(lines)
    assert wrong == []


@pytest.mark.parametrize(
    "tag",
    [
        "max-image-preview:large, noai",
        "max-snippet:-1, noai",
        "unavailable_after: Saturday, 25 Jun 2027 15:00:00 GMT, noai",
        "none",
        "googlebot: nofollow, wuerstchen-pipeline: noai",
        "wuerstchen-pipeline : noai",
        "max-something-new: 3, noai",  # which nobody knows, but no robot's name
        "googlebot:, noarchive, wuerstchen-pipeline:, noai",
        "somebot: nofollow, wuerstchen-pipeline: something-new, noindex",
        "noai; noimageai",  # as no specification has it, and many a server
        "nofollow;noai",
        "nofollow noai",
        '"noai"',
        "noai:",
        "all: noai",
        "googlebot: noai, wuerstchen-pipeline: nofollow noindex",
        "max-snippet:-1 noai",
        "max-snippet:, noai",
        "unavailable_after:; noai",
        "max-image-preview:large noai",
        "max-snippet:-1, max-image-preview:large noimageai",
        "unavailable_after: 25 Jun 2010 15:00:00 PST noai",
        "wuerstchen-pipeline: max-snippet:-1 noai",
        "*: max-image-preview:none noai",
        "googlebot: nofollow, all: noai",
        "googlebot: nofollow wuerstchen-pipeline: noai",
    ],
)
def test_forbidden(tag):
    assert forbidden(tag)


@pytest.mark.parametrize(
    "tag",
    [
        "",
        "all",
        "googlebot: noai",
        "googlebot: nofollow, noai",
        "max-image-preview: none",
        "googlebot: unavailable_after: Saturday, 25 Jun 2027 15:00:00 GMT, noai",
        "noai-not-really",
        "foobot: something-new, noai",
        "foobot: nofollow noai",
        "foobot: max-snippet:-1 noai",
        "max-snippet: 5 foobot: noai",
        "max-image-preview:none nofollow",
        "max-image-preview: 'none'",
    ],
)
def test_not_forbidden(tag):
    assert not forbidden(tag)


@pytest.mark.parametrize("value", ["1", " 1 ", '"1"', "1;policy=x", "0, 1", "\r\n 1", "1\xa0"])
def test_a_reservation(value):
    assert forbidden(reservations=(value,))


@pytest.mark.parametrize("value", ["", "0", "10", "1x", "true"])
def test_no_reservation(value):
    assert not forbidden(reservations=(value,))


@pytest.mark.parametrize(
    ("user_agent", "products"),
    [
        ("Wuerstchen/0.1 (a@b.invalid)", {"wuerstchen"}),
        ("Crawler (we@x.invalid)", {"crawler"}),
        ("bench", {"bench"}),
        ("Mozilla/5.0 (compatible; OurBot/2; we@x.invalid)", {"mozilla", "ourbot"}),
    ],
)
def test_we_are_called_by_the_names_that_we_give(user_agent, products):
    assert rights.products_of(user_agent) == products
    for name in products:
        assert rights.reservation(headers(f"otherbot: all, {name}: noai"), rights.products_of(user_agent))
