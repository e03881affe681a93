"""Downloads over real HTTP on loopback: every row ends in one outcome, equal pictures give equal bytes."""

import contextlib
import dataclasses
import gzip
import hashlib
import http.client
import io
import json
import socket
import ssl
import struct
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datasets import pictures
from datasets.config import DownloadConfig, ImageConfig
from datasets.fetching import web
from datasets.fetching.download import download_shard, losses, results
from datasets.files import storage
from datasets.formats import removal, shards
from datasets.formats.shards import INDEX, Receipt
from datasets.outcomes import Outcome
from datasets.planning import plan
from datasets.source_settings import OpenMojiConfig
from datasets.sources import openmoji

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


@pytest.fixture
def server() -> Iterator[Any]:
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


def test_every_row_ends_in_the_outcome_of_its_cause(tmp_path, server):
    receipt = download(planned(*EXPECTED), tmp_path, server)
    rows = index(tmp_path)
    assert {name: row["status"] for name, row in zip(EXPECTED, rows, strict=True)} == EXPECTED
    assert [row["row"] for row in rows] == list(range(len(EXPECTED)))
    assert receipt.rows_in == len(EXPECTED)
    assert receipt.rows_out == 5
    assert receipt.dropped["http_error"] == 5
    assert receipt.rows_out + sum(receipt.dropped.values()) == receipt.rows_in
    assert shards.finished(str(tmp_path)) == {7: receipt}


def test_answers_that_lie_end_in_the_outcome_of_their_cause(tmp_path, server):
    once = DOWNLOAD.model_copy(update={"user_agent": "Test/1 (a@b.invalid)", "retries": 0})
    receipt = download(planned(*RAW_EXPECTED), tmp_path, server, download=once)
    found = {name: Outcome(row["status"]) for name, row in zip(RAW_EXPECTED, index(tmp_path), strict=True)}
    assert found == RAW_EXPECTED
    rows = shards.read_images((tmp_path / "00007.tar").read_bytes(), count=receipt.rows_out)
    assert len({row.picture for row in rows}) == 1


def test_a_silent_server_is_given_up(tmp_path, server):
    impatient = DOWNLOAD.model_copy(update={"timeout_s": 0.2, "retries": 0})
    assert download(planned("slow"), tmp_path, server, download=impatient).dropped == {"timeout": 1}


def test_only_passing_causes_are_tried_again(tmp_path, server):
    receipt = download(planned("good", "flaky", "missing", "down"), tmp_path, server)
    asked = server.RequestHandlerClass.seen
    assert {name: asked.count(name) for name in asked} == {"good": 1, "flaky": 2, "missing": 1, "down": 2}
    assert receipt.retried == 2
    assert receipt.dropped == {"gone": 1, "server_error": 1}


def test_the_tar_holds_what_was_kept_in_row_order(tmp_path, server):
    receipt = download(planned("missing", "good", "page", "good-too"), tmp_path, server)
    content = storage.read(str(tmp_path / "00007.tar"), expect=receipt.files["00007.tar"])
    rows = shards.read_images(content, count=2)
    assert [(row.row, row.caption) for row in rows] == [(1, "good"), (3, "good-too")]
    assert rows[0].url == f"http://{HOST}/good"
    assert rows[0].key == plan.key_of(rows[0].url, "good")
    assert all(row.pixels().shape == (SIZE, SIZE, 3) for row in rows)
    kept = index(tmp_path)[1]
    assert (kept["width"], kept["height"]) == (48, 40)
    assert len(kept["sha256"]) == 64
    assert pq.read_schema(tmp_path / "00007.parquet").remove_metadata().equals(INDEX)


def test_we_say_who_we_are(tmp_path, server):
    download(planned("good"), tmp_path, server)
    assert server.RequestHandlerClass.agents == {"test/1 (a@b.invalid)"}


def test_nobody_listening_is_a_lost_connection(tmp_path, server):
    with socket.socket() as taken:  # bound, so that nobody else gets the port, and deaf
        taken.bind(("127.0.0.1", 0))
        receipt = download(planned("good"), tmp_path, server, hosts={HOST: taken.getsockname()})
    assert receipt.dropped == {"connection": 1}
    assert shards.read_images((tmp_path / "00007.tar").read_bytes(), count=0) == []


def test_reserved_hosts_are_no_business_of_a_proxy(tmp_path, server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:3128")
    assert download(planned("good"), tmp_path, server).rows_out == 1


def test_a_row_that_img2dataset_loses_is_an_error(tmp_path, server, monkeypatch):
    monkeypatch.setattr("datasets.fetching.download.stored", lambda *_: 1 / 0)  # a bug of ours, say
    with pytest.raises(RuntimeError, match=r"shard 7.*rows \[1\]"):
        download(planned("missing", "good"), tmp_path, server)
    assert shards.finished(str(tmp_path)) == {}


def test_the_process_opens_urls_as_before_afterwards(tmp_path, server):
    download(planned("good"), tmp_path, server)
    address = f"http://127.0.0.1:{server.server_address[1]}/good"
    assert urllib.request.urlopen(address).read() == PICTURE


# ------------------------------------------------------------------------------------- the embedded source


def openmoji_rows() -> pa.Table:
    config = OpenMojiConfig(
        captions=("red heart", "blue circle", "fox"),
        size=SIZE,
        similarity=0.3,
        punsafe=0.0,
        pwatermark=0.0,
        aesthetic=6.0,
    )
    table = openmoji.metadata(config)
    texts = zip(table["URL"].to_pylist(), table["TEXT"].to_pylist(), strict=True)
    rows = [
        {"key": plan.key_of(url, text), "url": url, "caption": text, "shard": 7, "row": row}
        for row, (url, text) in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows, schema=plan.SCHEMA)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_two_downloads_of_the_embedded_source_are_byte_equal(tmp_path, kind):
    image = IMAGE.model_copy(update={"format": kind})
    receipts = []
    for threads in (1, 8):  # another port each time, and another order of arrival
        with openmoji.serve(SIZE) as address:
            settings = DOWNLOAD.model_copy(update={"threads": threads})
            folder = str(tmp_path / str(threads))
            receipts.append(
                download_shard(
                    openmoji_rows(),
                    shard=7,
                    folder=folder,
                    image=image,
                    download=settings,
                    hosts={openmoji.HOST: address},
                )
            )
    assert receipts[0].files == receipts[1].files
    assert receipts[0].rows_out == 3


def test_the_embedded_server_draws_on_white_at_any_size():
    with openmoji.serve(96) as (host, port):
        body = urllib.request.urlopen(f"http://{host}:{port}/2764.png").read()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://{host}:{port}/../../../etc/passwd")
    with Image.open(io.BytesIO(body)) as picture:
        assert picture.size == (96, 96)
    heart = pictures.pixels(body)
    assert heart[0, 0].tolist() == [255, 255, 255]
    red, green, blue = heart[40, 48].tolist()
    assert red > 180
    assert max(green, blue) < 80


# ------------------------------------------------------------------------------------------------- causes


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (urllib.error.URLError(socket.gaierror(-2, "Name or service not known")), Outcome.DNS),
        (urllib.error.URLError(ssl.SSLCertVerificationError("self-signed")), Outcome.TLS),
        (urllib.error.URLError(TimeoutError("timed out")), Outcome.TIMEOUT),
        (urllib.error.URLError(ConnectionRefusedError(111, "refused")), Outcome.CONNECTION),
        (urllib.error.URLError(OSError(113, "No route to host")), Outcome.CONNECTION),
        (urllib.error.URLError("unknown url type: file"), Outcome.HTTP_ERROR),
        (http.client.IncompleteRead(b"x"), Outcome.TRUNCATED),
        (http.client.RemoteDisconnected("bye"), Outcome.CONNECTION),
        (http.client.BadStatusLine("HTTP?"), Outcome.HTTP_ERROR),
        (UnicodeError("label too long"), Outcome.HTTP_ERROR),
    ],
)
def test_errors_are_told_apart(error, outcome):
    assert web.outcome_of(error) is outcome


def test_receipts_are_plain_json(tmp_path, server):
    receipt = download(planned("good", "missing"), tmp_path, server)
    found = json.loads((tmp_path / "receipts" / "00007.json").read_text())
    assert found == dataclasses.asdict(receipt)
    assert found["dropped"] == {"gone": 1}


@pytest.mark.parametrize("named_by", ["url", "origin"])
def test_a_forgotten_picture_is_not_asked_for_and_taken_out_later_leaves_the_same_bytes(server, tmp_path, named_by):
    rows = planned("good", "good-too", "missing").drop("origin")
    rows = rows.append_column("origin", pa.array([None, "https://original.invalid/too.png", None]))
    key, name = rows["key"][0].as_py(), rows[named_by][1].as_py()
    kept = download(rows, tmp_path / "kept", server)
    server.RequestHandlerClass.seen.clear()
    receipt = download(rows, tmp_path / "never", server, forgotten={key, name})
    assert set(server.RequestHandlerClass.seen) == {"missing"}
    assert receipt.dropped == {"forgotten": 2, "gone": 1}
    keys = {key, rows["key"][1].as_py()}
    for name, change in ((shards.image_name(7), removal.from_images), (shards.index_name(7), removal.from_index)):
        content = (tmp_path / "kept" / name).read_bytes()
        assert change(content, set()) == content
        assert change(content, keys) == (tmp_path / "never" / name).read_bytes()
    assert removal.from_receipt(kept, {}, 0, downloaded=True).dropped == receipt.dropped


def test_the_bytes_of_a_forgotten_picture_are_not_kept_wherever_they_come_from(server, tmp_path):
    rows = planned("good", "moved", "good-too")
    first = download(rows, tmp_path / "first", server)
    assert first.rows_out == 3
    tar, index = ((tmp_path / "first" / name).read_bytes() for name in (shards.image_name(7), shards.index_name(7)))
    for name, earlier in {"asked": None, "taken over": results(tar, index)}.items():
        forgotten = {hashlib.sha256(PICTURE).hexdigest()}
        receipt = download(rows, tmp_path / name, server, forgotten=forgotten, earlier=earlier)
        assert receipt.dropped == {"forgotten": 2}
        (kept,) = shards.read_images((tmp_path / name / shards.image_name(7)).read_bytes())
        assert kept.key == rows["key"][2].as_py()
        told = list(losses(rows, (tmp_path / name / shards.index_name(7)).read_bytes()))
        assert [(cause, sentence) for _, _, cause, sentence in told] == [
            ("forgotten", "it has the bytes of a picture that this root was to forget")
        ] * 2


def test_a_later_attempt_asks_again_for_passing_losses_only_and_keeps_every_other_byte(server, tmp_path):
    rows = planned("good", "late", "missing", "down")
    once = DOWNLOAD.model_copy(update={"retries": 0})
    first = download(rows, tmp_path / "first", server, download=once)
    assert first.dropped == {"gone": 1, "server_error": 2}
    tar, index = ((tmp_path / "first" / name).read_bytes() for name in (shards.image_name(7), shards.index_name(7)))
    server.RequestHandlerClass.seen[:] = ["late"]
    second = download(rows, tmp_path / "second", server, download=once, earlier=results(tar, index))
    assert sorted(server.RequestHandlerClass.seen) == ["down", "late", "late"]
    assert second.dropped == {"gone": 1, "server_error": 1}
    before = shards.read_images(tar)
    after = shards.read_images((tmp_path / "second" / shards.image_name(7)).read_bytes())
    assert [row.row for row in after] == [0, 1]
    assert after[0] == before[0]
    again = download(rows.slice(0, 1), tmp_path / "same", server, earlier={0: results(tar, index)[0]})
    assert again.rows_out == 1
    assert shards.read_images((tmp_path / "same" / shards.image_name(7)).read_bytes()) == before


def test_asked_again_in_its_own_folder_a_shard_keeps_what_it_has(server, tmp_path):
    """Where nothing is gained its files stay as they are; the old receipt never stands beside new files."""
    rows = planned("good", "late", "down")
    once = DOWNLOAD.model_copy(update={"retries": 0})
    first = download(rows, tmp_path, server, download=once)
    assert first.dropped == {"server_error": 2}
    server.RequestHandlerClass.seen[:] = []
    files = [tmp_path / name for name in (shards.image_name(7), shards.index_name(7))]

    def known() -> Any:
        return results(*(file.read_bytes() for file in files))

    counts: list[int] = []
    same = download(rows, tmp_path, server, download=once, earlier=known(), replaced=first, settled=counts.append)
    assert same is first
    assert sum(counts) == 3
    server.RequestHandlerClass.seen[:] = ["late"]

    def fence() -> None:
        assert len(shards.read_images(files[0].read_bytes())) == 1 or shards.finished(str(tmp_path)) == {}

    better = download(rows, tmp_path, server, download=once, earlier=known(), replaced=first, fence=fence)
    assert better.dropped == {"server_error": 1}
    assert shards.finished(str(tmp_path)) == {7: better}
    assert sorted(server.RequestHandlerClass.seen) == ["down", "late", "late"]
    lost = list(losses(rows, files[1].read_bytes()))
    assert lost == [(None, f"http://{HOST}/down", "server_error", "HTTP Error 500: Internal Server Error")]
