"""A real headless Chromium, driven through its DevTools protocol; aiohttp, which Ray brings, has the websocket."""

import asyncio
import base64
import itertools
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_CHROMIUM = "no Chromium is installed (Debian: apt-get install chromium)"
START_S = 120.0
VIRTUAL_KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Backspace": 8, "Tab": 9, "Enter": 13}


def needs_chromium(test: Any) -> Any:
    """Mark a test that drives it; skipped, with the reason, where there is none."""
    return pytest.mark.browser(pytest.mark.skipif(PROGRAM is None, reason=NO_CHROMIUM)(test))


class Page:
    """A page that is open in it. `asked` are the addresses that it requested, data within the page left out."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._loop, self._socket = loop, socket
        self._numbers = itertools.count(1)
        self._events: list[dict[str, Any]] = []

    @property
    def asked(self) -> list[str]:
        """Every address so far."""
        requests = (event["params"] for event in self._events if event["method"] == "Network.requestWillBeSent")
        return [request["request"]["url"] for request in requests if not request["request"]["url"].startswith("data:")]

    @property
    def complaints(self) -> list[str]:
        """Errors of scripts, and what the page's own security policy has refused."""
        errors = [event["params"] for event in self._events if event["method"] == "Runtime.exceptionThrown"]
        entries = [event["params"]["entry"] for event in self._events if event["method"] == "Log.entryAdded"]
        return [str(error) for error in errors] + [entry["text"] for entry in entries if entry["level"] == "error"]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What a method of the protocol answers."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        self._loop.run_until_complete(self._socket.send_json(message))
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def open(self, address: str) -> None:
        """Go to an address, or once more to where one is, and wait until all is loaded."""
        before = self._loads()
        self.call("Page.navigate", url=address)
        self._loaded_after(before)

    def reload(self) -> None:
        """Load the page anew."""
        before = self._loads()
        self.call("Page.reload")
        self._loaded_after(before)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression comes to."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """A key goes down and up."""
        about = {"key": key, "code": key, "windowsVirtualKeyCode": VIRTUAL_KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def touch(self, element: str) -> None:
        """A finger taps the middle of the element of an id."""
        self.value(f"document.getElementById('{element}').scrollIntoView({{block: 'center'}})")
        box = self.value(f"document.getElementById('{element}').getBoundingClientRect().toJSON()")
        where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[where])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def screenshot(self, path: Path) -> None:
        """A PNG of what is to be seen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _loads(self) -> int:
        return sum(event["method"] == "Page.loadEventFired" for event in self._events)

    def _loaded_after(self, before: int) -> None:
        while self._loads() == before:
            self._receive()

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = self._loop.run_until_complete(self._socket.receive_json(timeout=START_S))
        if "method" in message:
            self._events.append(message)
        return message


@contextmanager
def page(folder: Path, width: int = 1200, height: int = 800, touch: bool = False) -> Iterator[Page]:
    """An empty page of a new browser with its profile in `folder`, and its downloads in `folder`/downloads; closed at
    the end, with the browser."""
    profile, downloads = folder / "profile", folder / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--no-proxy-server"]
    flags += ["--remote-debugging-port=0", f"--user-data-dir={profile}", f"--window-size={width},{height}"]
    with open(folder / "chromium.log", "wb") as log:
        browser = subprocess.Popen([str(PROGRAM), *flags, "about:blank"], stdout=log, stderr=log)
    loop = asyncio.new_event_loop()
    try:
        port = _port(profile / "DevToolsActivePort", browser)
        session, socket = loop.run_until_complete(_connected(port))
        opened = Page(loop, socket)
        for domain in ("Page", "Runtime", "Network", "Log"):
            opened.call(f"{domain}.enable")
        opened.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        if touch:
            opened.call("Emulation.setTouchEmulationEnabled", enabled=True)
        yield opened
        loop.run_until_complete(session.close())
    finally:
        loop.close()
        browser.terminate()
        browser.wait()


def _port(file: Path, browser: "subprocess.Popen[bytes]") -> int:
    """The port that the browser chose, once it has told."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert browser.poll() is None, f"Chromium ended with {browser.returncode}"
        if file.exists() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        time.sleep(0.05)
    raise TimeoutError("Chromium did not start")


async def _connected(port: int) -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
    """A connection to the first page."""
    session = aiohttp.ClientSession()
    async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
        targets = await answer.json()
    address = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
    return session, await session.ws_connect(address, max_msg_size=0)
