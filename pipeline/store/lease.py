"""Leases: whoever builds an artifact says so, so that two runs may share a root.

A lease is a small file in the artifact's building folder with the owner and a heartbeat counter. Another run takes it
over only on proof of death: the owner's process is gone from this host, or its counter stood still for a minute.
"""

import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from datasets.files import json_files, storage
from pipeline.errors import LeaseHeld
from pipeline.store.artifacts import LEASE
from pipeline.store.process import ProcessId, user_name

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
SILENCE_S = 60.0
NOBODY = {"host": "an unknown machine", "pid": 0, "started": 0.0, "user": "somebody", "token": None, "heartbeat": None}


@contextlib.contextmanager
def hold(artifact_path: str, notify: Callable[[str], None], silence_s: float = SILENCE_S) -> Iterator[None]:
    """Hold the lease on an artifact for the time of its build; `LeaseHeld` when a live owner has it."""
    path = storage.join(artifact_path, LEASE)
    token = uuid.uuid4().hex
    _acquire(path, token, notify, silence_s)
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(HEARTBEAT_S):
            count += 1
            try:
                if _holder(path) == token:  # else somebody took us for dead
                    storage.publish(_owner(token, count), path)
            except OSError as error:  # the next beat may get through
                log.warning("a heartbeat of %s failed: %s", path, error)

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if _holder(path) == token:
            storage.remove(path)


def _owner(token: str, heartbeat: int) -> bytes:
    owner = {**vars(ProcessId.own()), "user": user_name(), "token": token, "heartbeat": heartbeat}
    return json.dumps(owner).encode()


def _holder(path: str) -> str | None:
    """The token of whoever holds the lease now; None where nobody does, or the lease is damaged."""
    return json_files.read(path, lambda told: str(told["token"]))


def _owner_of(path: str) -> dict[str, Any] | None:
    """What a lease says of its owner, somebody silent where it is damaged; None where it is gone."""
    owner = json_files.read(path, lambda told: {key: told[key] for key in NOBODY})
    return owner or (NOBODY if storage.exists(path) else None)


def _acquire(path: str, token: str, notify: Callable[[str], None], silence_s: float) -> None:
    while not storage.create(_owner(token, 0), path):
        owner = _owner_of(path)
        if owner is None:  # released in between
            continue
        if not _dead(owner, path, notify, silence_s):
            raise LeaseHeld(
                f"{path.rsplit('/', 2)[0]} is being built by {owner['user']} on {owner['host']} (pid {owner['pid']}); "
                "wait for that run, or stop it"
            )
        if _holder(path) == owner["token"]:  # nobody else has taken over meanwhile
            notify(f"taking over from pid {owner['pid']} on {owner['host']}, which died")
            storage.remove(path)


def _dead(owner: dict[str, Any], path: str, notify: Callable[[str], None], silence_s: float) -> bool:
    """Proof that a lease's owner no longer lives."""
    process = ProcessId(owner["host"], owner["pid"], owner["started"])
    if process.is_local:
        return process.is_dead()
    notify(f"watching the lease of pid {owner['pid']} on {owner['host']} for {silence_s:.0f} s for a sign of life")
    deadline = time.monotonic() + silence_s
    while time.monotonic() < deadline:
        time.sleep(min(1.0, silence_s))
        now = _owner_of(path)
        if now is None:
            return True
        if now["heartbeat"] != owner["heartbeat"]:
            return False
    return True
