"""`python -m tests.bench.large_root FOLDER SHARDS`: what verbs take on a root of very many shards.

Each artifact of a config that has shards gets so many, with receipts and files that are one file with many names. Each
verb runs in a process of its own. With `bare` behind, only what is not per shard lies in the root: whoever listed the
shards all the same would find none, so that is for figures of the verbs alone, at sizes that no disk is patient with.
"""

import json
import os
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets.files import storage
from datasets.files.storage import FileEntry
from datasets.formats import shards
from datasets.formats.shards import Receipt
from datasets.reading.batches import Batches, Source
from pipeline.plan.dag import order
from pipeline.plan.table import table
from pipeline.plan.wanted import prints_of
from pipeline.settings import compose
from pipeline.store import artifacts
from pipeline.store.artifacts import Look, Store
from tests.bench.figures import Line, at_most

WORDS = ("conf=stage_c", "scale=micro")
VERBS = (("plan", *WORDS), ("status",), ("gc",), ("report", "hours"), ("show", *WORDS, "artifact=metadata"))
ROWS = 1000  # of a shard
SECONDS, MIB = 10, 1024  # bars
MEASURED = """
import re, runpy, sys
from pathlib import Path
try:
    runpy.run_module("pipeline", run_name="__main__")
finally:
    print("VmHWM", re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1], file=sys.stderr)
"""


def lines(folder: Path, count: int, *, bare: bool = False) -> Iterator[Line]:
    """Make such a root in an empty folder and measure: seconds and MiB of each verb, and of a training's start."""
    began = time.monotonic()
    store = make(folder, count, bare=bare)
    yield Line(f"root of {count:,} shards an artifact", f"made in {time.monotonic() - began:.0f} s")
    for words in VERBS:
        seconds, mib = measured(*words, f"root={folder}")
        yield at_most(f"{words[0]}: CPU seconds", f"{seconds:.1f}", seconds, SECONDS)
        yield at_most("  MiB", f"{mib:,.0f}", mib, MIB)
    began = time.process_time()
    images = next(store.finished("images"))
    sources = [Source("image", images.shards())]
    sent = pickle.dumps(sources)
    yield Line(
        "a training's pictures, read by the driver",
        f"{time.process_time() - began:.1f} CPU s, sent {len(sent):,} bytes",
    )
    began = time.process_time()
    rows = Batches(pickle.loads(sent), seed=0).rows
    yield Line("  taken up by a rank", f"{time.process_time() - began:.1f} CPU seconds for {rows:,} rows")


def make(folder: Path, count: int, *, bare: bool = False) -> Store:
    """The artifacts of a config up to what its trainings read, each with so many shards."""
    store, config = Store(str(folder)), compose.load(WORDS[0].removeprefix("conf="), list(WORDS[1:]))
    steps = order(table(config), config.targets)
    prints = prints_of(config, Look(str(folder)), steps)
    folders = {"images": "", "latents_a": None, "latents_c": None}
    for step in steps:
        name = step.output
        facts: dict[str, Any] = {"files": {}, "rows": count * ROWS, "timed": [], "created": "2026-01-01T00:00:00+00:00"}
        facts |= {"seconds": 1.0, "device_seconds": 1.0, "metrics": {}, "notes": {"lost": {}}, "inputs": {}}
        if name.startswith(("images", "text_", "latents_")):
            within = folders.get(name, "")
            if within is None:
                within = config.frames_of("train_b" if name == "latents_a" else "train_c")[0].name
            path = storage.join(store.path(name, prints[name].digest), *filter(None, [within]))
            receipts = [_receipt(number, name == "images") for number in range(count)]
            if not bare:
                _link(Path(path), receipts)
            facts["shards"] = {within: receipts}
        there = artifacts.lacking
        artifacts.lacking = (lambda path, files: None) if bare else there
        try:
            store.commit(name, prints[name], facts)
        finally:
            artifacts.lacking = there
    return store


def _receipt(number: int, images: bool) -> Receipt:
    names = [shards.image_name(number), shards.index_name(number)] if images else [shards.tensor_name(number)]
    files = {name: FileEntry(1, os.urandom(32).hex()) for name in names}
    return Receipt(number, ROWS, ROWS, {}, files, 1.0, 1, "host")


def _link(folder: Path, receipts: list[Receipt]) -> None:
    """Files of one byte, and a receipt, under all the names that they would have; a file takes only so many."""
    (folder / shards.RECEIPTS).mkdir(parents=True)
    for start in range(0, len(receipts), 10_000):
        with tempfile.NamedTemporaryFile(dir=folder) as one:
            one.write(b"x")
            one.flush()
            for receipt in receipts[start : start + 10_000]:
                for name in (*receipt.files, f"{shards.RECEIPTS}/{receipt.shard:05d}.json"):
                    os.link(one.name, folder / name)


def measured(*words: str) -> tuple[float, float]:
    """CPU seconds, since others may be at work here too, and most resident MiB of a verb."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", MEASURED, *words], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    found = re.search(r"VmHWM (\d+)", done.stderr)
    assert found
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, int(found[1]) / 1024


if __name__ == "__main__":
    for line in lines(Path(sys.argv[1]), int(sys.argv[2]), bare="bare" in sys.argv[3:]):
        print(json.dumps(line), flush=True)
