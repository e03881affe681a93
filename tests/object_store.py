"""A real S3 server on loopback, SeaweedFS in a process of its own, which can go and come back with what it holds."""

import json
import os
import shutil
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = {  # that Arrow and boto3 want beside an address
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
PARTS = ("master", "volume", "filer", "s3")  # of the server, each with a port for HTTP and one for gRPC
ACTIONS = ["Admin", "Read", "Write", "List", "Tagging"]
USERS = {  # those of the environment, and everybody: we make buckets without keys
    "identities": [
        {"name": "tests", "credentials": [{"accessKey": "test", "secretKey": "test"}], "actions": ACTIONS},
        {"name": "anonymous", "actions": ACTIONS},
    ]
}
START_S = 120  # on a busy machine
QUICKLY = ["-master.heartbeatInterval=50ms", "-master.electionTimeout=200ms"]  # it waits for no other


class ObjectStore:
    """The server; it keeps its objects and its words in a folder, and its address for as long as it is there."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._running: subprocess.Popen[bytes] | None = None
        self._ports = {part: _free_ports() for part in PARTS}
        self.url = f"http://127.0.0.1:{self._ports['s3'][0]}"
        self.come()

    @property
    def environment(self) -> dict[str, str]:
        """What the environment must hold to find it."""
        return {"AWS_ENDPOINT_URL": self.url, **ENVIRONMENT}

    def come(self) -> None:
        """Start, and wait until it takes objects."""
        weed = Path(sysconfig.get_path("scripts"), "weed")
        ports = [f"-{part}.port={http}" for part, (http, _) in self._ports.items()]
        ports += [f"-{part}.port.grpc={grpc}" for part, (_, grpc) in self._ports.items()]
        command = [weed, "-logtostderr", "server", "-ip=127.0.0.1", f"-dir={self._folder}", "-filer", "-s3", *ports]
        command += ["-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"]
        command += ["-s3.autoCreateBucket=false"]  # who writes to a bucket that is not there is refused, as elsewhere
        command += ["-master.volumeSizeLimitMB=64", "-volume.max=100", *QUICKLY]
        command += [f"-{part}.localSocket={self._folder}/{part}.sock" for part in ("filer", "s3")]
        users = self._folder / "users.json"
        users.write_text(json.dumps(USERS))
        command.append(f"-s3.config={users}")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}  # they are its users
        with open(self._folder / "said.txt", "ab") as said:
            self._running = subprocess.Popen(command, stdout=said, stderr=said, cwd=self._folder, env=kept)
        deadline = time.monotonic() + START_S
        while not self._takes_objects():
            assert self._running.poll() is None, (self._folder / "said.txt").read_text()[-2000:]
            assert time.monotonic() < deadline, (self._folder / "said.txt").read_text()[-2000:]
            time.sleep(0.05)

    def go(self) -> None:
        """End as in a power cut; what it holds stays."""
        if self._running:
            self._running.kill()
            self._running.wait()
            self._running = None
        for _, port in self._ports.values():
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)

    def make_bucket(self, name: str) -> None:
        self._put(f"/{name}")

    def _takes_objects(self) -> bool:
        try:
            self.make_bucket("started")
            self._put("/started/object", b"content")
        except OSError:
            return False
        return True

    def _put(self, path: str, data: bytes | None = None) -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(self.url + path, data=data, method="PUT"), timeout=30)
        except urllib.error.HTTPError as error:
            if error.code != 409:  # it is there
                raise


@contextmanager
def serving(folder: Path, *buckets: str) -> Iterator[ObjectStore]:
    """A server with some empty buckets, gone with its objects after the block."""
    folder.mkdir(parents=True, exist_ok=True)
    store = ObjectStore(folder)
    try:
        for bucket in buckets:
            store.make_bucket(bucket)
        yield store
    finally:
        store.go()
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]
