"""Servers of pictures as they are out there, on loopback; and downloads of a shard from them."""

import contextlib
import gzip
import io
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from datasets.config import DownloadConfig, ImageConfig
from datasets.fetching.download import download_shard
from datasets.formats.shards import Receipt
from datasets.outcomes import Outcome
from datasets.planning import plan

SIZE = 32
IMAGE = ImageConfig(size=SIZE, format="png")
DOWNLOAD = DownloadConfig(
    threads=4,
    timeout_s=60,
    retries=1,
    max_wait_s=5.0,
    max_bytes=100_000,
    user_agent="test/1 (a@b.invalid)",
    max_lost=1.0,
)
HOST, BUSY = "pictures.invalid", "busy.invalid"


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PICTURE = encoded(Image.effect_noise((48, 40), 60).convert("RGB"))
ANSWERS: dict[str, tuple[int, bytes, dict[str, str]]] = {
    "good": (200, PICTURE, {}),
    "good-too": (200, encoded(Image.new("RGB", (32, 64), "red"), "JPEG"), {}),
    "missing": (404, PICTURE, {}),
    "private": (403, b"", {}),
    "busy": (429, b"", {}),
    "teapot": (418, b"", {}),
    "flaky": (503, b"", {}),  # at first
    "late": (500, b"", {}),  # at first
    "down": (500, b"", {}),
    "optout": (200, PICTURE, {"X-Robots-Tag": "noai"}),
    "truncated": (200, PICTURE[:200], {"Content-Length": str(len(PICTURE))}),
    "wrong-length": (200, PICTURE, {"Content-Length": "many"}),
    "huge": (200, bytes(120_000), {}),
    "page": (200, b"<html>buy this domain</html>", {}),
    "drawing": (200, b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', {}),
    "empty": (200, b"", {}),
    "half": (200, PICTURE[: len(PICTURE) // 2], {}),
    "small": (200, encoded(Image.new("RGB", (100, 31))), {}),
    "bomb": (200, encoded(Image.new("1", (9000, 9000))), {}),
    "moved": (302, b"", {"Location": "/good"}),
    "to-file": (302, b"", {"Location": "file:///etc/passwd"}),
    "loop": (302, b"", {"Location": "/loop"}),
}


OK = b"HTTP/1.1 200 OK\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(PICTURE)
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n"
PACKED = gzip.compress(PICTURE)
IN_CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(PICTURE), PICTURE)
RAW = {  # answers, byte by byte, after which the server hangs up
    "chunks": CHUNKED + b"\r\n" + IN_CHUNKS,
    "chunk-cut": CHUNKED + b"\r\nffff\r\n" + PICTURE,
    "chunk-endless": CHUNKED + b"\r\n" + IN_CHUNKS[:-5],
    "chunk-nonsense": CHUNKED + b"\r\nzz\r\n" + PICTURE,
    "chunk-negative": CHUNKED + b"\r\n-5\r\n" + PICTURE,
    "chunks-and-length": CHUNKED + b"Content-Length: 5\r\n\r\n" + IN_CHUNKS,
    "length-short": OK + b"Content-Length: 200\r\n\r\n" + PICTURE,
    "length-negative": OK + b"Content-Length: -1\r\n\r\n" + PICTURE,
    "lengths": OK + LENGTH + b"Content-Length: 7\r\n\r\n" + PICTURE,
    "no-length": OK + b"\r\n" + PICTURE,
    "no-status": b"<html>hello</html>\r\n\r\n",
    "status-nonsense": b"HTTP/1.1 abc\r\n\r\n" + PICTURE,
    "no-content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "part": b"HTTP/1.1 206 Partial Content\r\nContent-Length: 200\r\n\r\n" + PICTURE[:200],
    "not-modified": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "nowhere": b"HTTP/1.1 302 Found\r\n\r\n",
    "promises": b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + OK + LENGTH + b"\r\n" + PICTURE,
    "other-bytes": OK + b"X-\xff\xfe: \xe9\0\r\n" + LENGTH + b"\r\n" + PICTURE,
    "packed": OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s" % (len(PACKED), PACKED),
    "packed-twice": OK + b"Content-Encoding: deflate, X-GZIP\r\n\r\n" + gzip.compress(zlib.compress(PICTURE)),
    "packed-raw": OK + b"Content-Encoding: deflate\r\n\r\n" + zlib.compress(PICTURE, wbits=-15),
    "packed-not": OK + b"Content-Encoding: gzip\r\n" + LENGTH + b"\r\n" + PICTURE,
    "packed-cut": OK + b"Content-Encoding: gzip\r\n\r\n" + PACKED[:-20],
    "packed-bomb": OK + b"Content-Encoding: gzip\r\nContent-Length: 200\r\n\r\n" + gzip.compress(bytes(1 << 20))[:200],
    "packed-otherwise": OK + b"Content-Encoding: br\r\n\r\n" + PACKED,
    "packed-parts": OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(PICTURE[:99]) + gzip.compress(PICTURE[99:]),
    "packed-padded": OK + b"Content-Encoding: gzip\r\n\r\n" + PACKED + bytes(99),
    "packed-lines": OK + b"Content-Encoding: identity\r\nContent-Encoding: gzip\r\n\r\n" + PACKED,
    "status-408": b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n",
    "status-425": b"HTTP/1.1 425 Too Early\r\nContent-Length: 0\r\n\r\n",
    "robots-others": OK + b"X-Robots-Tag: otherbot: noai\r\n" + LENGTH + b"\r\n" + PICTURE,
    "robots-twice": OK + b"X-Robots-Tag: all\r\nX-Robots-Tag: nosnippet, NoAI\r\n" + LENGTH + b"\r\n" + PICTURE,
    "robots-ours": OK + b"X-Robots-Tag: TEST: noindex\r\n" + LENGTH + b"\r\n" + PICTURE,
    "reserved": OK + b"TDM-Reservation: 1\r\n" + LENGTH + b"\r\n" + PICTURE,
    "not-reserved": OK + b"TDM-Reservation: 0\r\n" + LENGTH + b"\r\n" + PICTURE,
}
RAW_EXPECTED = {
    "chunks": Outcome.OK,
    "chunk-cut": Outcome.TRUNCATED,
    "chunk-endless": Outcome.TRUNCATED,
    "chunk-nonsense": Outcome.TRUNCATED,
    "chunk-negative": Outcome.TRUNCATED,
    "chunks-and-length": Outcome.OK,
    "length-short": Outcome.BROKEN_IMAGE,
    "length-negative": Outcome.OK,
    "lengths": Outcome.OK,
    "no-length": Outcome.OK,
    "no-status": Outcome.HTTP_ERROR,
    "status-nonsense": Outcome.HTTP_ERROR,
    "no-content": Outcome.NOT_AN_IMAGE,
    "part": Outcome.BROKEN_IMAGE,
    "not-modified": Outcome.HTTP_ERROR,
    "nowhere": Outcome.HTTP_ERROR,
    "promises": Outcome.OK,
    "other-bytes": Outcome.OK,
    "packed": Outcome.OK,
    "packed-twice": Outcome.OK,
    "packed-raw": Outcome.OK,
    "packed-not": Outcome.OK,
    "packed-cut": Outcome.TRUNCATED,
    "packed-bomb": Outcome.TOO_BIG,
    "packed-otherwise": Outcome.NOT_AN_IMAGE,
    "packed-parts": Outcome.OK,
    "packed-padded": Outcome.OK,
    "packed-lines": Outcome.OK,
    "status-408": Outcome.TIMEOUT,
    "status-425": Outcome.SERVER_ERROR,
    "robots-others": Outcome.OK,
    "robots-twice": Outcome.OPTED_OUT,
    "robots-ours": Outcome.OPTED_OUT,
    "reserved": Outcome.OPTED_OUT,
    "not-reserved": Outcome.OK,
    "reset": Outcome.CONNECTION,
    "stays": Outcome.OK,
}


class Servers(BaseHTTPRequestHandler):
    """Servers as they are out there, one path each."""

    # set on a subclass for each test
    seen: list[str]  # paths asked for
    agents: set[str]
    over: threading.Event

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.seen.append(name)
        self.agents.add(str(self.headers["User-Agent"]))
        if name == "slow":
            self.over.wait()
        if name in ("slow", "hangup"):
            return
        if name in ("reset", "stays", *RAW):
            self.raw(name)
            return
        again = name in ("flaky", "late") and self.seen.count(name) > 1
        status, body, headers = ANSWERS["good" if again else name]
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # who wants only part of it hangs up
            self.wfile.write(body)

    def raw(self, name: str) -> None:
        """An answer of `RAW`, one that ends in a reset, or one after which the connection stays open."""
        self.wfile.write(RAW.get(name, OK + LENGTH + b"\r\n" + PICTURE[: 100 if name == "reset" else None]))
        if name == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif name == "stays":
            self.over.wait()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving() -> Iterator[Any]:
    """A server that answers so, and knows who asked for what."""
    over = threading.Event()
    handler = type("Handler", (Servers,), {"seen": [], "agents": set(), "over": over})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield running
        over.set()
        running.shutdown()
        thread.join()


def planned(*names: str) -> pa.Table:
    """Rows of a shard for these paths; a name with `://` is taken as it is."""
    urls = [name if "://" in name else f"http://{HOST}/{name}" for name in names]
    rows = [
        {"key": plan.key_of(url, name), "url": url, "caption": name, "shard": 7, "row": row}
        for row, (url, name) in enumerate(zip(urls, names, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=plan.SCHEMA)


def download(rows: pa.Table, folder: Any, server: Any, **changes: Any) -> Receipt:
    settings = {
        "image": IMAGE,
        "download": DOWNLOAD,
        "hosts": dict.fromkeys((HOST, BUSY), server.server_address),
    } | changes
    return download_shard(rows, shard=7, folder=str(folder), **settings)


def index(folder: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "00007.parquet").to_pylist()
    return rows


EXPECTED = {
    "good": Outcome.OK,
    "good-too": Outcome.OK,
    "missing": Outcome.GONE,
    "private": Outcome.DENIED,
    f"http://{BUSY}/busy": Outcome.THROTTLED,
    "teapot": Outcome.HTTP_ERROR,
    "flaky": Outcome.OK,
    "down": Outcome.SERVER_ERROR,
    "hangup": Outcome.CONNECTION,
    "optout": Outcome.OPTED_OUT,
    "truncated": Outcome.TRUNCATED,
    "wrong-length": Outcome.OK,
    "huge": Outcome.TOO_BIG,
    "page": Outcome.NOT_AN_IMAGE,
    "drawing": Outcome.NOT_AN_IMAGE,
    "empty": Outcome.NOT_AN_IMAGE,
    "half": Outcome.BROKEN_IMAGE,
    "small": Outcome.TOO_SMALL,
    "bomb": Outcome.TOO_MANY_PIXELS,
    "moved": Outcome.OK,
    "to-file": Outcome.HTTP_ERROR,
    "loop": Outcome.HTTP_ERROR,
    "file:///etc/passwd": Outcome.HTTP_ERROR,
    "data:image/png;base64,AAAA://": Outcome.HTTP_ERROR,
}
