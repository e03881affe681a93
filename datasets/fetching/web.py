"""One HTTP request as a download makes it: public addresses only, limits on everything, a cause for every failure.

img2dataset fetches with `urllib.request.urlopen`, which asks the opener that the process has installed. Ours knows http
and https and nothing else: with the standard one, a list of URLs could name `file:///etc/passwd`. It resolves a name,
checks the addresses, and connects to those that it has checked, for every redirect anew: a name server that answers
differently the second time gains nothing.
"""

import email.utils
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any
from urllib.response import addinfourl

from datasets.config import DownloadConfig
from datasets.outcomes import Lost, Outcome
from datasets.sources.loopback import Address, Hosts

Gate = Callable[[str], AbstractContextManager[None]]  # a host's name -> one of its slots, for the time of a connection
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # RFC 4291, 2.4: nothing else of IPv6 is out there
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: the last four bytes are an IPv4 address
PROTOCOL = ipaddress.ip_network("192.0.0.0/24")  # RFC 6890: for protocols; Python takes parts of it for global
CHUNK = 1 << 16
MAX_REDIRECTS = 5
_STATUS = {401: Outcome.DENIED, 403: Outcome.DENIED, 404: Outcome.GONE, 410: Outcome.GONE}
_STATUS |= {429: Outcome.THROTTLED, 451: Outcome.DENIED}
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def installed(opener: urllib.request.OpenerDirector) -> Iterator[None]:
    """Let `urllib.request.urlopen` of the whole process use `opener`, by one caller at a time."""
    with _ONE_AT_A_TIME:
        urllib.request.install_opener(opener)
        try:
            yield
        finally:
            urllib.request.install_opener(None)  # the next call makes the standard one


def is_public(address: str) -> bool:
    """Whether an IP address, and every IPv4 address that is packed into it, belongs to the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast and ip not in PROTOCOL
    if ip.ipv4_mapped or ip in NAT64:
        return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    packed = (inner for inner in (ip.sixtofour, *(ip.teredo or ())) if inner)
    return ip in GLOBAL_UNICAST and ip.is_global and all(is_public(str(inner)) for inner in packed)


class Opener(urllib.request.OpenerDirector):
    """Opens http and https URLs, following up to five redirects.

    Proxies of the environment are not asked: they would connect to any address.

    Args:
        download: limits, and how we introduce ourselves.
        hosts: addresses of reserved host names, used when connecting and nowhere else; they need not be public.
        gate: gives out the slots of each host, the same for all that share its limit.
    """

    def __init__(self, download: DownloadConfig, hosts: Hosts, gate: Gate):
        super().__init__()
        self._user_agent = download.user_agent
        self._http = _Http(download, hosts, gate)
        for handler in (
            self._http,
            _Redirects(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.UnknownHandler(),
        ):
            self.add_handler(handler)

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

    def wait(self) -> None:
        """Sleep until every host that asked for patience (Retry-After) may be asked again, up to `max_wait_s`."""
        time.sleep(max([0.0, *(moment - time.monotonic() for moment in self._http.not_before.values())]))


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


class HostSlots:
    """A `Gate` for the threads of one process: at most so many connections to a host at a time."""

    def __init__(self, per_host: int):
        self._slots: defaultdict[str, threading.Semaphore] = defaultdict(lambda: threading.Semaphore(per_host))
        self._lock = threading.Lock()

    def __call__(self, host: str) -> AbstractContextManager[None]:
        with self._lock:
            return self._slots[host]  # type: ignore[return-value]  # entering a semaphore yields True


class _Http(urllib.request.AbstractHTTPHandler):
    """Makes http and https requests and reads their answers, all within the limits."""

    def __init__(self, download: DownloadConfig, hosts: Hosts, gate: Gate):
        super().__init__()
        self._download, self._hosts, self._gate = download, hosts, gate
        self.not_before: dict[str, float] = {}  # host -> when it may be asked again, on the monotonic clock

    def http_open(self, request: Any) -> addinfourl:
        return self._answer(_Connection, request)

    def https_open(self, request: Any) -> addinfourl:
        return self._answer(partial(_TlsConnection, context=_tls()), request)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _answer(self, connection: Any, request: Any) -> addinfourl:
        host = request.host.rpartition("@")[2].partition(":")[0].lower()
        if self.not_before.get(host, 0.0) > time.monotonic():
            raise Lost(Outcome.THROTTLED, f"{host} asked for patience")
        with self._gate(host):
            if not hasattr(request, "deadline"):  # a redirect has what is left of the first request's
                request.deadline = time.monotonic() + self._download.max_seconds
            dial = partial(self._dial, deadline=request.deadline)
            made = partial(connection, dial=dial, deadline=request.deadline)
            with self.do_open(made, request) as response:
                self._note_patience(host, response)
                if "1" in response.headers.get_all("TDM-Reservation", ()):
                    raise Lost(Outcome.OPTED_OUT, "TDM-Reservation: 1")
                body = self._body(response)
                answer = addinfourl(io.BytesIO(body), response.headers, response.url, response.status)
                answer.msg = response.reason  # type: ignore[attr-defined]  # read by HTTPErrorProcessor
        return answer

    def _dial(self, address: Address, timeout: float | None, _: object = None, *, deadline: float) -> socket.socket:
        """Connect to the first address of a host that is public and answers; all have until `deadline`."""
        host, port = address
        if reserved := self._hosts.get(host):
            return socket.create_connection(reserved, timeout)
        anywhere = self._download.private_addresses
        failure: Exception = Lost(Outcome.FORBIDDEN, f"{host} has no public address")
        for family, kind, protocol, _name, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            if not (anywhere or is_public(str(place[0]))):
                continue
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

    def _note_patience(self, host: str, response: http.client.HTTPResponse) -> None:
        if response.status in (429, 503) and (asked := response.headers.get("Retry-After")):
            seconds = min(_seconds(asked), self._download.max_wait_s)
            self.not_before[host] = max(self.not_before.get(host, 0.0), time.monotonic() + seconds)

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        parts, size, limit = [], 0, self._download.max_bytes
        while part := response.read1(CHUNK):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise Lost(Outcome.TOO_BIG, f"more than {limit} bytes")
        announced = response.headers.get("Content-Length")
        if announced is not None and size < int(announced):  # such reads do not complain themselves
            raise Lost(Outcome.TRUNCATED, f"{size} of {announced} bytes")
        return b"".join(parts)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = MAX_REDIRECTS

    def redirect_request(self, req: Any, *arguments: Any) -> Any:
        request = super().redirect_request(req, *arguments)
        if request is not None:
            request.deadline = req.deadline  # type: ignore[attr-defined]
        return request


class _Connection(http.client.HTTPConnection):
    """An HTTP connection made by `dial`, whose answer must be complete by `deadline` (monotonic clock)."""

    def __init__(self, host: str, *, dial: Any, deadline: float, **options: Any):
        super().__init__(host, **options)
        self._create_connection = dial  # what http.client connects with
        self.response_class = partial(_Response, deadline=deadline)  # type: ignore[assignment]


class _TlsConnection(_Connection, http.client.HTTPSConnection):
    """The same over TLS; the certificate must be the host name's, whatever the address."""


@cache
def _tls() -> ssl.SSLContext:
    """The certificates that this machine trusts; reading them takes as long as fetching a picture."""
    return ssl.create_default_context()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, deadline: float, **options: Any):
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_Timed(self.fp.detach(), sock, deadline))


class _Timed(io.RawIOBase):
    """A socket's bytes until a moment: a server that sends a byte now and then cannot keep us for ever."""

    def __init__(self, raw: Any, sock: socket.socket, deadline: float):
        self._raw, self._sock, self._deadline = raw, sock, deadline
        self._silence = sock.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer took too long")
        self._sock.settimeout(left if self._silence is None else min(left, self._silence))
        count: int | None = self._raw.readinto(buffer)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _seconds(retry_after: str) -> float:
    """Seconds from now that a Retry-After header names (RFC 9110, 10.2.3: a number, or a date)."""
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        moment = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
