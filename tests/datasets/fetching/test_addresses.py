"""Whom downloads connect to: public addresses, what is allowed, a proxy. On loopback."""

import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from datasets.config import DownloadConfig
from datasets.fetching import web
from datasets.outcomes import Lost, Outcome
from tests.datasets.fetching.guarded import DOWNLOAD, NAMES, RESOLVE, resolve

pytestmark = pytest.mark.usefixtures("nothing_leaves_this_machine")


def test_the_audit_hook_would_notice() -> None:
    with pytest.raises(AssertionError, match="a connection to"), socket.socket() as probe:
        probe.connect(("192.0.2.1", 80))
    with pytest.raises(AssertionError, match="a question about"):
        RESOLVE("example.com", 80)


FORBIDDEN = """
127.0.0.1 127.1 127.255.255.254 2130706433 0x7f000001 0x7f.1 0177.0.0.1 0 0.0.0.0 10.0.0.1 10.255.255.255 172.16.0.1
172.31.255.255 192.168.0.1 169.254.169.254 2852039166 100.64.0.1 100.127.255.255 192.0.0.8 192.0.2.1 198.18.0.1
198.51.100.1 203.0.113.1 224.0.0.1 233.252.0.1 240.0.0.1 255.255.255.255 [::] [::1] [0:0:0:0:0:0:0:1] [::127.0.0.1]
[::ffff:127.0.0.1] [::ffff:7f00:1] [::ffff:10.0.0.1] [::ffff:169.254.169.254] [64:ff9b::7f00:1] [64:ff9b::a9fe:a9fe]
[64:ff9b:1::1] [2002:7f00:1::] [2002:a00:1::1] [2001:0:7f00:1::] [2001:db8::1] [100::1] [fc00::1] [fd00:ec2::254]
[fe80::1] [fec0::1] [ff02::1] [ff0e::1] [5f00::1] localhost localhost. LOCALHOST user@127.0.0.1 user:secret@localhost
inside.example metadata.example. both.example xn--bcher-kva.example BÜCHER.example 127.0.0.1.nip.example
127.0.0.1. 0x7f000001. ①②⑦.0.0.1 [fe80::1%25eth0] [::ffff:0:7f00:1] public.example@127.0.0.1 127.0.0.1%00.example
"""


def lost(url: str, **changes: Any) -> Outcome:
    opener = web.Opener(DOWNLOAD.model_copy(update=changes), {}, web.HostSlots(1))
    with pytest.raises(Lost) as caught:
        opener.open(urllib.request.Request(url), timeout=1)
    return caught.value.outcome


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", FORBIDDEN.split())
def test_only_public_addresses_are_connected_to(dialled, host, scheme):
    assert lost(f"{scheme}://{host}/x.png") in (Outcome.FORBIDDEN, Outcome.DNS, Outcome.HTTP_ERROR)
    assert dialled == []


def test_public_addresses_are_connected_to_as_they_were_checked(dialled, monkeypatch):
    monkeypatch.setitem(NAMES, "mixed.example", ["127.0.0.1", "8.8.8.8", "10.0.0.1", "2606:4700::1111"])
    assert lost("http://mixed.example:8080/x.png") is Outcome.CONNECTION
    assert [place[:2] for place in dialled] == [("8.8.8.8", 8080), ("2606:4700::1111", 8080)]


def test_a_name_is_resolved_once_for_the_check_and_the_connection(dialled, monkeypatch):
    answers = iter([["8.8.8.8"], ["127.0.0.1"]])  # a name server that changes its mind
    monkeypatch.setattr(
        "datasets.fetching.web.socket.getaddrinfo", lambda _, port, **__: resolve(next(answers)[0], port)
    )
    assert lost("http://rebinding.example/x.png") is Outcome.CONNECTION
    assert dialled == [("8.8.8.8", 80)]


def test_a_name_with_many_deaf_addresses_gets_no_more_time(dialled, monkeypatch):
    class Deaf(socket.socket):
        def connect(self, place: Any) -> None:
            dialled.append(place)
            time.sleep(self.gettimeout() or 0)
            raise TimeoutError("timed out")

    monkeypatch.setattr("datasets.fetching.web.socket.socket", Deaf)
    monkeypatch.setitem(NAMES, "deaf.example", [f"8.8.8.{number}" for number in range(99)])
    opener = web.Opener(DOWNLOAD.model_copy(update={"max_seconds": 0.2}), {}, web.HostSlots(1))
    with pytest.raises(Lost) as caught:
        opener.open(urllib.request.Request("http://deaf.example/x.png"), timeout=0.05)
    assert caught.value.outcome is Outcome.TIMEOUT
    assert len(dialled) <= 5


LINK_LOCAL_AND_METADATA = """
169.254.169.254 169.254.170.2 [::ffff:169.254.169.254] [64:ff9b::a9fe:a9fe] [2002:a9fe:a9fe::] [fd00:ec2::254] [fe80::1]
100.100.100.200 168.63.129.16 192.0.0.192 0.0.0.0 [::] 224.0.0.1 2852039166 metadata.example
"""


@pytest.mark.parametrize("host", LINK_LOCAL_AND_METADATA.split())
def test_link_local_and_metadata_addresses_are_never_asked_whatever_is_allowed(dialled, host):
    everything = ("0.0.0.0/0", "::/0", "metadata.example")
    for changes in ({"allow": everything}, {"private_addresses": True}, {"allow": everything, "proxy": PROXY}):
        assert lost(f"http://{host}/x.png", **changes) in (Outcome.FORBIDDEN, Outcome.DNS)
    assert dialled == []


@pytest.mark.parametrize(
    "allow", ["inside.example", "INSIDE.example.", "10.1.2.3", "10.0.0.0/8", "10.1.2.9/24", "::ffff:10.1.2.3"]
)
def test_a_host_or_network_of_ones_own_can_be_allowed(dialled, allow):
    assert lost("http://Inside.example/x.png", allow=("8.8.8.8", allow)) is (
        Outcome.FORBIDDEN if allow.startswith("::") else Outcome.CONNECTION
    )
    assert lost("http://localhost/x.png", allow=(allow,)) is Outcome.FORBIDDEN
    assert dialled == ([] if allow.startswith("::") else [("10.1.2.3", 80)])


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("http://mirror/x", "neither"),
        ("", "blank"),
        ("a..b", "neither"),
        ("169.254.0.0/16", "never"),
        ("fe80::/64", "never"),
    ],
)
def test_what_cannot_be_allowed_is_refused_where_it_is_written(entry, told):
    with pytest.raises(ValueError, match=told):
        DownloadConfig(**{**DOWNLOAD.model_dump(), "allow": (entry,)})


PROXY = "http://127.0.0.1:3128"


@pytest.mark.parametrize("host", FORBIDDEN.split())
def test_a_proxy_is_not_asked_for_what_is_not_public(dialled, host):
    assert lost(f"http://{host}/x.png", proxy=PROXY) in (Outcome.FORBIDDEN, Outcome.DNS, Outcome.HTTP_ERROR)
    assert dialled == []


def test_a_proxy_is_asked_for_all_that_is_public_and_what_is_allowed_is_asked_itself(dialled, monkeypatch):
    monkeypatch.setitem(NAMES, "public.example", ["8.8.8.8"])
    monkeypatch.setitem(NAMES, "mixed.example", ["8.8.8.8", "10.0.0.1"])
    for scheme in ("http", "https"):
        assert lost(f"{scheme}://public.example/x.png", proxy=PROXY) is Outcome.CONNECTION
    assert lost("http://mixed.example/x.png", proxy=PROXY) is Outcome.FORBIDDEN
    assert dialled == [("127.0.0.1", 3128)] * 2
    assert lost("http://inside.example/x.png", proxy=PROXY, allow=("10.0.0.0/8",)) is Outcome.CONNECTION
    assert dialled[2:] == [("10.1.2.3", 80)]


class Proxy(BaseHTTPRequestHandler):
    """A proxy that answers by itself, and notes what it was asked for."""

    asked: ClassVar[list[str]]
    answers: ClassVar[dict[str, str]]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        location = self.answers.get(self.path)
        self.send_response(302 if location else 200)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", "0" if location else "4")
        self.end_headers()
        self.wfile.write(b"" if location else b"here")

    def do_CONNECT(self) -> None:
        self.asked.append(f"CONNECT {self.path}")
        self.send_error(403)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def proxy() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Proxy,), {"asked": [], "answers": {}})) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_proxy_gets_names_that_only_it_can_resolve_and_no_redirect_leads_it_inwards(proxy, monkeypatch):
    def unknown(host: str, port: int, *arguments: Any, **options: Any) -> list[Any]:
        if host.endswith((".example", ".internal", "intranet")) and host not in NAMES:
            raise socket.gaierror(socket.EAI_NONAME, "not known")
        return resolve(host, port, *arguments, **options)

    monkeypatch.setattr("datasets.fetching.web.socket.getaddrinfo", unknown)
    through = DOWNLOAD.model_copy(update={"proxy": f"http://127.0.0.1:{proxy.server_port}", "retries": 0})
    shared, handler = web.Opener(through, {}, web.HostSlots(8)), proxy.RequestHandlerClass

    def ask(url: str) -> Any:
        return shared.open(urllib.request.Request(url), timeout=60).read()

    assert ask("http://out.example/a%20b.png?x=1") == b"here"
    inwards = ["http://127.0.0.1/x", "http://metadata.internal/x", "http://intranet/x", "http://169.254.169.254/x"]
    for number, target in enumerate([*inwards, "http://inside.example/x", "http://[::1]/x"]):
        handler.answers[f"http://out.example/{number}"] = target
        with pytest.raises(Lost):
            ask(f"http://out.example/{number}")
    with pytest.raises(Lost):
        ask("https://out.example/x.png")
    asked = [f"http://out.example/{number}" for number in range(6)]
    assert handler.asked == ["http://out.example/a%20b.png?x=1", *asked, "CONNECT out.example:443"]


def test_private_addresses_can_be_allowed(dialled):
    assert lost("http://inside.example/x.png", private_addresses=True) is Outcome.CONNECTION
    assert dialled == [("10.1.2.3", 80)]
