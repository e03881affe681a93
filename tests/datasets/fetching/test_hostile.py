"""Servers that want to fill our memory: each is refused for its reason, and the process stays small."""

import contextlib
import gzip
import io
import json
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from datasets.outcomes import Outcome

CHECKOUT = Path(__file__).parents[3]
MAX_BYTES = 1 << 20
CAP_MIB = 96  # more than the process had: eight pictures of a megabyte and what it takes to refuse them


def png(size: tuple[int, int], mode: str = "1", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG", **options)
    return buffer.getvalue()


def png_with(kind: bytes, content: bytes) -> bytes:
    """A small picture with one more chunk before its pixels."""
    picture = png((40, 40))
    chunk = kind + content
    place = picture.index(b"IDAT") - 4
    head = len(content).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return picture[:place] + head + picture[place:]


def zeros(count: int) -> bytes:
    return zlib.compress(bytes(count), 9)


def animation() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("P", (9000, 9000), number) for number in range(2)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def many_texts() -> bytes:
    about = PngImagePlugin.PngInfo()
    for number in range(90):
        about.add_text(f"t{number}", "x" * 900_000, zip=True)
    return png((40, 40), pnginfo=about)


BODIES = {
    "pixels": lambda: png((12_000, 12_000)),
    "wide": lambda: png((2_000_000, 40)),
    "profile": lambda: png_with(b"iCCP", b"x\0\0" + zeros(200_000_000)),
    "text": lambda: png_with(b"zTXt", b"x\0\0" + zeros(200_000_000)),
    "texts": many_texts,
    "animation": animation,
    "zipped": lambda: gzip.compress(bytes(200_000_000), 9),
}
EXPECTED = {
    "pixels": Outcome.TOO_MANY_PIXELS,
    "wide": Outcome.TOO_MANY_PIXELS,
    "profile": Outcome.BROKEN_IMAGE,  # Pillow unpacks a megabyte of it and gives up
    "text": Outcome.BROKEN_IMAGE,
    "texts": Outcome.BROKEN_IMAGE,
    "animation": Outcome.TOO_MANY_PIXELS,
    "zipped": Outcome.TOO_BIG,  # unpacked, up to as many bytes as a picture may have
    "endless-body": Outcome.TOO_BIG,
    "endless-chunks": Outcome.TOO_BIG,
    "one-huge-chunk": Outcome.TOO_BIG,
    "announced": Outcome.TOO_BIG,
    "endless-status": Outcome.HTTP_ERROR,
    "endless-header": Outcome.HTTP_ERROR,
    "many-headers": Outcome.HTTP_ERROR,
}

CHILD = """
import json, sys
import pyarrow as pa, pyarrow.parquet as pq
from datasets.planning import plan
from datasets.config import DownloadConfig, ImageConfig
from datasets.fetching.download import download_shard
from tests.bench.plan_memory import peak_mib

folder, port, max_bytes, *names = sys.argv[1:]
limits = DownloadConfig(threads=8, timeout_s=60, retries=0, max_bytes=int(max_bytes),
                        user_agent="test/1", max_lost=1.0)

def download(shard, names):
    urls = [f"http://pictures.invalid/{name}" for name in names]
    rows = [{"key": plan.key_of(url, "x"), "url": url, "caption": "x", "shard": shard, "row": row}
            for row, url in enumerate(urls)]
    download_shard(pa.Table.from_pylist(rows, schema=plan.SCHEMA), shard=shard, folder=folder,
                   image=ImageConfig(size=32, format="png"), download=limits,
                   hosts={"pictures.invalid": ("127.0.0.1", int(port))})
    return {name: row["status"] for name, row in zip(names, pq.read_table(f"{folder}/{shard:05d}.parquet").to_pylist())}

download(0, ["good"])  # loads what is needed
before = peak_mib()
found = download(1, names)
print(json.dumps({"found": found, "mib": peak_mib() - before}))
"""


class Flood(BaseHTTPRequestHandler):
    """Sends what it is asked for as long as anybody takes it."""

    bodies: dict[str, bytes]  # set on a subclass for each test
    over: threading.Event

    def do_GET(self) -> None:
        name = self.path.strip("/")
        with contextlib.suppress(ConnectionError):
            if name in self.bodies:
                self.send_response(200)
                self.send_header("Content-Length", str(len(self.bodies[name])))
                if name == "zipped":
                    self.send_header("Content-Encoding", "gzip")
                self.end_headers()
                self.wfile.write(self.bodies[name])
            else:
                start, again = self.flood(name)
                self.wfile.write(start)
                while not self.over.is_set():
                    self.wfile.write(again)

    def flood(self, name: str) -> tuple[bytes, bytes]:
        """What to send first, and what then without end."""
        ok, junk = b"HTTP/1.1 200 OK\r\n", bytes(1 << 16)
        return {
            "endless-body": (ok + b"\r\n", junk),
            "endless-chunks": (ok + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + junk + b"\r\n"),
            "one-huge-chunk": (ok + b"Transfer-Encoding: chunked\r\n\r\nffffffff\r\n", junk),
            "announced": (ok + b"Content-Length: 99999999999\r\n\r\n", junk),
            "endless-status": (b"HTTP/1.1 200 ", b"x" * (1 << 16)),
            "endless-header": (ok + b"X-Long: ", b"x" * (1 << 16)),
            "many-headers": (ok, b"X-One-More: x\r\n" * 1000),
        }[name]

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    bodies = {name: make() for name, make in BODIES.items()} | {"good": png((40, 40))}
    assert all(len(body) < MAX_BYTES for body in bodies.values()), {name: len(body) for name, body in bodies.items()}
    over = threading.Event()
    handler = type("Handler", (Flood,), {"bodies": bodies, "over": over})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield running.server_port
        over.set()
        running.shutdown()
        thread.join()


def test_floods_and_bombs_are_refused_in_little_memory(tmp_path, port):
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(port), str(MAX_BYTES), *EXPECTED]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["found"] == EXPECTED
    assert outcome["mib"] < CAP_MIB
