"""The publish protocol under kill -9 at every single step of it: the next run makes the same bytes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.killing import swept

CHECKOUT = Path(__file__).parents[2]

# An artifact of three shards and a training, as the engine builds it: under a claim, from where the one before got to.
BUILD = """
import numpy as np
from datasets.files import storage
from datasets.formats import shards
from datasets.formats.shards import Clock, ImageRow
from pipeline.store.artifacts import Fingerprint, Store
from datasets.formats import shards
from datasets.formats.shards import Clock, ImageRow
from pipeline.cluster.checkpoints import Checkpoints
from pipeline.store import claims, deleting
from pipeline.store.artifacts import Artifact, Fingerprint, Store

PRINT = Fingerprint("encode", 1, {"seed": 0}, {})
WHAT = claims.artifact("latents", PRINT.digest)

def hold(root):
    return claims.hold(str(root), WHAT, lambda text: None)

def build(root):
    store = Store(str(root))
    path = store.path("latents", PRINT.digest)
    with hold(root) as claim:
        artifact = store.find("latents", PRINT.digest)
        if artifact is None:
            finished = shards.finished(path)
            for receipt in shards.lacking(path, finished.values()):
                deleting.drop_shard(path, finished.pop(receipt.shard), claim.fence)
            for shard in range(3):
                if shard not in finished:
                    make(path, shard, claim.fence)
            states = Checkpoints(f"{path}/building/checkpoints", lambda text: None, fence=claim.fence)
            states.save(1, b"state", {})
            result = {"weights": vars(storage.publish(b"weights", storage.join(path, "weights")))}
            storage.publish(json.dumps({"files": result}).encode(), storage.join(path, deleting.RESULT))
            files = {"weights": storage.entry_of(b"weights")}
            receipts = list(shards.finished(path).values())
            facts = {"files": files, "shards": {"": receipts}, "rows": 12, "timed": [], "created": "now"}
            artifact = store.commit("latents", PRINT, facts, claim)
        deleting.tidy(artifact, claim.fence)

def make(path, shard, fence):
    rows = [ImageRow(row, f"{shard:016x}{row:016x}", "u", "c", "png", b"x") for row in range(4)]
    content = shards.write_tensors(rows, "latents", np.full((4, 2, 3), shard, np.float16))
    name = shards.tensor_name(shard)
    files = {name: storage.publish(content, storage.join(path, name))}
    shards.publish_receipt(path, shard, rows_in=4, rows_out=4, files=files, clock=Clock(), fence=fence)

def unfinished(root):
    "All of it but the manifest."
    folder = Path(Store(str(root)).path("latents", PRINT.digest))
    manifest = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").unlink()
    return folder, manifest
"""

COMMIT = """
print(json.dumps(sweep(build, tree, lambda root, before, calm: missing(root))))
"""

# A finished artifact with leftovers of its build goes; whatever is left of it, the next run has all of it again.
DISCARD = """
def prepare(root):
    build(root)
    path = Path(Store(str(root)).path("latents", PRINT.digest))
    for step in (1, 2):
        Checkpoints(f"{path}/building/checkpoints", lambda text: None).save(step, b"state", {})
    result = {"files": {"weights": vars(storage.entry_of(b"weights"))}}
    storage.publish(json.dumps(result).encode(), str(path / deleting.RESULT))
    storage.publish(b"{}", str(path / "forgotten.json"))

def discard(root):
    with hold(root) as claim:
        deleting.discard(Store(str(root)).path("latents", PRINT.digest), claim.fence)

def left(root):
    "Killed before it began, it leaves what an earlier removal told, too."
    return {name: content for name, content in tree(root).items() if not name.endswith("forgotten.json")}

print(json.dumps(sweep(discard, left, lambda root, before, calm: missing(root), prepare, build)))
"""

# One shard's file is damaged; it alone is made anew, however often that is killed.
REOPEN = """
def prepare(root):
    build(root)
    path = Path(Store(str(root)).path("latents", PRINT.digest))
    content = bytearray((path / "00001.parquet").read_bytes())
    content[9] ^= 1
    (path / "00001.parquet").write_bytes(content)

def reopen(root):
    with hold(root) as claim:
        artifact = Store(str(root)).find("latents", PRINT.digest)
        if artifact:
            deleting.reopen(artifact, ["00001.parquet"], claim.fence)

def repair(root):
    reopen(root)
    build(root)

print(json.dumps(sweep(reopen, lambda root: {}, lambda root, before, calm: missing(root), prepare, repair)))
"""

# Two artifacts that nobody wants, one of them unfinished, and what the build of a third one has left.
GC = """
from pipeline.verbs import gc

def prepare(root):
    build(root)
    whole = Path(Store(str(root)).path("latents", PRINT.digest))
    shutil.copytree(whole, whole.with_name("unwanted"))
    manifest = json.loads((whole / "manifest.json").read_text())
    (whole.with_name("unwanted") / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "unwanted"}))
    shutil.copytree(whole, whole.with_name("unfinished"), ignore=shutil.ignore_patterns("manifest.json"))
    Checkpoints(f"{whole}/building/checkpoints", lambda text: None).save(1, b"state", {})
    told = {"id": "1", "outcome": "done", "command": "python -m pipeline run conf=stage_c", "steps": {}}
    told |= {"started": "2026-01-01T00:00:00+00:00", "fingerprints": {"latents": PRINT.digest}}
    storage.publish(json.dumps(told).encode(), str(root / "invocations" / "1.json"))

def collect(root):
    sys.stdout = sys.stderr
    gc.collect(str(root), None, True, True)

print(json.dumps(sweep(collect, tree, lambda root, before, calm: missing(root), prepare)))
"""

# Requests to forget a picture, on a root with one artifact of each kind that holds pictures or what was made of them.
FORGET = """
from pipeline.store.removal_list import check_carried_out
from pipeline.verbs.forgetting import forget
from tests.pipeline.verbs.test_forgetting import GONE, built

def carry_out(root):
    forget(str(root), {GONE})

def interrupted(root, before, calm):
    try:
        check_carried_out(str(root))
    except ValueError:  # no run reads anything before this has come to its end: the files are there, old or new
        return [what for what in missing(root) if not (root / "artifacts" / what.split()[-1]).exists()
                and "names" in what and not list((root / "artifacts").rglob(what.split()[-1].rpartition("/")[2]))]
    return missing(root)

def contents(root):
    "A record of removals tells how the last one went, and the list when it was asked for."
    return {name: content for name, content in tree(root).items() if not name.endswith("forgotten.json")}

print(json.dumps(sweep(carry_out, contents, interrupted, lambda root: built(root) and None)))
"""

# Two ranks' parts of five states, now one and now the other first; who comes after goes on from the newest state.
CHECKPOINTS = """
from pipeline.cluster.checkpoints import Checkpoints

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


def test_a_kill_at_every_touch_of_a_build_and_its_commit_leaves_the_same_bytes(tmp_path):
    assert swept(tmp_path, BUILD + COMMIT) > 80


def test_a_kill_at_every_touch_of_a_discard_leaves_nothing_that_claims_more_than_is_there(tmp_path):
    assert swept(tmp_path, BUILD + DISCARD) > 30


def test_a_kill_at_every_touch_of_a_repair_leaves_nothing_that_claims_more_than_is_there(tmp_path):
    assert swept(tmp_path, BUILD + REOPEN) > 15


def test_a_kill_at_every_touch_of_gc_leaves_nothing_that_claims_more_than_is_there(tmp_path):
    # It was over 60 touches before storage and claims came together; why it is 25 now has not been found out.
    assert swept(tmp_path, BUILD + GC) > 20


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.chaos)])
def test_a_kill_at_every_touch_of_forgetting_leaves_what_a_calm_one_leaves(tmp_path, every):
    assert swept(tmp_path, FORGET, every) > 300 // every


def test_a_kill_at_every_touch_of_a_spread_state_loses_no_saved_one(tmp_path):
    assert swept(tmp_path, CHECKPOINTS) > 100


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
