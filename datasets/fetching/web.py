"""One HTTP request as a download makes it: public addresses only, limits on everything, a cause for every failure.

img2dataset fetches with `urllib.request.urlopen`, which asks the opener that the process has installed. Ours knows http
and https and nothing else: with the standard one, a list of URLs could name `file:///etc/passwd`. It resolves a name,
checks the addresses, and connects to those that it has checked, for every redirect anew: a name server that answers
differently the second time gains nothing. A host that has enough is asked again in its own pace (`pace`).
"""

import contextlib
import email.utils
import http.client
import io
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from email.message import Message
from functools import partial
from typing import Any
from urllib.parse import urlsplit
from urllib.response import addinfourl

from datasets.addresses import Allowed, is_public
from datasets.config import DownloadConfig
from datasets.fetching import rights
from datasets.fetching.connections import Connection, TlsConnection, certificates
from datasets.fetching.names import Names, Place
from datasets.fetching.pace import Heard, HostSlots, Pace, Patience
from datasets.outcomes import Lost, Outcome
from datasets.sources.loopback import Hosts

__all__ = ["HostSlots", "Opener", "installed", "outcome_of"]

CHUNK = 1 << 16
MAX_REDIRECTS = 5
MAX_TRIES = 10  # of a URL, where its host has enough
PACKED = {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}  # zlib's names of the formats that a coding may mean
PIECE = 1 << 12  # bytes that are unpacked at a time
GZIP = b"\x1f\x8b"  # the start of a part; there may be several, one after the other (RFC 1952, 2.2)
_STATUS = {401: Outcome.DENIED, 403: Outcome.DENIED, 404: Outcome.GONE, 410: Outcome.GONE}
_STATUS |= {429: Outcome.THROTTLED, 451: Outcome.DENIED}
_STATUS |= {408: Outcome.TIMEOUT, 425: Outcome.SERVER_ERROR}  # as the server's own, these pass
_ENOUGH = (429, 503)  # what a server answers that is asked too often
_ON_THE_WEB = re.compile(r"([a-z0-9_-]+\.)+(?!local$|localdomain$|internal$|arpa$|lan$|home$|corp$)[a-z][a-z0-9-]*")
_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def installed(opener: urllib.request.OpenerDirector) -> Iterator[None]:
    """Let `urllib.request.urlopen` of the whole process use `opener`, by one caller at a time."""
    with _ONE_AT_A_TIME:
        urllib.request.install_opener(opener)
        try:
            yield
        finally:
            urllib.request.install_opener(None)  # the next call makes the standard one


class Opener(urllib.request.OpenerDirector):
    """Opens http and https URLs, following up to five redirects.

    Proxies of the environment are not asked: they would connect to any address. `download.proxy` is, for what has only
    public addresses.

    Args:
        download: limits, and how we introduce ourselves.
        hosts: addresses of reserved host names, used when connecting and nowhere else; they need not be public.
        pace: gives out turns at each host, the same for all that share its limit.
        names: looks names up; None: for this opener alone.

    Attributes:
        patience: how long one URL waits for hosts' turns.
        again: how often a host was asked again that had enough.
    """

    def __init__(self, download: DownloadConfig, hosts: Hosts, pace: Pace, names: Names | None = None):
        super().__init__()
        self._user_agent = download.user_agent
        self.patience, self.again = Patience(download.max_wait_s), 0
        self._http = _Http(download, hosts, pace, names or Names(download.lookup_s, download.lookups), self)
        for handler in (
            self._http,
            _Redirects(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.UnknownHandler(),
        ):
            self.add_handler(handler)

    def expect(self, hosts: Iterable[str]) -> None:
        """Look hosts up that will be asked, ahead."""
        self._http.expect(hosts)

    def open(self, fullurl: Any, data: Any = None, timeout: float | None = None) -> Any:
        """The answer to a request, its body read to the end.

        Raises:
            Lost: with the cause.
        """
        assert isinstance(fullurl, urllib.request.Request)
        fullurl.add_header("User-Agent", self._user_agent)
        try:
            return super().open(fullurl, data, timeout)
        except Lost:  # of a redirect, which comes through here too
            raise
        except Exception as error:  # servers send all kinds of nonsense; it costs one picture
            raise Lost(outcome_of(error), str(error) or type(error).__name__) from error


def outcome_of(error: Exception) -> Outcome:
    """The cause of a failed request."""
    match error:
        case Lost(outcome=outcome):
            return outcome
        case urllib.error.HTTPError(code=code):
            return _STATUS.get(code, Outcome.SERVER_ERROR if code >= 500 else Outcome.HTTP_ERROR)
        case urllib.error.URLError(reason=Exception() as reason):
            return outcome_of(reason)
        case socket.gaierror():
            return Outcome.DNS
        case ssl.SSLError():
            return Outcome.TLS
        case TimeoutError():
            return Outcome.TIMEOUT
        case http.client.IncompleteRead():
            return Outcome.TRUNCATED
        case ConnectionError():
            return Outcome.CONNECTION
        case urllib.error.URLError():
            return Outcome.HTTP_ERROR
        case OSError():
            return Outcome.CONNECTION
        case _:
            return Outcome.HTTP_ERROR


class _Http(urllib.request.AbstractHTTPHandler):
    """Makes http and https requests and reads their answers, all within the limits."""

    def __init__(self, download: DownloadConfig, hosts: Hosts, pace: Pace, names: Names, opener: Opener):
        super().__init__()
        self._download, self._hosts, self._pace, self._names, self._opener = download, hosts, pace, names, opener
        self._allowed = Allowed(download.allow, download.private_addresses)
        self._products = rights.products_of(download.user_agent)

    def expect(self, hosts: Iterable[str]) -> None:
        """Look up those that are not reserved."""
        self._names.expect(host for host in hosts if host not in self._hosts)

    def http_open(self, request: Any) -> addinfourl:
        return self._answer(Connection, request)

    def https_open(self, request: Any) -> addinfourl:
        return self._answer(partial(TlsConnection, context=certificates()), request)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _answer(self, connection: Any, request: Any) -> addinfourl:
        """The answer to one request; a host that has too many of them is asked again at its own pace."""
        host, port = _host_and_port(request)
        if not hasattr(request, "left_s"):  # a redirect has what is left of the first request's
            request.left_s, request.patience = self._download.max_seconds, replace(self._opener.patience)
        places = self._route(request, host, port)
        for tries in range(1, MAX_TRIES + 1):
            heard, after_s = Heard.NOTHING, 0.0
            turn = request.patience.turn(self._pace, host)
            try:
                answer = self._exchange(connection, request, places)
                after_s = min(_seconds(answer.headers), float(2**31))
                heard = Heard.REFUSAL if answer.status in _ENOUGH else Heard.ANSWER
                if heard is Heard.ANSWER:
                    return answer
            except Exception as error:
                if isinstance(error, Lost):  # an answer that is no picture
                    heard = Heard.ANSWER
                if not _may_be_one_too_many(error, alone=turn.together == 1, first=tries == 1):
                    raise
                heard = Heard.REFUSAL
            finally:
                self._pace.give_back(host, turn, heard, after_s)
            self._opener.again += 1
        raise Lost(Outcome.THROTTLED, f"{host} answers others, but has had enough of this one {MAX_TRIES} times")

    def _exchange(self, connection: Any, request: Any, places: list[Place]) -> addinfourl:
        """One request and its whole answer."""
        deadline = time.monotonic() + request.left_s
        made = partial(connection, dial=partial(_dial, places, deadline=deadline), deadline=deadline)
        had_enough = False  # a host that has is asked again after a pause, which is bounded by itself
        try:
            with self.do_open(made, request) as response:
                if response.status < 400 and (reserved := rights.reservation(response.headers, self._products)):
                    raise Lost(Outcome.OPTED_OUT, reserved)
                body = self._body(response)
                answer = addinfourl(io.BytesIO(body), response.headers, response.url, response.status)
                answer.msg = response.reason  # type: ignore[attr-defined]  # read by HTTPErrorProcessor
                had_enough = response.status in _ENOUGH
                return answer
        finally:
            if not had_enough:
                request.left_s = deadline - time.monotonic()

    def _route(self, request: Any, host: str, port: int) -> list[Place]:
        """Where to connect: to the allowed ones of the host's addresses, or to the proxy, which is told whom to ask.

        Raises:
            Lost: no address is allowed, or known; whom a proxy would ask is not on the web; a redirect leads from the
                web to what lies on this machine.
        """
        if reserved := self._hosts.get(host):
            if request.origin_req_host != host:
                raise Lost(Outcome.FORBIDDEN, f"{host} is no place of the web, to which a redirect may lead")
            return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", reserved)]
        proxy = self._download.proxy
        try:
            places = self._names.places(host, port)
        except Lost:  # behind a proxy the names of the web are often not known
            if proxy is None or not _ON_THE_WEB.fullmatch(host):
                raise
            places = []
        admitted = [place for place in places if self._allowed.admits(host, str(place[4][0]))]
        public = [is_public(str(place[4][0])) for place in places]
        if places and not (admitted and (proxy is None or all(public) or not any(public))):
            raise Lost(Outcome.FORBIDDEN, f"{host} has no public address")
        if proxy is None or not all(public):
            return admitted
        gate = urllib.request.Request(proxy)
        request.set_proxy(gate.host, "http")
        return self._names.places(*_host_and_port(gate))

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        """The body, unpacked where it is packed though we asked for no encoding.

        Raises:
            Lost: it is too big, packed or not, or shorter than announced.
        """
        parts, size, limit = [], 0, self._download.max_bytes
        while part := response.read1(CHUNK):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise Lost(Outcome.TOO_BIG, f"more than {limit} bytes")
        announced = _announced(response.headers)
        if announced is not None and size < announced:  # such reads do not complain themselves
            raise Lost(Outcome.TRUNCATED, f"{size} of {announced} bytes")
        body = b"".join(parts)
        if not body:  # as of redirects, whatever they say of its coding
            return body
        for coding in reversed(",".join(response.headers.get_all("Content-Encoding", ())).lower().split(",")):
            body = _unpacked(body, coding.strip(), limit)
        return body


def _announced(headers: Message) -> int | None:
    """The length of the body as its server tells it, once or again (RFC 9110, 8.6); None where it tells none."""
    told = {length.strip() for line in headers.get_all("Content-Length", ()) for length in line.split(",")}
    return int(told.pop()) if len(told) == 1 and all(re.fullmatch("[0-9]{1,18}", length) for length in told) else None


def _may_be_one_too_many(error: Exception, alone: bool, first: bool) -> bool:
    """Whether a connection that failed was ended because its host has others; which came first there, nobody knows."""
    dropped = isinstance(getattr(error, "reason", error), ConnectionResetError)
    return outcome_of(error) is Outcome.CONNECTION and (not alone or (first and dropped))


def _host_and_port(request: urllib.request.Request) -> tuple[str, int]:
    """Whom a request is for, in lower case and without brackets; the scheme's port where none is named."""
    place = urlsplit(f"//{request.host}")
    return place.hostname or "", place.port or (443 if request.type == "https" else 80)


def _dial(
    places: list[Place], _: object, timeout: float | None, __: object = None, *, deadline: float
) -> socket.socket:
    """Connect to the first of some places that answers; all have until `deadline`."""
    failure: Exception = OSError("no address is known")
    for family, kind, protocol, _name, place in places:
        if (left := deadline - time.monotonic()) <= 0:  # a name server may tell any number of addresses
            raise TimeoutError("none of the addresses answered in time")
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(left if timeout is None else min(left, timeout))
            connection.connect(place)
            connection.settimeout(timeout)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


def _unpacked(body: bytes, coding: str, limit: int) -> bytes:
    """A body without its content coding (RFC 9110, 8.4.1), up to so many bytes; as it is, where it is not packed so.

    Raises:
        Lost: it is longer, or ends too early.
    """
    for form in PACKED.get(coding, ()):
        with contextlib.suppress(zlib.error):  # many a server says so of what it sends as it is
            return _inflated(body, form, coding, limit)
    return body


def _inflated(body: bytes, form: int, coding: str, limit: int) -> bytes:
    """All parts of a packed body; zlib.error where the first is none. What comes after the last is passed over."""
    content, at, parts = bytearray(), 0, 0
    while not parts or body.startswith(GZIP, at):
        unpacker = zlib.decompressobj(form)
        try:
            while not unpacker.eof:
                piece = body[at : at + PIECE]  # zlib copies what it does not take, at the end of each of many parts
                if not piece:
                    raise Lost(Outcome.TRUNCATED, f"{len(body)} bytes of {coding} without their end")
                content += unpacker.decompress(piece, limit + 1 - len(content))
                if len(content) > limit:
                    raise Lost(Outcome.TOO_BIG, f"more than {limit} bytes when unpacked")
                at += len(piece) - len(unpacker.unused_data)
        except zlib.error:
            if not parts:
                raise
            break
        parts += 1
    return bytes(content)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = MAX_REDIRECTS

    def redirect_request(self, req: Any, *arguments: Any) -> Any:
        request: Any = super().redirect_request(req, *arguments)
        if request is not None:
            request.left_s, request.patience = req.left_s, req.patience
        return request


def _seconds(headers: Message) -> float:
    """Seconds that Retry-After asks for (RFC 9110, 10.2.3): a number, or a date by the clock of the server."""
    asked = headers.get("Retry-After", "")
    if asked.strip().isdecimal():
        return float(asked)
    if not (then := _moment(asked)):
        return 0.0
    now = _moment(headers.get("Date", "")) or datetime.now(UTC)
    return max(0.0, (then - now).total_seconds())


def _moment(date: str) -> datetime | None:
    """The moment that a header names; None where it names none."""
    try:
        moment = email.utils.parsedate_to_datetime(date)
    except (ValueError, OverflowError):  # of years, too
        return None
    return moment.replace(tzinfo=moment.tzinfo or UTC)
