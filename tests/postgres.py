"""A real Postgres for MLflow's figures, on loopback, in a folder of its own: Debian's package `postgresql`."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

USER = DATABASE = "mlflow"
PASSWORD = "p" * 24
START_S = 180


def programs() -> Path | None:
    """Where those of Postgres are, for Debian keeps those of a version apart; None where there are none."""
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: int(path.parent.name))


def lacking() -> str | None:
    """Why there is no such server here; None where there is."""
    return None if programs() else "there is no Postgres: install Debian's package `postgresql`"


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@contextmanager
def serving() -> Iterator[int]:
    """A server with a database and its owner; its port."""
    there, port = programs(), free_port()
    assert there
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        yield from _serving(Path(folder), there, port)


def _serving(folder: Path, there: Path, port: int) -> Iterator[int]:
    data, password = folder / "data", folder / "password"
    password.write_text(PASSWORD)
    other: dict[str, Any] = {}
    if os.getuid() == 0:  # it refuses root
        shutil.chown(folder, "postgres")
        shutil.chown(password, "postgres")
        other = {"user": "postgres", "group": "postgres", "extra_groups": []}
    words = [there / "initdb", "--pgdata", data, f"--username={USER}", "--auth=scram-sha-256", "--no-sync"]
    subprocess.run([*words, f"--pwfile={password}"], check=True, stdout=subprocess.DEVNULL, cwd=folder, **other)
    options = ["-p", str(port), "-h", "127.0.0.1", "-k", str(folder), "-F"]
    with subprocess.Popen([there / "postgres", "-D", data, *options], cwd=folder, **other) as server:
        try:
            ready = [there / "pg_isready", "--host=127.0.0.1", f"--port={port}", "--quiet"]
            wait_for(lambda: subprocess.run(ready).returncode == 0, server)
            where = ["--host=127.0.0.1", f"--port={port}", f"--username={USER}"]
            known = {**os.environ, "PGPASSWORD": PASSWORD}
            subprocess.run([there / "createdb", *where, DATABASE], check=True, env=known)  # as the image does
            yield port
        finally:
            server.send_signal(signal.SIGINT)  # at once, whoever is connected still


def wait_for(ready: Callable[[], bool], process: "subprocess.Popen[Any]", patience_s: float = START_S) -> None:
    """Wait until something is so, for as long as a process lives."""
    deadline = time.monotonic() + patience_s
    while not ready():
        assert process.poll() is None, f"{process.args} ended before"
        assert time.monotonic() < deadline, f"{process.args}: it never was so"
        time.sleep(0.05)
