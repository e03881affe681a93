"""A guard around tests of downloads: no connection leaves this machine, no name server is asked."""

import socket
import sys
import threading
from typing import Any

from datasets.config import DownloadConfig

DOWNLOAD = DownloadConfig(threads=4, timeout_s=60, retries=1, user_agent="test/1 (a@b.invalid)", max_lost=1.0)

RESOLVE = socket.getaddrinfo
watching = threading.Event()


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Stop every connection beyond this machine before it is made, whatever the code under test believes."""
    if watching.is_set() and event == "socket.connect" and isinstance(arguments[1], tuple):
        assert arguments[1][0] in ("127.0.0.1", "::1"), f"a connection to {arguments[1]}"
    if watching.is_set() and event == "socket.getaddrinfo":
        assert str(arguments[0]).strip("0123456789abcdefx:.%") == "", f"a question about {arguments[0]}"


sys.addaudithook(audit)

NAMES = {  # what the resolver of these tests says
    "localhost": ["127.0.0.1", "::1"],
    "inside.example": ["10.1.2.3"],
    "metadata.example": ["169.254.169.254"],
    "both.example": ["::ffff:192.168.0.1", "127.0.0.1"],
    "xn--bcher-kva.example": ["fd00::1"],
    "127.0.0.1.nip.example": ["127.0.0.1"],
}


def resolve(host: str | bytes, port: int, *_: Any, **__: Any) -> list[Any]:
    """What a name server would say, of these tests' names and of addresses."""
    name = host.decode() if isinstance(host, bytes) else host
    addresses = NAMES.get(name.rstrip(".").lower()) or [name]
    return [
        info
        for address in addresses
        for info in RESOLVE(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    ]
