"""`python -m tests.bench.storage`: our reads and writes of objects beside those of a plain parallel client (boto3's).

Both ask the same S3 server on loopback through a proxy in a process of its own, which answers each request 20 ms late,
as a store elsewhere does; they take turns. Over the same: our reader beside webdataset, which has its tars through
curl; an encoding actor, whose model takes its time as a GPU does, beside that model alone.
"""

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from datasets.files import filesystems, storage
from datasets.reading.batches import Batches
from tests.bench import data
from tests.bench.figures import Line, ratio, took
from tests.object_store import serving

BUCKET = "bench"
LATE_S = 0.02
LARGE = 96 << 20  # bytes
SMALL = 400  # objects of a KiB
PAIRS = 7
BUSY_S = 0.05  # a batch
SPEED, READING, WAITING = 0.8, 1.0, 0.95  # bars: of the plain client's, of webdataset's, and of the model's alone


def lines() -> Iterator[Line]:
    """All measurements."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder, "store"), BUCKET) as server,
        _late(server.url, LATE_S) as url,
    ):
        environment = server.environment | {"AWS_ENDPOINT_URL": url}
        yield from objects(environment, BUCKET, LARGE, SMALL, PAIRS)
        yield reading(environment, BUCKET, rows=64, num_shards=12, pairs=PAIRS)
        yield encoding(environment, BUCKET, BUSY_S, rows=256, num_shards=12, pairs=5)


class Device(torch.nn.Module):
    """A model that takes so many seconds a batch, of nobody's CPU."""

    def __init__(self, busy_s: float) -> None:
        super().__init__()
        self._busy_s, self._smaller = busy_s, torch.nn.AvgPool2d(32)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        time.sleep(self._busy_s)
        found: torch.Tensor = self._smaller(image)
        return found


def encoding(
    environment: dict[str, str], bucket: str, busy_s: float, *, rows: int, num_shards: int, pairs: int
) -> Line:
    """The encoding actor on a store, over its model alone: whether that ever waits."""
    with patch.dict(os.environ, environment):
        filesystems.forget_clients()
        times = data.encoded(Device(busy_s), f"s3://{bucket}/encoded", 64, rows, num_shards, pairs)
    filesystems.forget_clients()
    return ratio(f"encoding on a store, {1000 * busy_s:.0f} ms a batch / its model alone", *times, WAITING)


def reading(environment: dict[str, str], bucket: str, *, rows: int, num_shards: int, pairs: int) -> Line:
    """A pass over samples on a store, by our reader, which hashes, joins and shuffles, and by webdataset."""
    total = rows * num_shards
    with patch.dict(os.environ, environment):
        filesystems.forget_clients()
        sources = data.samples(f"s3://{bucket}/samples", rows, num_shards)
        urls = [f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}/samples/{data.tar_name(n)}" for n in range(num_shards)]
        data.read_tars(urls[:1], rows)

        def ours() -> None:
            data.read_epoch(Batches(sources, seed=0), 0)  # a new one, which has hashed nothing

        times = [
            (took(ours, time.perf_counter), took(lambda: data.read_tars(urls, total), time.perf_counter))
            for _ in range(pairs)
        ]
    filesystems.forget_clients()
    mine, theirs = zip(*times, strict=True)
    rate = total / sorted(mine)[len(mine) // 2]
    return ratio("reader on a store, first pass / webdataset", mine, theirs, READING, f"; ours {rate:,.0f} samples/s")


def objects(environment: dict[str, str], bucket: str, large: int, small: int, pairs: int) -> Iterator[Line]:
    """A large object and many small ones, written and read by both."""
    import boto3

    with patch.dict(os.environ, environment):
        filesystems.forget_clients()
        plain = boto3.client("s3")  # a plain client: its transfers take ten threads
        content, names = os.urandom(large), [f"small/{number}" for number in range(small)]

        def download() -> None:
            plain.download_fileobj(bucket, "large", into := io.BytesIO())
            assert len(into.getbuffer()) == large  # its parts come in any order, and leave the place anywhere

        work: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "written": (
                lambda: storage.publish(content, f"s3://{bucket}/large"),
                lambda: plain.upload_fileobj(io.BytesIO(content), bucket, "large"),
            ),
            "read": (lambda: storage.read(f"s3://{bucket}/large"), download),
            "small, written": (
                lambda: _by_threads(lambda name: storage.publish(b"x" * 1024, f"s3://{bucket}/{name}"), names),
                lambda: _by_threads(lambda name: plain.put_object(Bucket=bucket, Key=name, Body=b"x" * 1024), names),
            ),
            "small, read": (
                lambda: storage.read_all([f"s3://{bucket}/{name}" for name in names]),
                lambda: _by_threads(lambda name: plain.get_object(Bucket=bucket, Key=name)["Body"].read(), names),
            ),
        }
        for what, (ours, theirs) in work.items():
            ours(), theirs()  # connections are made
            times = [(took(ours, time.perf_counter), took(theirs, time.perf_counter)) for _ in range(pairs)]
            mine, others = zip(*times, strict=True)
            middle = sorted(mine)[len(mine) // 2]
            rate = f"{small / middle:,.0f} objects/s" if "small" in what else f"{large / middle / 1e6:,.0f} MB/s"
            yield ratio(f"object store, {what} / boto3's parallel client", mine, others, SPEED, f"; ours {rate}")
    filesystems.forget_clients()


def _by_threads(one: Callable[[str], object], names: list[str]) -> None:
    with ThreadPoolExecutor(filesystems.READERS) as pool:
        list(pool.map(one, names))


@contextmanager
def _late(url: str, late_s: float) -> Iterator[str]:
    """A proxy that answers late, in a process of its own."""
    command = [sys.executable, "-m", "tests.faulty_store", url, str(late_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate()


if __name__ == "__main__":
    for line in lines():
        print(*line, flush=True)
