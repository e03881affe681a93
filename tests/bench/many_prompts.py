"""`python -m tests.bench.many_prompts FOLDER COUNT`: that many prompts drawn and scored, whole and killed half-way.

Models and scorer are tiny, of random weights; pictures have 128 px, the least that the models draw. The same work is
done by a process that is left alone, and by some of which two are killed (SIGKILL): one half-way through drawing, one
half-way through scoring. Told are the most resident memory of each process, beside that for a tenth of the prompts;
whether `scores.parquet` has the same bytes; and how many pictures were drawn or scored twice: none but those of the
chunk that a killed process was at, which had no receipt.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch

from datasets.formats import shards
from datasets.formats.shards import ImageRow
from pipeline.cluster import board
from pipeline.models import scorers
from pipeline.models.score_tables import FILE
from pipeline.steps import evaluate, sample
from stages.scoring.clip import Clip
from stages.scoring.scorers import PromptScorer
from tests.bench.figures import Line, at_most
from tests.bench.plan_memory import peak_mib
from tests.pipeline.in_process import Root, picture
from tests.pipeline.steps.test_sample import ready

SETS = ("samples", "samples_many", "scores")  # what is made, in this order
WORDS = ("data.image.size=128", "sample.limit=4", "targets=[scores]", "sample.steps_c=1", "sample.steps_b=1")
LOG = "done.txt"  # a line for each picture that was drawn or scored, in the order in which that happened
POLL_S = 0.02
GROWTH_MIB = 256  # bar: how much more the whole may take than a tenth of it
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def lines(folder: Path, count: int) -> Iterator[Line]:
    """Do all of it in an empty folder."""
    (tenth,) = _processes(folder, "tenth", -(-count // 10))
    began = time.monotonic()
    (whole,) = _processes(folder, "whole", count)
    seconds = time.monotonic() - began
    yield Line(f"{count:,} prompts drawn and scored", f"{seconds:.0f} s, {1000 * seconds / count:.1f} ms a prompt")
    killed = _processes(folder, "killed", count, kill=("drawn", "scored"))
    yield Line("MiB at most, of a tenth of them", f"{tenth:,}")
    yield at_most("  of all", f"{whole:,}", whole, tenth + GROWTH_MIB)
    peak = max(killed)
    yield at_most(
        "  of those that were killed or went on", ", ".join(f"{one:,}" for one in killed), peak, tenth + GROWTH_MIB
    )
    tables = {name: _scores(folder / name) for name in ("whole", "killed")}
    same = tables["whole"] == tables["killed"]
    yield Line("scores.parquet after two kills", "the same bytes" if same else "OTHER BYTES", "the same bytes", same)
    for doing, chunk in (("drawn", sample.CHUNK), ("scored", evaluate.CHUNK)):
        times = Counter(line for line in _log(folder / "killed") if line.startswith(doing))
        twice = sum(number - 1 for number in times.values())
        every = len([one for one in times if " many " in one]) == count
        assert every, f"{len(times)} pictures were {doing} for {count} prompts"
        yield at_most(f"pictures {doing} again, of the chunk that was being {doing}", f"{twice}", twice, chunk)


def _processes(folder: Path, name: str, count: int, kill: Sequence[str] = ()) -> list[int]:
    """Do the work in the root `name`, in processes one after the other: one is killed half-way through each of `kill`,
    the last is left alone. MiB at most of each."""
    root, peaks = folder / name, []
    root.mkdir()
    for doing in (*kill, None):
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.many_prompts", str(root), str(count), "work"], stdout=subprocess.PIPE
        )
        if doing:
            while sum(line.startswith(doing) for line in _log(root)) < count // 2 and child.poll() is None:
                time.sleep(POLL_S)
            peaks.append(peak_mib(child.pid))
            child.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL, f"it was over before half of the pictures were {doing}"
        else:
            told, _ = child.communicate()
            assert child.returncode == 0
            peaks.append(json.loads(told)["peak_mib"])
    return peaks


def _log(root: Path) -> list[str]:
    path = root / LOG
    return path.read_text("utf-8").splitlines() if path.exists() else []


def _scores(root: Path) -> bytes:
    (path,) = root.glob(f"artifacts/scores/*/{FILE}")
    return path.read_bytes()


def work(path: Path, count: int) -> None:
    """What a run does for that many prompts, in this process: steps that are finished are not done again."""
    torch.set_num_threads(1)
    prompts = path / "many.txt"
    prompts.write_text("".join(f"many things, of which this is number {n}\n" for n in range(count)))
    root = Root(path, *WORDS, f"eval.prompts.many={prompts}")
    _watch(path)
    if root.store.find("stage_c", root.prints["stage_c"].digest) is None:
        rows = [ImageRow(n, f"{n:032x}", "u", f"caption {n}", "png", picture(n)) for n in range(4)]
        ready(root, {0: (shards.write_images(rows), len(rows))})
    for name in SETS:
        if root.store.find(name, root.prints[name].digest) is None:
            build = root.build(name)
            root.commit(build, (evaluate.evaluate if name == "scores" else sample.sample)(build))
    print(json.dumps({"peak_mib": peak_mib()}))


def _watch(path: Path) -> None:
    """Write down each picture that is drawn or scored; scoring is a tiny CLIP's. This process is the cluster."""
    board.BoardClient = lambda given: given  # type: ignore[assignment,misc]
    log = os.open(path / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    draw = sample.drawn

    def drawn(models: Any, texts: list[str], *others: Any, **how: Any) -> Iterator[np.ndarray]:
        for text, pixels in zip(texts, draw(models, texts, *others, **how), strict=True):
            if len(others) == 4 and not how:  # from its caption alone
                os.write(log, f"drawn {text}\n".encode())
            yield pixels

    class Tiny(PromptScorer):
        def __call__(self, pictures: Any, prompts: Sequence[str], originals: Any = None) -> np.ndarray:
            os.write(log, "".join(f"scored {prompt}\n" for prompt in prompts).encode())
            return super().__call__(pictures, prompts)

    @cache
    def clip() -> Clip:
        torch.manual_seed(0)
        return Clip(open_clip.CLIP(**CLIP))

    sample.drawn = drawn
    scorers.load = lambda config, device: {"clip_h": Tiny(clip(), 100.0)}


if __name__ == "__main__":
    if sys.argv[3:] == ["work"]:
        work(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        for line in lines(Path(sys.argv[1]), int(sys.argv[2])):
            print(json.dumps(line), flush=True)
