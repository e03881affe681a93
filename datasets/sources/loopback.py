"""A web server on loopback, which gives a source's pictures out while a download runs.

A source that lies on this machine walks the road of one on the web. Its URLs carry a reserved host that no name
server knows (RFC 2606: .invalid); the download maps it to the server's address when it connects, and neither keys
nor bytes ever see the port.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Address = tuple[str, int]
Hosts = Mapping[str, Address]  # where reserved host names are served
RESERVED = "invalid"  # the last part of their names
_POLL_S = 0.05  # between two looks at whether to stop serving


@contextmanager
def serve(content: Callable[[str], bytes | None]) -> Iterator[Address]:
    """Answer requests with `content(path)`, still quoted and without the first slash; None is a 404.

    Yields the server's (host, port). Only this machine can reach it: on a cluster each download starts its own.
    Whoever has an account on this machine can ask for the same pictures meanwhile.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = content(self.path.removeprefix("/"))
            if body is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: whoever downloads counts what came."""

    with _Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(_POLL_S,), name="loopback", daemon=True)
        thread.start()
        try:
            yield "127.0.0.1", server.server_port
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # with the usual 5, a sixth caller at a time waits a second for its connection
