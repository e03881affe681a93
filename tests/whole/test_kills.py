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
from pipeline.cluster.ranks.checkpoints import Checkpoints
from pipeline.store import claims, deleting
from pipeline.store.artifacts import Artifact, Fingerprint, Store

PRINT = Fingerprint("encode", 1, {"seed": 0}, {})

def hold(root, name="latents", fingerprint=PRINT):
    return claims.hold(str(root), claims.artifact(name, fingerprint.digest), lambda text: None)

def build(root, name="latents", fingerprint=PRINT):
    store = Store(str(root))
    path = store.path(name, fingerprint.digest)
    with hold(root, name, fingerprint) as claim:
        artifact = store.find(name, fingerprint.digest)
        if artifact is None:
            deleting.drop_lost(path, claim.fence)
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
            artifact = store.commit(name, fingerprint, facts, claim)
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

# A shard of images is damaged; it and what was made from it are made anew, nothing else, however often that is killed.
REPAIR = """
from pipeline.repair import damage, repairing

IMAGES = Fingerprint("download", 1, {}, {})
MADE = {"images": IMAGES, "latents_a": Fingerprint("encode_a", 1, {}, {"images": IMAGES.digest})}
MADE["view_all"] = Fingerprint("select", 1, {}, {"images": IMAGES.digest})
MADE["stage_a"] = Fingerprint("train_a", 1, {}, {"images": IMAGES.digest})
SHARD = "00001.parquet"

def prepare(root):
    for name, fingerprint in MADE.items():
        build(root, name, fingerprint)
    file = Path(Store(str(root)).path("images", IMAGES.digest)) / SHARD
    content = bytearray(file.read_bytes())
    content[9] ^= 1
    file.unlink()
    file.write_bytes(content)
    (root / "whole.json").write_text(json.dumps(times(root)))

def times(root):
    files = (file for file in (root / "artifacts").rglob("*") if file.name.endswith((".parquet", "manifest.json")))
    return {str(file.relative_to(root)): file.stat().st_mtime_ns for file in files}

def reopen(root):
    store = Store(str(root))
    whole = filter(None, (store.find(name, print_.digest) for name, print_ in MADE.items()))
    repairing.open_damaged(store, damage.damaged(whole))

def repair(root):
    reopen(root)
    for name, fingerprint in MADE.items():
        build(root, name, fingerprint)
    before, now = json.loads((root / "whole.json").read_text()), times(root)
    changed = {file for file in now if now[file] != before[file]}
    hit = {f"{name}/{MADE[name].digest}/manifest.json" for name in ("images", "latents_a", "view_all")}
    hit |= {f"{name}/{MADE[name].digest}/shards.parquet" for name in ("images", "latents_a", "view_all")}
    hit |= {f"{name}/{MADE[name].digest}/{SHARD}" for name in ("images", "latents_a")}
    assert changed == {f"artifacts/{file}" for file in hit}, changed

print(json.dumps(sweep(reopen, tree, lambda root, before, calm: missing(root), prepare, repair)))
"""

# Two artifacts that nobody wants, one of them unfinished, and what the build of a third one has left.
GC = """
from pipeline.verbs import gc

UNWANTED, UNFINISHED = 16 * "a", 16 * "b"

def prepare(root):
    build(root)
    whole = Path(Store(str(root)).path("latents", PRINT.digest))
    shutil.copytree(whole, whole.with_name(UNWANTED))
    manifest = json.loads((whole / "manifest.json").read_text())
    (whole.with_name(UNWANTED) / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": UNWANTED}))
    shutil.copytree(whole, whole.with_name(UNFINISHED), ignore=shutil.ignore_patterns("manifest.json"))
    Checkpoints(f"{whole}/building/checkpoints", lambda text: None).save(1, b"state", {})
    told = {"id": "1", "outcome": "done", "command": "python -m pipeline run conf=stage_c", "steps": {}}
    told |= {"started": "2026-01-01T00:00:00+00:00", "fingerprints": {"latents": PRINT.digest}}
    storage.publish(json.dumps(told).encode(), str(root / "invocations" / "1.json"))

def collect(root):
    sys.stdout = sys.stderr
    gc.collect(str(root), None, True, True)

swept = sweep(collect, tree, lambda root, before, calm: missing(root), prepare)
left = {path.name for path in (ROOT / "calm" / "artifacts" / "latents").iterdir()}
assert left == {PRINT.digest}, f"gc was to delete all but one of {left}"  # or no deletion was swept
print(json.dumps(swept))
"""

# Requests to forget a picture, on a root with one artifact of each kind that holds pictures or what was made of them.
FORGET = """
from pipeline.store.removal_list import check_carried_out
from pipeline.verbs.data.forgetting import forget
from tests.pipeline.verbs.data.forgettable import GONE, built

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
from pipeline.cluster.ranks.checkpoints import Checkpoints

def content(step, part):
    return b"step %d, part %d" % (step, part)

def train(root):
    ranks = [Checkpoints(str(root / "states"), lambda text: None, part, parts=2) for part in (0, 1)]
    newest, noted = ranks[0].newest(), root / "noted"
    ranks[1].attempt = ranks[0].attempt  # they have told each other
    done = newest.saved.step if newest else 0
    assert done >= (int(noted.read_text()) if noted.exists() else 0), "a saved state is lost"
    assert newest is None or [read() for read in newest.parts] == [content(done, part) for part in (0, 1)]
    for step in range(done + 1, 6):
        for part in sorted((0, 1), reverse=bool(step % 2)):
            ranks[part].save(step, content(step, part), {"seed": 1})
        noted.write_text(str(step))

def tree(root):  # the last state; older ones go with the next save
    files = {}
    for file in root.rglob("000000005-*"):
        name, attempt = file.stem.rsplit("-", 1)
        files.setdefault(attempt, {})[name + file.suffix] = file.read_bytes()
    return next((found for found in files.values() if len(found) == 4), {})

print(json.dumps(sweep(train, tree)))
"""


def test_a_kill_at_every_touch_of_a_build_and_its_commit_leaves_the_same_bytes(tmp_path):
    assert swept(tmp_path, BUILD + COMMIT) > 80


def test_a_kill_at_every_touch_of_a_discard_leaves_nothing_that_claims_more_than_is_there(tmp_path):
    assert swept(tmp_path, BUILD + DISCARD) > 30


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.chaos)])
def test_a_kill_at_every_touch_of_a_repair_leaves_nothing_that_claims_more_than_is_there(tmp_path, every):
    assert swept(tmp_path, BUILD + REPAIR, every) > 60 // every


def test_a_kill_at_every_touch_of_gc_leaves_nothing_that_claims_more_than_is_there(tmp_path):
    assert swept(tmp_path, BUILD + GC) > 60


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
