"""What the tests of downloads share."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.datasets.fetching.guarded import resolve, watching
from tests.datasets.fetching.servers import serving


@pytest.fixture
def nothing_leaves_this_machine() -> Iterator[None]:
    """Every connection beyond it, and every question to a name server, is an error."""
    watching.set()
    yield
    watching.clear()


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Addresses that were connected to, by a socket that refuses; no name server is asked."""
    places: list[Any] = []

    class Refusing(socket.socket):
        def connect(self, place: Any) -> None:
            places.append(place)
            raise ConnectionRefusedError(111, "refused")

    monkeypatch.setattr("datasets.fetching.web.socket.getaddrinfo", resolve)
    monkeypatch.setattr("datasets.fetching.web.socket.socket", Refusing)
    return places


@pytest.fixture
def server() -> Iterator[Any]:
    """One of `servers`."""
    with serving() as running:
        yield running
