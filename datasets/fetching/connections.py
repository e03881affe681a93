"""HTTP connections of a download: made by whom it says, answered in time, and read however the answer is written."""

import http.client
import io
import re
import socket
import ssl
import time
from functools import cache, partial
from typing import Any

_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # of a header


class Connection(http.client.HTTPConnection):
    """An HTTP connection made by `dial`, whose answer must be complete by `deadline` (monotonic clock)."""

    def __init__(self, host: str, *, dial: Any, deadline: float, **options: Any):
        super().__init__(host, **options)
        self._create_connection = dial  # what http.client connects with
        self.response_class = partial(_Response, deadline=deadline)  # type: ignore[assignment]


class TlsConnection(Connection, http.client.HTTPSConnection):
    """The same over TLS; the certificate must be the host name's, whatever the address."""


@cache
def certificates() -> ssl.SSLContext:
    """The certificates that this machine trusts; reading them takes as long as fetching a picture."""
    return ssl.create_default_context()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, deadline: float, **options: Any):
        super().__init__(sock, *arguments, **options)
        self.fp = self._answer = _Answer(_Timed(self.fp.detach(), sock, deadline))

    def _read_status(self) -> tuple[str, int, str]:
        """The status line; what informs of an answer to come (1xx) is all as 100 is, which `begin` reads past."""
        version, status, reason = super()._read_status()  # type: ignore[misc]
        self._answer.in_head = True
        return version, http.client.CONTINUE if 100 <= status < 200 else status, reason


class _Answer(io.BufferedReader):
    """An answer whose header lines can all be parsed: Python's parser stops at the first that it cannot.

    A name ends before its colon (RFC 9112, 5.1, has a proxy remove blanks there); a line that has none stands for none.
    """

    in_head = False

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not self.in_head or line[:1] in (b" ", b"\t"):  # the second goes on with the line before it
            return line
        if not line.strip(b"\r\n"):
            self.in_head = False
            return line
        name, colon, value = line.partition(b":")
        if not colon or not _NAME.fullmatch(name := name.rstrip(b" \t")):
            return b"No-Header: \r\n"
        return name + colon + value.rstrip(b"\r\n").replace(b"\r", b" ") + b"\r\n"


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
