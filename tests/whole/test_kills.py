"""The publish protocol under kill -9 at every single step of it: the next run makes the same bytes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[2]

# Runs in a process without threads, so that it may fork. A child does the work and kills itself at its n-th touch of
# the file system below the root, for n = 1, 2, ... until it survives; each time another one does what is left of it.
SWEEP = """
import itertools, json, os, shutil, signal, sys
import pandas  # which pyarrow would import in every child
from pathlib import Path

ROOT = Path(sys.argv[1])
TOUCHES = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}

def forked(work):
    if (pid := os.fork()) == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def killed_at(number, root, work):
    touched = itertools.count(1)
    def audit(event, arguments):
        below = any(str(root) in str(argument) for argument in arguments[:2])
        if event in TOUCHES and below and next(touched) == number:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(audit)
    work(root)

def sweep(work, tree, interrupted=lambda before, calm: []):
    assert forked(lambda: work(ROOT / "calm")) == 0
    calm, wrong, root = tree(ROOT / "calm"), [], ROOT / "hit"
    for number in itertools.count(1):
        shutil.rmtree(root, ignore_errors=True)
        code = forked(lambda: killed_at(number, root, work))
        if code == 0:
            return {"touches": number - 1, "wrong": wrong}
        assert code == -signal.SIGKILL, code
        wrong += [f"touch {number}: {what}" for what in interrupted(tree(root), calm)]
        if forked(lambda: work(root)) != 0 or tree(root) != calm:
            wrong.append(f"after a kill at touch {number}: {sorted(set(tree(root)) ^ set(calm))}")
"""

ARTIFACT = """
import numpy as np
from datasets import shards, storage
from datasets.shards import Clock, ImageRow
from pipeline.artifacts import Fingerprint, Store

PRINT = Fingerprint("encode", 1, {"seed": 0}, {})

def build(root):
    store = Store(str(root))
    path = store.path("latents", PRINT.digest)
    artifact = store.find("latents", PRINT.digest)
    if artifact is None:
        finished = shards.finished(path)
        for shard in range(3):
            if shard not in finished:
                rows = [ImageRow(row, f"{shard:016x}{row:016x}", "u", "c", "png", b"x") for row in range(4)]
                content = shards.write_tensors(rows, "latents", np.full((4, 2, 3), shard, np.float16))
                name = shards.tensor_name(shard)
                files = {name: storage.publish(content, storage.join(path, name))}
                shards.publish_receipt(path, shard, rows_in=4, rows_out=4, files=files, clock=Clock())
            storage.publish(b"state", storage.join(path, "building", "state.bin"))
        files = {name: entry for receipt in shards.finished(path).values() for name, entry in receipt.files.items()}
        artifact = store.commit("latents", PRINT, {"files": files, "rows": 12, "timed": [], "created": "now"})
    store.tidy(artifact)

def tree(root):
    found = {}
    for file in sorted(root.rglob("*")):
        if file.is_file():
            content = file.read_bytes()
            if file.parent.name == "receipts":
                receipt = json.loads(content)
                content = [receipt[key] for key in ("shard", "rows_in", "rows_out", "files")]
            found[str(file.relative_to(root))] = content
    return found

finished_early = 0

def interrupted(before, calm):
    global finished_early
    manifests = [name for name in before if name.endswith("manifest.json")]
    finished_early += bool(manifests)
    return ["a manifest is not whole" for name in manifests if before[name] != calm[name]]

print(json.dumps(sweep(build, tree, interrupted) | {"killed_after_the_manifest": finished_early}))
"""

# Two ranks' parts of five states, now one and now the other first; who comes after goes on from the newest state.
CHECKPOINTS = """
from pipeline.checkpoints import Checkpoints

def content(step, part):
    return b"step %d, part %d" % (step, part)

def train(root):
    ranks = [Checkpoints(str(root / "states"), lambda text: None, part, parts=2) for part in (0, 1)]
    newest, noted = ranks[0].newest(), root / "noted"
    done = newest.step if newest else 0
    assert done >= (int(noted.read_text()) if noted.exists() else 0), "a saved state is lost"
    assert newest is None or list(ranks[0].read_all(newest)) == [content(done, part) for part in (0, 1)]
    for step in range(done + 1, 6):
        for part in sorted((0, 1), reverse=bool(step % 2)):
            ranks[part].save(step, content(step, part), {"seed": 1})
        noted.write_text(str(step))

def tree(root):  # the last state; older ones go with the next save
    return {file.name: file.read_bytes() for file in root.rglob("000000005-*")}

print(json.dumps(sweep(train, tree)))
"""


def swept(root: Path, work: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SWEEP + work, str(root)], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    outcome: dict[str, Any] = json.loads(done.stdout)
    assert outcome["wrong"] == []
    return outcome


def test_a_kill_at_every_touch_of_the_file_system_leaves_the_same_bytes(tmp_path):
    outcome = swept(tmp_path, ARTIFACT)
    assert outcome["touches"] > 40
    assert outcome["killed_after_the_manifest"] > 0


def test_a_kill_at_every_touch_of_a_spread_state_loses_no_saved_one(tmp_path):
    assert swept(tmp_path, CHECKPOINTS)["touches"] > 100


@pytest.mark.parametrize("kills", [60, pytest.param(600, marks=pytest.mark.chaos)])
def test_workers_killed_at_random_points_leave_the_same_bytes(tmp_path, kills):
    """Real downloads over loopback, encoding and publishing; also: one worker and three make the same bytes."""
    seed = random.randrange(2**32)
    print("seed", seed)  # where the workers were killed depends on the machine's pace too
    command = [sys.executable, "-m", "tests.work_on_shards", str(tmp_path), str(kills), str(seed)]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=True)
    outcome = json.loads(done.stdout)
    assert outcome["three_equal_one"]
    assert (outcome["killed"], outcome["torn"], outcome["other"]) == (kills, 0, 0)
    assert outcome["seen"] > 3  # stages of the work at which there were kills, or the sweep would prove nothing
