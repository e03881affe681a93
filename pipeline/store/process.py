"""Which process wrote something, and whether it still lives."""

import getpass
import os
import socket
from dataclasses import dataclass

import psutil


def user_name() -> str:
    """Who runs this; a number where no name belongs to it, as in a container that was given one (`--user 12345`)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the latter from Python 3.13 on
        return f"uid {os.getuid()}"


@dataclass(frozen=True)
class ProcessId:
    """A process on some host; the start time tells it from a later one with the same number."""

    host: str
    pid: int
    started: float  # Unix time

    @classmethod
    def own(cls) -> "ProcessId":
        """This process."""
        process = psutil.Process()
        return cls(socket.gethostname(), process.pid, process.create_time())

    @property
    def is_local(self) -> bool:
        """Whether it ran on this host, so that `is_dead` can tell."""
        return self.host == socket.gethostname()

    def is_dead(self) -> bool:
        """Whether it ran on this host and is proven to be gone; False where that cannot be known."""
        if not self.is_local:
            return False
        try:
            process = psutil.Process(self.pid)
            moved = abs(process.create_time() - self.started) > 2  # seconds: the boot time that it is based on drifts
            return moved or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
