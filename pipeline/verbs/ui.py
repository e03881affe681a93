"""The MLflow UI of a root: MLflow's own server, on this machine's loopback address only."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets.files import json_files, storage
from pipeline.environment import quiet_environment
from pipeline.errors import UsageError
from pipeline.settings import compose
from pipeline.settings.words import Words
from pipeline.store.process import ProcessId
from pipeline.terminal import console
from pipeline.tracking.mlflow_store import MlflowStore, locate_store, no_proxy_here, relocate, why_silent

PORT = 5000
START_S = 120.0
STOP_S = 10.0
HEALTH_S = 5.0  # for an answer


def handle(words: Words) -> None:
    port = words.number("port", "where MLflow listens", 1, 65_535) or PORT
    tracking = compose.load(words.conf or "stage_c", words.overrides).tracking
    store = locate_store(storage.absolute(words.root), tracking.uri)
    if url := served(store):
        _tell(url, tracking.experiment)
        return
    for number in (signal.SIGTERM, signal.SIGHUP):  # the server must not outlive us
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), serve_ui(store, port) as url:
        _tell(url, tracking.experiment, " (Ctrl-C ends it)")
        threading.Event().wait()


def _tell(url: str, experiment: str, how_long: str = "") -> None:
    console.print(f"MLflow: {url}{runs_page(url, experiment)}{how_long}", soft_wrap=True, markup=False)


def served(store: MlflowStore) -> str | None:
    """The URL of the server that somebody else keeps open on a store; None where nobody does.

    Raises:
        UsageError: the config names a server, and none answers there.
    """
    if store.artifacts is not None:
        return _open_elsewhere(store)
    if reason := why_silent(store.uri):
        raise UsageError(f"tracking.uri={store.uri}: no MLflow server answers there ({reason})")
    return store.uri


@contextlib.contextmanager
def serve_ui(store: MlflowStore, port: int) -> Iterator[str]:
    """Yield the URL of the MLflow UI once it answers; a local store gets a server for the time of the block.

    The server listens on 127.0.0.1 only and takes 10 to 30 seconds to start. Where one is open on this store already,
    its URL is yielded, whatever the port, and it stays open.

    Raises:
        UsageError: there is no store yet, the port is taken, or the server ended or did not answer in time.
    """
    if url := served(store):
        yield url
        return
    if not store.database.exists():
        raise UsageError(f"root: there is no MLflow store {store.database} yet; run something first")
    relocate(store)
    _check_port(port)
    # One worker and no job runner: a third of the memory that MLflow's defaults take.
    no_proxy_here()
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--backend-store-uri", store.uri]
    command += ["--no-serve-artifacts", "--default-artifact-root", str(store.location)]
    environment = {**os.environ, **quiet_environment(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    ours = os.access(store.database.parent, os.W_OK)  # else somebody else's, who lets us look at it
    output = (store.database.parent if ours else Path(tempfile.mkdtemp(prefix="ui-"))) / "ui.log"
    with open(output, "wb") as stream:
        server = subprocess.Popen(
            command, env=environment, cwd=output.parent, stdout=stream, stderr=stream, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(url, server, output)
        if ours:
            told = {"url": url, "database": _real(store), **vars(ProcessId.own())}
            _note(store).write_text(json.dumps(told))
        yield url
    finally:
        if ours:
            _note(store).unlink(missing_ok=True)
        _stop(server)


def runs_page(url: str, experiment: str) -> str:
    """What follows a server's address, to see the runs of an experiment; nothing where the server tells of none.

    Alone, the address shows a page of other uses of MLflow.
    """
    no_proxy_here()
    query = urllib.parse.urlencode({"experiment_name": experiment})
    try:
        with urllib.request.urlopen(
            f"{url}/api/2.0/mlflow/experiments/get-by-name?{query}", timeout=HEALTH_S
        ) as answer:
            number = json.load(answer)["experiment"]["experiment_id"]
    except (OSError, ValueError, KeyError):
        return ""
    return f"/#/experiments/{number}/runs?workflowType=machine_learning&compareRunsMode=CHART"


def _note(store: MlflowStore) -> Path:
    """The file in which the server that is open on a local store tells where."""
    return store.database.with_name("ui.json")


def _real(store: MlflowStore) -> str:
    """Where a store's file lies: a note may have been copied with it, from beside another."""
    return str(store.database.resolve())


def _open_elsewhere(store: MlflowStore) -> str | None:
    """The URL of the server that another process of this machine keeps open on the same store."""

    def read(told: dict[str, Any]) -> tuple[str, str | None, ProcessId]:
        return str(told.pop("url")), told.pop("database", None), ProcessId.of(told)

    if (said := json_files.read(str(_note(store)), read)) is None:
        return None
    url, database, process = said
    return url if database == _real(store) and process.is_local and not process.is_dead() else None


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UsageError(f"port={port}: cannot be used ({error}); choose another port=") from None


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=HEALTH_S):
            return
        time.sleep(0.3)
    raise UsageError(f"the MLflow UI did not start; {output} says why")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it forked, which share its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_S)
