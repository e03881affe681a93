"""A cluster of machines on this one: each has its own processes, files, host name and address, and a node of Ray.

A machine is a PID, mount, network and UTS namespace. Where the checkout lies it has none, only Python with the packages
of `requirements-cluster.lock`; /tmp, /dev/shm and the home are its own. A bridge in a namespace of its own joins them,
and this host, where the object store (behind a proxy that counts) and MLflow run, as a person's services do. All of it
is below the processes that hold the namespaces, and these end with the test's: nothing is left after, however it ends.
"""

import contextlib
import json
import math
import os
import random
import secrets
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from pipeline.cluster.joining import PACKAGES
from tests import object_store, postgres
from tests.faulty_store import FaultyStore, before
from tests.postgres import wait_for
from tests.raylets import CHECKOUT, CLUSTER_PACKAGES, HEALTH, TRIES

WITH_US = ("setpriv", "--pdeathsig", "KILL")  # a command that ends when we do
MACHINE = (*WITH_US, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--mount", "--net", "--uts")
NETWORK = "198.18"  # two of its bytes; reserved for tests of networks (RFC 2544)
BUCKET = "pictures"
PARTS = (*PACKAGES, "conf")  # of the checkout, without which nothing runs
START_S = 600  # on a busy machine
GRACE_S = 120  # that a drained node has
MIB = 2**20
SYSTEM = json.dumps({**HEALTH, "health_check_failure_threshold": 8})  # a busy machine is not dead: none comes back
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
    return postgres.lacking()


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
        self.joined = math.inf

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
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"]),
            "PYTHONPATH": str(CLUSTER_PACKAGES),
            "HOME": "/tmp/home",
            "LANG": "C.UTF-8",
        }
        self.environment = {**os.environ, **token}
        self.environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.head = self._headed()
        self.nodes: list[Machine] = []
        for _ in range(nodes):
            self.add()

    def add(self) -> Machine:
        """One more node."""
        machine = self._machine()
        self._join(machine, *self._as_node())
        self.nodes.append(machine)
        return machine

    def lose(self, *machines: Machine) -> None:
        """Nodes lose their power."""
        for machine in machines:
            self.nodes.remove(machine)
            machine.go()

    def drain(self, machine: Machine) -> None:
        """Have Ray told that a node will be taken away, as operators do; it is none of the nodes any more."""
        self.nodes.remove(machine)
        words = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        machine.run("ray", "drain-node", *words, "--deadline-remaining-seconds", str(GRACE_S))

    def lose_head(self) -> None:
        """The head loses its power; what runs on the nodes does not know yet."""
        self.head.go()

    def new_head(self) -> None:
        """Another head, which the nodes join."""
        self.head = self._headed()
        for machine in self.nodes:
            machine.run("ray", "stop", "--force")
            self._join(machine, *self._as_node())

    def used_after(self, machine: Machine, root: str, artifact: str) -> float | None:
        """Seconds from a node's joining until it stored the first of an artifact below a root; None: it has not."""
        place = f"{root.removeprefix('s3:/')}/artifacts/{artifact}/"
        stored = [at for path, at in self.store.written.get(machine.address, {}).items() if path.startswith(place)]
        return min(stored) - machine.joined if stored else None

    def submit(self, name: str, *words: str, log: Path) -> "subprocess.Popen[bytes]":
        """Hand a command to the cluster as a job, as a person does: what is said goes to a file, to the job's end."""
        command = ["ray", "job", "submit", "--working-dir", ".", "--submission-id", name, "--", *words]
        with log.open("wb") as told:
            return subprocess.Popen(command, cwd=CHECKOUT, env=self.environment, stdout=told, stderr=told)

    def drive(self, *words: str, log: Path) -> "subprocess.Popen[bytes]":
        """Run a command on the head, in a checkout that no other machine has: what is said goes to a file."""
        pack = ["tar", "--create", "--exclude=__pycache__", *PARTS]
        unpack = self.head.command("tar", "--extract", "--one-top-level=checkout")
        with subprocess.Popen(pack, cwd=CHECKOUT, stdout=subprocess.PIPE) as packed:
            subprocess.run(unpack, stdin=packed.stdout, check=True)
        with log.open("wb") as told:
            command = self.head.command("env", "--chdir=checkout", *words)
            return subprocess.Popen(command, stdout=told, stderr=told)

    def stop(self, name: str) -> None:
        """Have a job stopped, as a person does, and do not wait for its end."""
        subprocess.run(["ray", "job", "stop", "--no-wait", name], check=True, env=self.environment, capture_output=True)

    def _as_node(self) -> list[str]:
        return [f"--address={self.head.address}:6379", "--num-cpus=1"]

    def _headed(self) -> Machine:
        """A new head."""
        head = self._machine()
        self.environment["RAY_API_SERVER_ADDRESS"] = f"http://{head.address}:8265"
        self._join(head, "--head", "--num-cpus=0", f"--dashboard-host={head.address}", f"--system-config={SYSTEM}")
        return head

    def _machine(self) -> Machine:
        self.made.append(Machine(self._lan, len(self.made) + 1, self._there))
        return self.made[-1]

    def _join(self, machine: Machine, *words: str) -> None:
        command = ["ray", "start", f"--node-ip-address={machine.address}", f"--object-store-memory={80 * MIB}", *words]
        for _ in range(TRIES - 1):  # a busy machine gets another one, since Ray waits for half a minute only
            if machine.run(*command, check=False).returncode == 0:
                break
            machine.run("ray", "stop", "--force")
        else:
            machine.run(*command)
        machine.joined = time.monotonic()

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
    """An MLflow server, which keeps its figures in Postgres; its URL."""
    with postgres.serving() as port, (folder / "mlflow.log").open("wb") as told:
        figures = f"postgresql://{postgres.USER}:{postgres.PASSWORD}@127.0.0.1:{port}/{postgres.DATABASE}"
        command = [*WITH_US, sys.executable, "-m", "mlflow", "server", "--host", host, "--port", "5000"]
        command += ["--workers", "1", "--allowed-hosts", f"{host}:5000", "--backend-store-uri", figures]
        quiet = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        server = subprocess.Popen(command, cwd=folder, env=quiet, stdout=told, stderr=told)
        try:
            wait_for(lambda: _answers(f"http://{host}:5000/health"), server, START_S)
            yield f"http://{host}:5000"
        finally:
            server.terminate()
            server.wait()


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
