"""`python -m tests.bench.plan_memory FOLDER ROWS`: what a plan takes, in a process that has loaded nothing else."""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datasets.config import DataConfig, DownloadConfig, ImageConfig
from datasets.planning import plan
from datasets.source_settings import FilterConfig


def measured(folder: Path, rows: int) -> dict[str, float]:
    """Make a plan of generated metadata: CPU seconds, and peak resident memory before and after, MiB."""
    part = min(rows, 500_000)
    for start in range(0, rows, part):
        write_metadata(folder / f"{start:010d}.parquet", start, part)
    config = DataConfig(
        source="laion_aesthetic",
        metadata=str(folder),
        limit=None,
        shard_rows=2048,
        filters=FilterConfig(min_side=256, max_same_caption=10),
        image=ImageConfig(size=256, format="jpg"),
        download=DownloadConfig(threads=1, timeout_s=1, retries=0, user_agent="bench", max_lost=1),
    )
    before = peak_mib()
    began = time.process_time()
    counts = plan.make(config, 0, lambda rows: None)
    return {
        "planned": counts.planned,
        "before_mib": before,
        "peak_mib": peak_mib(),
        "cpu_seconds": time.process_time() - began,
    }


def peak_mib(process: int | str = "self") -> int:
    """Most resident memory of a process, this one or another, so far.

    `ru_maxrss` would be at least that of the process that began it.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found
    return int(found[1]) // 1024


def write_metadata(path: Path, start: int, count: int) -> None:
    """LAION's columns with different URLs and captions."""
    numbers = [f"{number:010d}" for number in range(start, start + count)]
    score = pa.array(np.full(count, 0.3))
    columns = {
        "URL": pa.array([f"https://pictures-{number[-4:]}.example/{number}.jpg" for number in numbers]),
        "TEXT": pa.array([f"a picture of the thing number {number}" for number in numbers]),
        "WIDTH": pa.array(np.full(count, 1024)),
        "HEIGHT": pa.array(np.full(count, 768)),
        "similarity": score,
        "punsafe": score,
        "pwatermark": score,
        "AESTHETIC_SCORE": pa.array(np.full(count, 6.0)),
    }
    pq.write_table(pa.table(columns), path, row_group_size=100_000)


if __name__ == "__main__":
    print(json.dumps(measured(Path(sys.argv[1]), int(sys.argv[2]))))
