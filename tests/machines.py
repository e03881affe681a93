"""Machines on this one: each has processes, an address, and a home and temporary folders that are its own.

They are namespaces of the kernel on a bridge, which takes root and iproute2. Whoever has it reaches all of them, and
they reach what listens on the bridge's address. The rest of the disk they share, but for folders that are hidden.
"""

import contextlib
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import psutil

from tests.raylets import CHECKOUT, CLUSTER_PACKAGES, HEALTH

OURS = (
    "conf",
    "datasets",
    "infra",
    "pipeline",
    "settings",
    "stages",
    "tests",
)  # what a machine without a checkout lacks
OWN = ("/tmp/ray", "/dev/shm")
START_S = 180  # on a busy machine
SIZE = (f"--object-store-memory={80 * 2**20}",)
NODE = {  # how soon a dead node counts as dead, and how long a driver may save
    **{f"RAY_{name}": str(value) for name, value in HEALTH.items()},
    "RAY_JOB_STOP_WAIT_TIME_S": "100",
}
BEGIN_RAY = "for try in 1 2 3; do {} && exec sleep infinity; ray stop --force; done"  # it waits for half a minute only
BEGIN = (
    'hostname "$NAME"; for folder in "${@:2:$1}"; do mount -t tmpfs tmpfs "$folder"; done; shift $(($1 + 1)); exec "$@"'
)


def why_not() -> str | None:
    """Why there can be none here; None: there can."""
    if os.getuid() or not shutil.which("ip") or not shutil.which("unshare"):
        return "machines of their own take root, iproute2 and util-linux"
    name = f"w{os.getpid()}"
    tried = subprocess.run(["ip", "link", "add", name, "type", "bridge"], capture_output=True, text=True)
    subprocess.run(["ip", "link", "delete", name], capture_output=True)
    return f"machines of their own take bridges: {tried.stderr.strip()}" if tried.returncode else None


class Machine:
    """One that does one thing, from its start to its end, in an `environment`; what that says is in `said`."""

    def __init__(
        self, network: str, name: str, address: str, command: Iterable[str], environment: Mapping[str, str], said: Path
    ):
        self.name, self.address, self.said = name, address, said
        home = environment["HOME"]
        own = [*OWN, home, *(str(CHECKOUT / folder) for folder in OURS)]
        Path(OWN[0]).mkdir(exist_ok=True)
        _ip("netns", "add", name)
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", name, "master", network, "up")
        for words in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            _ip("-netns", name, *words)
        _ip("-netns", name, "link", "set", "lo", "up")
        apart = ["unshare", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        begun = ["ip", "netns", "exec", name, *apart, "bash", "-ec", BEGIN, "bash", str(len(own)), *own, *command]
        with said.open("w") as told:
            self._init = subprocess.Popen(begun, env={**environment, "NAME": name}, stdout=told, stderr=told, cwd="/")

    def on(self, *command: str) -> list[str]:
        """The words of a command that runs on this machine."""
        (first,) = psutil.Process(self._init.pid).children()
        return ["nsenter", f"--target={first.pid}", "--pid", "--mount", "--net", "--uts", "--ipc", *command]

    def lose(self) -> None:
        """Pull its cable, then its plug: nobody hears a word."""
        subprocess.run(["ip", "link", "delete", self.name], capture_output=True)
        self._init.kill()
        self._init.wait()
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True)


class Machines:
    """A network of them: its own `address`, and those that were started on it."""

    def __init__(self, folder: Path):
        self._folder, self._name, self._count = folder, f"w{os.getpid()}", 1
        self._net = f"10.{os.getpid() // 250 % 250}.{os.getpid() % 250}"
        self.started: list[Machine] = []
        _ip("link", "add", self._name, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", self._name)
        _ip("link", "set", self._name, "up")

    @property
    def address(self) -> str:
        return f"{self._net}.1"

    @property
    def next_address(self) -> str:
        """That of the machine that is started next."""
        return f"{self._net}.{self._count + 1}"

    def start(self, *command: str, **environment: str) -> Machine:
        """One more, for a command in the environment of ours and this."""
        address, name = self.next_address, f"{self._name}n{self._count}"
        self._count += 1
        home = self._folder / "home"
        home.mkdir(exist_ok=True)
        known = {**os.environ, "HOME": str(home), **environment}
        known["PATH"] = f"{Path(sys.executable).parent}:{known['PATH']}"
        machine = Machine(self._name, name, address, command, known, self._folder / f"{name}.txt")
        self.started.append(machine)
        return machine

    def end(self) -> None:
        for machine in self.started:
            machine.lose()
        subprocess.run(["ip", "link", "delete", self._name], capture_output=True)


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Machines]:
    """An empty network, gone after the block with all of its machines; they write what they say into a folder."""
    machines = Machines(folder)
    try:
        yield machines
    finally:
        machines.end()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class RayMachines:
    """A Ray on machines of their own, as one starts it by hand: a head on which the driver alone runs, and workers of
    a core each without a checkout. Its `environment` is that of whoever talks to it, and of all nodes.
    """

    def __init__(self, machines: Machines, workers: int, **environment: str):
        self._machines = machines
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **NODE, **environment}
        self.environment["PYTHONPATH"] = str(CLUSTER_PACKAGES)  # what requirements-cluster.lock has beside ours
        address = machines.next_address
        own = [f"--node-ip-address={address}", f"--dashboard-host={address}", "--num-cpus=0"]
        self.head = self._start("--head", "--port=6379", *own)
        self.jobs = f"http://{address}:8265"
        self._wait_for_head(address)
        self.workers = [self.add() for _ in range(workers)]

    def add(self) -> Machine:
        """One more worker."""
        return self._start(f"--address={self.head.address}:6379", "--num-cpus=1")

    def _wait_for_head(self, address: str) -> None:
        """Until it takes jobs: then nodes may join, too."""
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection((address, 8265), timeout=1):
                return
            assert time.monotonic() < deadline, self.head.said.read_text()[-4000:]
            time.sleep(0.1)

    def _start(self, *words: str) -> Machine:
        tries = BEGIN_RAY.format(shlex.join(["ray", "start", *words, *SIZE]))
        return self._machines.start("bash", "-c", tries, **self.environment)
