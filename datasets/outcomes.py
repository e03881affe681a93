"""What can become of a planned picture: stored, or lost for one of the causes below."""

from enum import StrEnum


class Outcome(StrEnum):
    """The end of a planned row; each row has exactly one."""

    OK = "ok"
    FORGOTTEN = "forgotten"  # on the root's removal list: not asked for, or taken out later
    # no answer
    FORBIDDEN = "forbidden"  # the host has no public address
    DNS = "dns"
    CONNECTION = "connection"
    TLS = "tls"
    TIMEOUT = "timeout"
    # an answer without a picture
    GONE = "gone"  # 404, 410
    DENIED = "denied"  # 401, 403, 451
    THROTTLED = "throttled"  # 429
    SERVER_ERROR = "server_error"  # 5xx
    HTTP_ERROR = "http_error"  # another status, or no HTTP at all
    TRUNCATED = "truncated"  # fewer bytes than announced
    TOO_BIG = "too_big"  # more bytes than allowed
    OPTED_OUT = "opted_out"  # X-Robots-Tag or TDM-Reservation forbids the use for training
    # a body that we do not keep
    NOT_AN_IMAGE = "not_an_image"  # none of the formats that we read
    BROKEN_IMAGE = "broken_image"  # begins as one of them, and cannot be decoded to its end
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_SMALL = "too_small"  # shorter side below the stored size
    WRONG_ASPECT = "wrong_aspect"  # not what the metadata says, so in a wrong bucket


PASSING = frozenset(
    {
        Outcome.DNS,
        Outcome.CONNECTION,
        Outcome.TIMEOUT,
        Outcome.THROTTLED,
        Outcome.SERVER_ERROR,
        Outcome.TRUNCATED,
    }
)
"""Causes that may be gone at the next try."""


class Lost(Exception):
    """A picture is lost. The text is `<outcome>: <detail>`: img2dataset passes on nothing but the text."""

    def __init__(self, outcome: Outcome, detail: str):
        super().__init__(f"{outcome}: {detail}")
        self.outcome = outcome
