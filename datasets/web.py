"""One HTTP request as a download makes it: reserved hosts, a limit on size, and a cause for every failure.

img2dataset fetches with `urllib.request.urlopen`, which asks the opener that the process has installed.
Ours reads the whole body itself, so that whatever goes wrong on the way carries its cause. It knows http
and https and nothing else: with the standard one, a list of URLs could name `file:///etc/passwd`.
"""

import http.client
import io
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.response import addinfourl

from datasets.outcomes import Lost, Outcome

Address = tuple[str, int]
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


class Opener(urllib.request.OpenerDirector):
    """Opens http and https URLs, following redirects and the environment's proxies.

    Args:
        hosts: addresses of reserved host names, used when connecting and nowhere else.
        max_bytes: longest body that is read.
        user_agent: how we introduce ourselves.
    """

    def __init__(self, hosts: Mapping[str, Address], max_bytes: int, user_agent: str):
        super().__init__()
        self._max_bytes = max_bytes
        self._user_agent = user_agent
        for handler in (
            _ReservedHosts(hosts),
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPRedirectHandler(),
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
            with super().open(fullurl, data, timeout) as response:
                return addinfourl(io.BytesIO(self._body(response)), response.headers, response.url)
        except Lost:  # of a redirect, which comes through here too
            raise
        except Exception as error:  # servers send all kinds of nonsense; it costs one picture
            raise Lost(outcome_of(error), str(error) or type(error).__name__) from error

    def _body(self, response: Any) -> bytes:
        body: bytes = response.read(self._max_bytes + 1)
        if len(body) > self._max_bytes:
            raise Lost(Outcome.TOO_BIG, f"more than {self._max_bytes} bytes")
        announced = response.headers.get("Content-Length")
        if announced is not None and len(body) < int(announced):  # a read with a limit does not complain itself
            raise Lost(Outcome.TRUNCATED, f"{len(body)} of {announced} bytes")
        return body


def outcome_of(error: Exception) -> Outcome:
    """The cause of a failed request."""
    match error:
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


class _ReservedHosts(urllib.request.AbstractHTTPHandler):
    """Connects to reserved hosts at the addresses that we were told; the next handler sees all others."""

    handler_order = 50  # before proxies, which know these hosts as little as name servers do

    def __init__(self, hosts: Mapping[str, Address]):
        super().__init__()
        self._hosts = hosts

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse | None:
        address = self._hosts.get(request.host)
        return self.do_open(partial(_ConnectionTo, address), request) if address else None


class _ConnectionTo(http.client.HTTPConnection):
    """An HTTP connection to a host name that lies at a given address."""

    def __init__(self, address: Address, host: str, timeout: float | None = None):
        super().__init__(host, timeout=timeout)
        self._address = address

    def connect(self) -> None:
        self.sock = socket.create_connection(self._address, self.timeout)
