"""Answers whose lines are not as they should be: what they say of rights is heard, and what they bring is taken."""

import socket
import threading
from collections.abc import Callable, Iterator
from urllib.request import Request

import pytest

from datasets.fetching.pace import HostSlots
from datasets.fetching.web import Opener
from datasets.outcomes import Lost, Outcome
from tests.datasets.fetching.test_web import DOWNLOAD

HOST, BODY = "here.invalid", b"a picture"
Ask = Callable[..., tuple[str, bytes]]


@pytest.fixture
def ask() -> Iterator[Ask]:
    """Ask a server that answers with these lines and the body; returns how that ended, and with what."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def answer(lines: tuple[str, ...]) -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall("\r\n".join((*lines, "", "")).encode("latin-1") + BODY)

        def call(*lines: str) -> tuple[str, bytes]:
            opener = Opener(DOWNLOAD, {HOST: server.getsockname()}, HostSlots(1))
            thread = threading.Thread(target=answer, args=(lines,))
            thread.start()
            try:
                with opener.open(Request(f"http://{HOST}/x"), timeout=10) as response:
                    return "ok", response.read()
            except Lost as lost:
                return lost.outcome, b""
            finally:
                thread.join()

        yield call


@pytest.mark.parametrize(
    "lines",
    [
        ["X-Robots-Tag : noai"],
        ["X-Robots-Tag\t: noai"],
        ["Broken Header Line", "X-Robots-Tag: noai"],
        [": nameless", "X-Robots-Tag: noai"],
        ["na me: x", "X-Robots-Tag: noai"],
        ["X-First: a\rb", "X-Robots-Tag: noai"],
        ["Broken Header Line", " which goes on", "X-Robots-Tag: noai"],
        ["X-Robots-Tag: noarchive,", "\tnoai"],
        ["TDM-Reservation : 1"],
    ],
)
def test_an_opt_out_is_heard_whatever_stands_before_it(ask: Ask, lines: list[str]) -> None:
    assert ask("HTTP/1.1 200 OK", *lines, f"Content-Length: {len(BODY)}") == (Outcome.OPTED_OUT, b"")


@pytest.mark.parametrize(
    "lines",
    [
        [f"Content-Length: {len(BODY)}, {len(BODY)}"],
        [f"Content-Length: {len(BODY)}", f"Content-Length: {len(BODY)}"],
        [f"Content-Length: {len(BODY)}.0"],
        ["Content-Length: "],
        ["Content-Length: abc"],
        [f"Content-Length : {len(BODY)}"],
        ["Broken Header Line"],
        [],
    ],
)
def test_a_body_comes_whole_with_a_length_that_is_none(ask: Ask, lines: list[str]) -> None:
    assert ask("HTTP/1.1 200 OK", *lines) == ("ok", BODY)


def test_a_body_that_is_cut_short_is_told_so_also_where_its_length_is_told_twice(ask: Ask) -> None:
    assert ask("HTTP/1.1 200 OK", "Content-Length: 99, 99") == (Outcome.TRUNCATED, b"")


@pytest.mark.parametrize("status", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_what_informs_of_an_answer_to_come_is_none(ask: Ask, status: str) -> None:
    early = [f"HTTP/1.1 {status}", "Link: </x.css>; rel=preload", ""]
    assert ask(*early, *early, "HTTP/1.1 200 OK", f"Content-Length: {len(BODY)}") == ("ok", BODY)


def test_chunks_are_read_as_they_stand(ask: Ask) -> None:
    chunk = f"{len(BODY):x}\r\n{BODY.decode()}\r\n0\r\n\r\n"
    told, body = ask("HTTP/1.1 200 OK", "Transfer-Encoding : chunked", "", chunk)
    assert (told, body) == ("ok", BODY)
