"""A cluster of machines on this one: each has its own processes, files, host name and address, and a node of Ray.

A machine is a PID, mount, network and UTS namespace. Where the checkout lies it has none, only Python with the packages
of `requirements-cluster.lock`; /tmp, /dev/shm and the home are its own. A bridge in a namespace of its own joins them,
and this host, where the object store (behind a proxy that counts) and MLflow run, as a person's services do. All of it
is below the processes that hold the namespaces, and these end with the test's: nothing is left after, however it ends.
"""

import contextlib
import json
import os
import random
import secrets
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests import object_store
from tests.faulty_store import FaultyStore, before
from tests.raylets import CHECKOUT, CLUSTER_PACKAGES, HEALTH, TRIES

WITH_US = ("setpriv", "--pdeathsig", "KILL")  # a command that ends when we do
MACHINE = (*WITH_US, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--mount", "--net", "--uts")
NETWORK = "198.18"  # two of its bytes; reserved for tests of networks (RFC 2544)
BUCKET = "pictures"
START_S = 600  # on a busy machine
MIB = 2**20
SYSTEM = json.dumps(HEALTH)
FILES = """
set -e
hostname {name}
{keep}
for own in /tmp /dev/shm; do mount -t tmpfs none $own; done
mkdir -p /tmp/home {checkout}  # which may have lain below /tmp
mount -t tmpfs none {checkout}
{back}
echo begun
read -r _ || true  # the first process buries the dead, and ends with whoever holds its input
"""


def lacking() -> str | None:
    """Why no such cluster can be made here; None where it can."""
    if not CLUSTER_PACKAGES.is_dir():
        return "Ray has no job server without the packages of clusters: make test-cluster puts them there"
    try:
        subprocess.run([*MACHINE, "true"], check=True, capture_output=True, text=True)
        Lan().close()
    except FileNotFoundError as error:
        return f"no namespaces: there is no {error.filename}"
    except subprocess.CalledProcessError as error:
        return f"no namespaces: {error.stderr.strip()}"
    return None


class Lan:
    """A bridge, in a network namespace of its own, and this host on it."""

    def __init__(self) -> None:
        self.net = f"{NETWORK}.{random.randrange(1, 255)}"
        self.host = f"{self.net}.254"
        self._held = subprocess.Popen([*WITH_US, "unshare", "--net", "cat"], stdin=subprocess.PIPE)
        self._inside = ("nsenter", f"--net=/proc/{self._held.pid}/ns/net")
        try:
            self._join()
        except BaseException:
            self.close()
            raise

    def _join(self) -> None:
        """Make the bridge, and this host's card on it."""
        wait_for(lambda: _apart(self._held.pid), self._held)
        _ip("link add switch type bridge forward_delay 0", *self._inside)
        _ip("link set switch up", *self._inside)
        card = f"wst{self._held.pid}"
        _ip(f"link add {card} type veth peer name host netns {self._held.pid}")
        _ip(f"address add {self.host}/24 dev {card}")
        _ip(f"link set {card} up")
        _ip("link set host master switch up", *self._inside)

    def connect(self, pid: int, number: int) -> str:
        """Give the machine of a process a card with an address on it."""
        address, card = f"{self.net}.{number}", f"machine-{number}"
        there = ("nsenter", f"--net=/proc/{pid}/ns/net")
        _ip(f"link add {card} type veth peer name eth0 netns {pid}", *self._inside)
        _ip(f"link set {card} master switch up", *self._inside)
        _ip(f"address add {address}/24 dev eth0", *there)
        for each in ("eth0", "lo"):
            _ip(f"link set {each} up", *there)
        return address

    def close(self) -> None:
        self._held.kill()
        self._held.wait()


class Machine:
    """One of them, which holds nothing but what a command in it starts."""

    def __init__(self, lan: Lan, number: int, environment: dict[str, str]):
        self.name = f"machine-{number}"
        kept = [folder for folder in (Path(sys.prefix), CLUSTER_PACKAGES) if folder.is_relative_to(CHECKOUT)]
        spare = [Path("/mnt"), Path("/media")]  # that any Linux has, to hold a folder for a moment
        keep = [f"mount --bind {shlex.quote(str(folder))} {at}" for folder, at in zip(kept, spare, strict=False)]
        back = [
            f"mkdir {shlex.quote(str(folder))} && mount --bind {at} {shlex.quote(str(folder))} && umount {at}"
            for folder, at in zip(kept, spare, strict=False)
        ]
        script = FILES.format(
            name=self.name, keep="\n".join(keep), checkout=shlex.quote(str(CHECKOUT)), back="\n".join(back)
        )
        self._held = subprocess.Popen(
            [*MACHINE, "bash", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._held.stdout
        assert self._held.stdout.readline() == "begun\n", "no machine could be made"
        (first,) = psutil.Process(self._held.pid).children()
        self.address = lan.connect(first.pid, number)
        self._inside = ("nsenter", f"--target={first.pid}", "--pid", "--mount", "--net", "--uts", "--wdns=/tmp/home")
        self.environment = environment

    def command(self, *words: str) -> list[str]:
        """A command, as it is called from here to run there."""
        return [*self._inside, "env", "-i", *(f"{name}={value}" for name, value in self.environment.items()), *words]

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command there, to its end."""
        done = subprocess.run(self.command(*words), capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def go(self) -> None:
        """End as in a power cut."""
        self._held.kill()  # and with it the first process of its namespace, and so all others
        self._held.wait()


class Machines:
    """Such a cluster: a head without CPUs for work, nodes of one CPU each, the store and MLflow.

    `store` is the proxy before the store, `url` MLflow's address, `environment` what a person's shell has who hands in
    jobs.
    """

    def __init__(self, nodes: int, lan: Lan, store: FaultyStore, url: str):
        self.store, self.url, self._lan = store, url, lan
        self.made: list[Machine] = []
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.storage = {**object_store.ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://{lan.host}:{store.port}"}
        self._there = {
            **token,
            **self.storage,
            "RAY_JOB_STOP_WAIT_TIME_S": "100",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"]),
            "PYTHONPATH": str(CLUSTER_PACKAGES),
            "HOME": "/tmp/home",
            "LANG": "C.UTF-8",
        }
        self.head = self._machine()
        address = self.head.address
        self.environment = {**os.environ, **token, "RAY_API_SERVER_ADDRESS": f"http://{address}:8265"}
        self.environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self._join(self.head, "--head", "--num-cpus=0", f"--dashboard-host={address}", f"--system-config={SYSTEM}")
        self.nodes = [self.add() for _ in range(nodes)]

    def add(self) -> Machine:
        """One more node."""
        machine = self._machine()
        self._join(machine, f"--address={self.head.address}:6379", "--num-cpus=1")
        return machine

    def submit(self, name: str, *words: str, log: Path) -> "subprocess.Popen[bytes]":
        """Hand a command to the cluster as a job, as a person does: what is said goes to a file, to the job's end."""
        command = ["ray", "job", "submit", "--working-dir", ".", "--submission-id", name, "--", *words]
        with log.open("wb") as told:
            return subprocess.Popen(command, cwd=CHECKOUT, env=self.environment, stdout=told, stderr=told)

    def stop(self, name: str) -> None:
        """Have a job stopped, as a person does, and do not wait for its end."""
        subprocess.run(["ray", "job", "stop", "--no-wait", name], check=True, env=self.environment, capture_output=True)

    def _machine(self) -> Machine:
        self.made.append(Machine(self._lan, len(self.made) + 1, self._there))
        return self.made[-1]

    def _join(self, machine: Machine, *words: str) -> None:
        command = ["ray", "start", f"--node-ip-address={machine.address}", f"--object-store-memory={80 * MIB}", *words]
        for _ in range(TRIES - 1):  # a busy machine gets another one, since Ray waits for half a minute only
            if machine.run(*command, check=False).returncode == 0:
                return
            machine.run("ray", "stop", "--force")
        machine.run(*command)

    def close(self) -> None:
        for machine in self.made:
            machine.go()


@contextmanager
def running(folder: Path, nodes: int) -> Iterator[Machines]:
    """A head and so many nodes; gone after the block, with the folder's objects and figures."""
    with contextlib.ExitStack() as stack:
        lan = stack.enter_context(contextlib.closing(Lan()))
        server = stack.enter_context(object_store.serving(folder / "objects", BUCKET))
        store = stack.enter_context(before(server.url, lan.host))
        url = stack.enter_context(mlflow(folder, lan.host))
        yield stack.enter_context(contextlib.closing(Machines(nodes, lan, store, url)))


@contextmanager
def mlflow(folder: Path, host: str) -> Iterator[str]:
    """An MLflow server, which keeps its figures in a folder; its URL."""
    command = [*WITH_US, sys.executable, "-m", "mlflow", "server", "--host", host, "--port", "5000", "--workers", "1"]
    command += ["--allowed-hosts", f"{host}:5000", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    quiet = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "mlflow.log").open("wb") as told:
        server = subprocess.Popen(command, cwd=folder, env=quiet, stdout=told, stderr=told)
    try:
        wait_for(lambda: _answers(f"http://{host}:5000/health"), server)
        yield f"http://{host}:5000"
    finally:
        server.terminate()
        server.wait()


def wait_for(event: Callable[[], bool], process: "subprocess.Popen[bytes]", patience_s: float = START_S) -> None:
    """Wait until something is so, for as long as a process lives."""
    deadline = time.monotonic() + patience_s
    while not event():
        assert process.poll() is None, f"{process.args} ended before"
        assert time.monotonic() < deadline, f"{process.args}: it never was so"
        time.sleep(0.05)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _apart(pid: int) -> bool:
    """Whether a process has a network of its own already."""
    return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


def _ip(words: str, *inside: str) -> None:
    subprocess.run([*inside, "ip", *words.split()], check=True, capture_output=True, text=True)
