"""Which process wrote something, and whether it still lives."""

import getpass
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

DRIFT_S = 2.0  # start times are counted from the boot, whose own time drifts as clocks are set


@dataclass(frozen=True)
class ProcessId:
    """A process on some host; the start time tells it from a later one with the same number.

    A host's name says little: containers may be given any, and each counts its processes from 1. What tells whether a
    number means the same process here is the boot of the kernel and the namespace of its numbers. They are "" in
    records by earlier versions, and on systems that have no such thing.
    """

    host: str
    pid: int
    started: float  # Unix time
    boot: str = ""  # random, of the time since the host's kernel was started
    namespace: str = ""  # such as pid:[4026531836]

    @classmethod
    def own(cls) -> "ProcessId":
        """This process."""
        process = psutil.Process()
        return cls(socket.gethostname(), process.pid, process.create_time(), _boot(), _namespace())

    @property
    def is_exact(self) -> bool:
        """Whether it cannot be taken for a process of another container or machine of the same name."""
        return bool(self.boot and self.namespace) or sys.platform != "linux"

    @property
    def is_local(self) -> bool:
        """Whether its number is one of our system's, as far as is known, so that `is_dead` can tell."""
        if self.boot and self.namespace:
            return (self.boot, self.namespace) == (_boot(), _namespace())
        return self.host == socket.gethostname()

    def is_dead(self) -> bool:
        """Whether it ran here and is proven to be gone; False where that cannot be known."""
        if not self.is_local:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # somebody else's, and there
            pass
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) > DRIFT_S or process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:  # it is there, and the system hides what it is (/proc with hidepid)
            return False


def user_name() -> str:
    """Who runs this process, as others may know them; by number where the system has no name for them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry of its own
        return f"user {os.getuid()}"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
