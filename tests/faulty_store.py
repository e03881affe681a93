"""A proxy that stands before an object store and does to requests what networks and busy stores do.

`python -m tests.faulty_store URL SECONDS` is one that answers so many seconds late, until its input ends.
"""

import http.client
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

Fault = Callable[[str, str], str | None]  # method, path -> what goes wrong with a request, None for nothing

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class FaultyStore:
    """The proxy. `fault` says of each request what becomes of it:

    - "slow": it is answered 503 SlowDown, and the store never sees it;
    - "lost": the store does what is asked, but the connection breaks before it answers;
    - "cut": the connection breaks in the middle of the answer's body;
    - "mute": nobody answers, for as long as the proxy stands;
    - None: nothing.

    `seen` counts requests by (method, what became of them); `asked` has the method and path of each, `written` the
    paths that were put from an address, with the time of the first. Where `late_s` is set, each is answered so many
    seconds late.
    """

    def __init__(self, host: str, port: int, listens: str = "127.0.0.1"):
        self.fault: Fault = lambda method, path: None
        self.seen: Counter[tuple[str, str | None]] = Counter()
        self.asked: list[tuple[str, str]] = []
        self.written: dict[str, dict[str, float]] = {}
        self.late_s = 0.0
        self._store, self._listens = (host, port), listens
        self._server: ThreadingHTTPServer | None = None
        self._mute = threading.Event()
        self.port = 0
        self.come()

    @property
    def url(self) -> str:
        return f"http://{self._listens}:{self.port}"

    def come(self) -> None:
        """Listen, where it listened before."""
        store = self

        class Handler(_Handler):
            proxy = store

        self._server = _Server((self._listens, self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def go(self) -> None:
        """Be away: connections are refused, open ones end."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server.hang_up()
            self._server = None

    def away(self, seconds: float) -> None:
        """Go, and come back after so long."""
        self.go()
        threading.Timer(seconds, self.come).start()

    def requests(self, *outcomes: str | None) -> int:
        """How many requests came to one of these ends; all where none is named."""
        return sum(count for (_, outcome), count in self.seen.items() if not outcomes or outcome in outcomes)

    def close(self) -> None:
        self._mute.set()
        self.go()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, *arguments: Any):
        self._open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in list(self._open):
            _break(connection)


def _break(connection: socket.socket) -> None:
    """End a connection with a reset."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
    except OSError:  # its other end was faster
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyStore

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):  # a client that went, or a connection that we broke
            self.close_connection = True

    def _serve(self) -> None:
        fault = self.proxy.fault(self.command, self.path)
        self.proxy.seen[self.command, fault] += 1
        self.proxy.asked.append((self.command, self.path))
        if self.command == "PUT" and fault is None:
            self.proxy.written.setdefault(self.client_address[0], {}).setdefault(unquote(self.path), time.monotonic())
        time.sleep(self.proxy.late_s)
        body = self._body()
        if fault == "slow":
            self._answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
        elif fault == "mute":
            self.proxy._mute.wait()
            self.close_connection = True
        else:
            status, headers, content = self._ask(body)
            if fault == "lost":
                self._hang_up()
            else:
                self._answer(status, headers, content, cut=fault == "cut")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return b"".join(iter(self._chunk, b""))
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline().split(b";")[0], 16))
        self.rfile.readline()
        return content

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """What the store answers."""
        connection = http.client.HTTPConnection(*self.proxy._store, timeout=60)
        kept = {name: value for name, value in self.headers.items() if name.lower() not in _HOPS}
        connection.request(self.command, self.path, body, {**kept, "Content-Length": str(len(body))})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in _HOPS]
        if self.command == "HEAD" and (length := response.getheader("Content-Length")):
            headers.append(("Content-Length", length))
        return response.status, headers, content

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        elif not any(name == "Content-Length" for name, _ in headers):
            self.send_header("Content-Length", "0")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.wfile.flush()
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        _break(self.connection)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


_HOPS = {"connection", "transfer-encoding", "content-length", "expect", "keep-alive"}


def some(share: float, kind: str, seed: int) -> Fault:
    """A fault that befalls a share of all requests, drawn from a seed."""
    draws, lock = random.Random(seed), threading.Lock()

    def fault(method: str, path: str) -> str | None:
        with lock:
            return kind if draws.random() < share else None

    return fault


@contextmanager
def before(url: str, listens: str = "127.0.0.1") -> Iterator[FaultyStore]:
    """A proxy before the store at an http URL, which listens at an address of this host."""
    host, _, port = url.removeprefix("http://").partition(":")
    store = FaultyStore(host, int(port), listens)
    try:
        yield store
    finally:
        store.close()


if __name__ == "__main__":
    with before(sys.argv[1]) as late:
        late.late_s = float(sys.argv[2])
        print(late.url, flush=True)
        sys.stdin.read()
