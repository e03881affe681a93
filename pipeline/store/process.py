"""Which process wrote something, and whether it still lives."""

import getpass
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

DRIFT_S = 2.0  # of start times, where ticks are not known: they are counted from the boot, whose own time drifts


@dataclass(frozen=True)
class ProcessId:
    """A process on some host; when it was started tells it from a later one with the same number.

    A host's name says little: containers may be given any, and each counts its processes from 1. What tells whether a
    number means the same process here is the boot of the kernel and the namespace of its numbers. They are "" in
    records by earlier versions, and on systems that have no such thing.
    """

    host: str
    pid: int
    started: float  # Unix time, as clocks were set when somebody asked
    boot: str = ""  # random, of the time since the host's kernel was started
    namespace: str = ""  # such as pid:[4026531836]
    ticks: int = 0  # of the kernel, from its boot to the start: no clock that is set changes them; 0: not known

    @classmethod
    def own(cls) -> "ProcessId":
        """This process."""
        process = psutil.Process()
        started = process.create_time()
        return cls(socket.gethostname(), process.pid, started, _boot(), _namespace(), _ticks(process.pid))

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "ProcessId":
        """What a record says, by this version or another: more is passed over; what lacks is of nobody known."""
        nobody = vars(cls("an unknown host", 0, 0.0))
        told = {name: record[name] for name in nobody if name in record and _fits(record[name], nobody[name])}
        return cls(**nobody | told)

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
            return self._is_another(process) or process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:  # it is there, and the system hides what it is (/proc with hidepid)
            return False

    def _is_another(self, process: psutil.Process) -> bool:
        """Whether a process with our number here was started at another time."""
        now = _ticks(self.pid)
        if self.ticks and now:
            return now != self.ticks
        return abs(process.create_time() - self.started) > DRIFT_S


def _fits(value: object, like: object) -> bool:
    """Whether a value is of the type that a field has; JSON may write a whole number for a real one."""
    return not isinstance(value, bool) and isinstance(value, int | float if isinstance(like, float) else type(like))


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


def _ticks(pid: int) -> int:
    try:
        told = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:  # not Linux, or hidden
        return 0
    return int(told.rpartition(b")")[2].split()[19])  # field 22; the name before it may hold anything


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
