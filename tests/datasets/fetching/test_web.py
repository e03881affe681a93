"""What servers do to downloads: redirects, drips, packed bodies, slots, patience, deadlines. All on loopback."""

import gzip
import http.client
import io
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from datasets.fetching import web
from datasets.fetching.names import Names
from datasets.outcomes import Lost, Outcome
from tests.datasets.fetching.guarded import DOWNLOAD, resolve

pytestmark = pytest.mark.usefixtures("nothing_leaves_this_machine")
HOST = "pictures.invalid"


class Server(BaseHTTPRequestHandler):
    """Counts who is served at the same time, and when who came."""

    # set on a subclass for each test
    lock: ClassVar[threading.Lock]
    now: ClassVar[list[int]]
    most: ClassVar[list[int]]
    together: ClassVar[tuple[threading.Barrier, threading.Barrier]]
    moments: ClassVar[defaultdict[str, list[float]]]
    over: ClassVar[threading.Event]

    def do_GET(self) -> None:
        name = urllib.parse.unquote(self.path.strip("/"))
        with self.lock:
            self.moments[name].append(time.monotonic())
        getattr(self, name.partition(":")[0])(name.partition(":")[2])

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def to(self, location: str) -> None:
        self.answer(302, Location=location)

    def later(self, times: str) -> None:
        time.sleep(0.2)
        self.answer(302, Location=f"/later:{int(times) - 1}")

    def here(self, _: str) -> None:
        self.answer(200, b"here")

    def crowd(self, _: str) -> None:
        """Answers two, then three at a time, and not before so many are here."""
        with self.lock:
            together = self.together[min(self.most[0] // 2, 1)]
            self.now[0] += 1
            self.most[0] = max(self.most[0], self.now[0])
        together.wait()
        with self.lock:  # before the answer: once it has that, a client may come again at once
            self.now[0] -= 1
        together.wait()  # so none of the next ones meets one of these
        self.answer(200, b"here")

    def busy(self, _: str) -> None:
        self.answer(503)

    def patience(self, seconds: str) -> None:
        self.answer(429 if len(self.moments[f"patience:{seconds}"]) == 1 else 200, b"here", Retry_After=seconds)

    def drip(self, where: str) -> None:
        """A little every 20 ms, each well within any limit on silence."""
        ok, patience = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"
        start, drop = {"head": (ok + b"X-Long: ", b"x"), "body": (ok + b"\r\n", b"x"), "promises": (b"", patience)}[
            where
        ]
        try:
            self.wfile.write(start)
            while not self.over.wait(0.02):
                self.wfile.write(drop)
        except ConnectionError:  # the client has given up
            pass

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Any]:
    state = {
        "lock": threading.Lock(), "now": [0], "most": [0], "together": (threading.Barrier(2), threading.Barrier(3)),
        "moments": defaultdict(list), "over": threading.Event(),
    }  # fmt: skip
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Server,), state)) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield running
        state["over"].set()  # type: ignore[attr-defined]
        running.shutdown()
        thread.join()


def opener(server: Any, per_host: int = 8, **changes: Any) -> web.Opener:
    return web.Opener(DOWNLOAD.model_copy(update=changes), {HOST: server.server_address}, web.HostSlots(per_host))


def fetch(opener: web.Opener, path: str) -> bytes:
    content: bytes = opener.open(urllib.request.Request(f"http://{HOST}/{path}"), timeout=60).read()
    return content


INWARDS = """
http://127.0.0.1:PORT/here http://localhost:PORT/here //inside.example/x http://0x7f.1:PORT/here
http://[::ffff:127.0.0.1]:PORT/here https://127.0.0.1:PORT/here
"""
ELSEWHERE = """
file:///etc/passwd ftp://127.0.0.1:PORT/here data:image/png;base64,AAAA gopher://127.0.0.1:PORT/ jar:http://127.0.0.1/
http://127.0.0.1:x/here
"""


@pytest.mark.parametrize("hops", [1, 3])
@pytest.mark.parametrize(
    ("target", "outcome"),
    [
        *((target, Outcome.FORBIDDEN) for target in INWARDS.split()),
        *((target, Outcome.HTTP_ERROR) for target in ELSEWHERE.split()),
    ],
)
def test_every_redirect_is_checked_again(server, monkeypatch, target, outcome, hops):
    monkeypatch.setattr("datasets.fetching.web.socket.getaddrinfo", resolve)
    path = "to:" + target.replace("PORT", str(server.server_address[1]))
    for _ in range(hops - 1):
        path = "to:/" + urllib.parse.quote(path)
    with pytest.raises(Lost) as caught:
        fetch(opener(server), path)
    assert caught.value.outcome is outcome
    asked = server.RequestHandlerClass.moments
    assert [len(times) for times in asked.values()] == [1] * hops
    assert "here" not in asked


def test_a_name_that_is_public_at_first_and_private_then_leads_nowhere_else(dialled, monkeypatch):
    """What was answered and checked counts for a while; once it is asked again, it is checked again."""
    answers = iter(["8.8.8.8", "127.0.0.1"])
    monkeypatch.setattr("datasets.fetching.web.socket.getaddrinfo", lambda _, port, **__: resolve(next(answers), port))
    names = Names(60.0, 8)
    shared = web.Opener(DOWNLOAD, {}, web.HostSlots(1), names)
    outcomes = []
    for kept in (True, True, False):
        if not kept:
            names._known.clear()  # as after a while
        with pytest.raises(Lost) as caught:
            shared.open(urllib.request.Request("http://rebinding.example/x.png"), timeout=1)
        outcomes.append(caught.value.outcome)
    assert outcomes == [Outcome.CONNECTION, Outcome.CONNECTION, Outcome.FORBIDDEN]
    assert dialled == [("8.8.8.8", 80)] * 2


def test_with_the_guard_off_a_redirect_may_lead_inwards(server, monkeypatch):
    monkeypatch.setattr("datasets.fetching.web.socket.getaddrinfo", resolve)
    location = f"http://localhost:{server.server_address[1]}/here"
    assert fetch(opener(server, private_addresses=True), f"to:{location}") == b"here"


@pytest.mark.parametrize("target", ["http://mine.invalid/here", "http://MINE.invalid:80/here", "//mine%2einvalid/here"])
def test_no_redirect_leads_from_one_host_to_pictures_of_this_machine(server, target):
    hosts = {HOST: server.server_address, "mine.invalid": server.server_address}
    asked = web.Opener(DOWNLOAD, hosts, web.HostSlots(8))
    assert asked.open(urllib.request.Request("http://mine.invalid/here"), timeout=60).read() == b"here"
    with pytest.raises(Lost) as caught:
        fetch(asked, f"to:{target}")
    assert caught.value.outcome is Outcome.FORBIDDEN
    assert fetch(asked, "to:/here") == b"here"


def certificate(folder: Path) -> str:
    """Path of a key and a certificate for `HOST` that nobody but itself vouches for."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    today = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, today - timedelta(1), today + timedelta(1))
    made = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "both.pem").write_bytes(secret + made.sign(key, SHA256()).public_bytes(Encoding.PEM))
    return str(folder / "both.pem")


@pytest.mark.parametrize("kind", ["nobody vouches for", "none"])
def test_a_server_without_a_good_certificate_is_not_trusted(server, tmp_path, kind):
    if kind != "none":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate(tmp_path))
        server.socket = context.wrap_socket(server.socket, server_side=True)
    with pytest.raises(Lost) as caught:
        opener(server).open(urllib.request.Request(f"https://{HOST}/here"), timeout=60)
    assert caught.value.outcome is Outcome.TLS
    assert server.RequestHandlerClass.moments == {}


@pytest.mark.parametrize("where", ["head", "body", "promises"])
def test_a_server_that_drips_is_given_up_in_time(server, where):
    with pytest.raises(Lost) as caught:
        fetch(opener(server, max_seconds=0.3), f"drip:{where}")
    assert caught.value.outcome is Outcome.TIMEOUT


def test_a_redirect_does_not_give_more_time(server):
    with pytest.raises(Lost) as caught:
        fetch(opener(server, max_seconds=0.5), "later:5")
    assert caught.value.outcome is Outcome.TIMEOUT
    assert "later:2" not in server.RequestHandlerClass.moments


def test_a_host_is_asked_by_as_many_as_it_has_slots(server):
    shared = opener(server, per_host=3)
    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(lambda _: fetch(shared, "crowd"), range(2 + 24))) == {b"here"}
    assert server.RequestHandlerClass.most == [3]


def test_a_server_that_asks_for_patience_gets_it(server):
    assert fetch(opener(server), "patience:1") == b"here"
    first, second = server.RequestHandlerClass.moments["patience:1"]
    assert second - first >= 1


@pytest.mark.parametrize("asked", ["3600", "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_until_then_it_is_not_asked_and_nobody_waits_longer_than_there_is_patience(server, asked):
    shared, path = opener(server, max_wait_s=60.0), f"patience:{urllib.parse.quote(asked)}"
    for _ in range(3):
        with pytest.raises(Lost, match=r"throttled.*asked for patience"):
            fetch(shared, path)
    assert len(server.RequestHandlerClass.moments[f"patience:{asked}"]) == 1


def test_a_server_that_never_has_time_is_given_up(server):
    shared = web.Opener(
        DOWNLOAD.model_copy(update={"max_wait_s": 1.0}), {HOST: server.server_address}, web.HostSlots(8, patience_s=1.0)
    )
    for _ in range(9):
        with pytest.raises(Lost, match="throttled"):
            fetch(shared, "busy")
    assert len(server.RequestHandlerClass.moments["busy"]) <= 4


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "gzip, deflate"])
def test_an_empty_body_is_whole_whatever_is_said_of_its_coding(coding):
    asking: Any = SimpleNamespace(_download=DOWNLOAD)
    headers = http.client.parse_headers(io.BytesIO(f"Content-Encoding: {coding}\r\n\r\n".encode()))
    response: Any = SimpleNamespace(read1=lambda _: b"", headers=headers)
    assert web._Http._body(asking, response) == b""


@pytest.mark.parametrize(
    ("after", "whole"),
    [
        (b"", b"one"),
        (gzip.compress(b"two") * 3, b"onetwotwotwo"),
        (gzip.compress(b"") * 3000 + gzip.compress(b"end"), b"oneend"),
        (b"\0" * 512, b"one"),  # padding
        (b"\x1f\x8b is no part", b"one"),
        (b"\x1f", b"one"),
    ],
    ids=["alone", "parts", "empty parts", "padding", "no part", "half a mark"],  # packed bytes have the time in them
)
def test_all_parts_of_a_packed_body_are_unpacked_and_nothing_else(after, whole):
    body = gzip.compress(b"one") + after
    assert web._unpacked(body, "gzip", 100) == whole
    with pytest.raises(Lost, match="more than 2 bytes"):
        web._unpacked(body, "gzip", 2)


def test_a_part_without_its_end_is_told_and_what_is_not_packed_stays():
    with pytest.raises(Lost, match="without their end"):
        web._unpacked(gzip.compress(b"one") + gzip.compress(b"two")[:-3], "gzip", 100)
    assert web._unpacked(b"plain", "gzip", 100) == b"plain"


@pytest.mark.parametrize(
    ("told", "date", "least", "most"),
    [
        ("7", None, 7, 7),
        ("²", None, 0, 0),
        ("soon", None, 0, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", None, 0, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", "today", 0, 0),
        ("Wed, 21 Oct 2015 07:28:05 GMT", "Wed, 21 Oct 2015 07:28:00 GMT", 5, 5),  # by the clock of the server
        ("Fri, 01 Jan 2100 00:00:00 -0000", None, 1e9, 1e10),
        ("Fri, 01 Jan 99999999999999999999 00:00:00 GMT", None, 0, 0),
        ("Fri, 01 Jan 2100 00:00:00 -0000", "Fri, 01 Jan 99999999999999999999 00:00:00 GMT", 1e9, 1e10),
        ("-5", None, 0, 0),
        ("", None, 0, 0),
    ],
)
def test_whatever_a_server_says_of_its_patience_is_read_or_none(told, date, least, most):
    headers = http.client.HTTPMessage()
    headers["Retry-After"] = told
    if date:
        headers["Date"] = date
    assert least <= web._seconds(headers) <= most
