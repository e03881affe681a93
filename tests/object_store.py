"""An S3-compatible server in a process of its own, on loopback."""

import re
import subprocess
import sys
import time
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


@contextmanager
def serving(folder: Path, bucket: str) -> Iterator[dict[str, str]]:
    """Serve an empty bucket; yields what the environment must hold to find it. The server talks into `folder`."""
    said = folder / "stderr.txt"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with open(said, "w") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as running:
        deadline = time.monotonic() + 120
        while not (address := re.search(r"http://127\.0\.0\.1:\d+", said.read_text())):
            assert running.poll() is None, said.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        urllib.request.urlopen(urllib.request.Request(f"{address[0]}/{bucket}", method="PUT"))
        yield {"AWS_ENDPOINT_URL": address[0], **ENVIRONMENT}
        running.terminate()
