"""Downloads and encodes a few shards in worker processes, again and again, and kills them: see test_kills.py.

    python -m tests.work_on_shards FOLDER KILLS SEED

Prints as JSON how often the files were other than those of a calm run.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from datasets.config import DownloadConfig, ImageConfig
from datasets.fetching import download
from datasets.files import storage
from datasets.formats import shards
from datasets.planning import plan
from datasets.source_settings import OpenMojiConfig
from datasets.sources import openmoji

SIZE = 32
SHARDS, ROWS = 3, 2
IMAGE = ImageConfig(size=SIZE, format="png")
DOWNLOAD = DownloadConfig(threads=2, timeout_s=60, retries=1, user_agent="test/1 (a@b.invalid)", max_lost=0.0)
CAPTIONS = ("red heart", "blue circle", "fox", "owl", "pizza", "rocket")


def planned() -> pa.Table:
    config = OpenMojiConfig(captions=CAPTIONS, size=SIZE, similarity=0.3, punsafe=0.0, pwatermark=0.0, aesthetic=6.0)
    table = openmoji.metadata(config)
    texts = zip(table["URL"].to_pylist(), table["TEXT"].to_pylist(), strict=True)
    rows = [
        {"key": plan.key_of(url, text), "url": url, "caption": text, "shard": place // ROWS, "row": place % ROWS}
        for place, (url, text) in enumerate(texts)
    ]
    assert len(rows) == SHARDS * ROWS
    return pa.Table.from_pylist(rows, schema=plan.SCHEMA)


def work(folder: Path, rows: pa.Table, worker: int, workers: int) -> None:
    """What is left to do of a worker's shards, as the steps do it."""
    images, codes = str(folder / "images"), str(folder / "codes")
    done, encoded = shards.finished(images), shards.finished(codes)
    with openmoji.serve(SIZE) as address:
        for shard in range(worker, SHARDS, workers):
            if shard not in done:
                share = rows.slice(shard * ROWS, ROWS)
                hosts = {openmoji.HOST: address}
                download.download_shard(share, shard=shard, folder=images, image=IMAGE, download=DOWNLOAD, hosts=hosts)
            if shard not in encoded:
                encode(images, codes, shard)


def encode(images: str, codes: str, shard: int) -> None:
    clock, name = shards.Clock(), shards.tensor_name(shard)
    rows = shards.read_images(storage.read(storage.join(images, shards.image_name(shard))))
    values = np.stack([row.pixels().mean((0, 1)) for row in rows]).astype(np.float16)
    files = {name: storage.publish(shards.write_tensors(rows, "codes", values), storage.join(codes, name))}
    shards.publish_receipt(codes, shard, rows_in=len(rows), rows_out=len(rows), files=files, clock=clock)


def run(folder: Path, rows: pa.Table, workers: int, kill_after: float | None = None) -> bool:
    """Let worker processes do what is left, or kill them all after so many seconds; whether they came to an end."""
    pids = []
    for worker in range(workers):
        if (pid := os.fork()) == 0:
            work(folder, rows, worker, workers)
            os._exit(0)
        pids.append(pid)
    if kill_after is not None:
        time.sleep(kill_after)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert all(code in (0, -signal.SIGKILL) for code in codes), codes
    return not any(codes)


def tree(folder: Path) -> dict[str, Any]:
    """The content of every published file; of a receipt, what does not belong to the run."""
    found: dict[str, Any] = {}
    for name in storage.listing(str(folder)):
        content = (folder / name).read_bytes()
        found[name] = content
        if f"/{shards.RECEIPTS}/" in name:
            facts = json.loads(content)
            found[name] = [facts[key] for key in ("shard", "rows_in", "rows_out", "dropped", "files")]
    return found


def main(folder: Path, kills: int, seed: int) -> None:
    """Kill the workers at random points, let others go on where they were, until they come to an end; start anew."""
    generator, rows = random.Random(seed), planned()
    work(folder / "first", rows, worker=0, workers=1)  # imports what no child should need seconds for
    began = time.perf_counter()
    run(folder / "calm", rows, workers=1)
    whole = time.perf_counter() - began
    wanted = tree(folder / "calm")
    run(folder / "three", rows, workers=3)
    equal = tree(folder / "three") == wanted
    killed = torn = other = 0
    progress = set()
    while killed < kills:
        ended = run(folder / "hit", rows, generator.choice((1, 1, 3)), kill_after=generator.uniform(0, whole))
        killed += not ended
        ended = ended or (killed == kills and run(folder / "hit", rows, workers=1))
        found = tree(folder / "hit")
        progress.add(len(found))
        torn += not found.items() <= wanted.items()
        if ended:
            other += found != wanted
            shutil.rmtree(folder / "hit")
    print(json.dumps({"three_equal_one": equal, "killed": killed, "torn": torn, "other": other, "seen": len(progress)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
