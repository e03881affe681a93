"""A process that is killed (-9) at each of its touches of the file system in turn, and what that leaves."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[1]

# Runs in a process without threads, so that it may fork. A child does the work and kills itself at its n-th touch of
# the file system below the root, for n = 1, 2, ... until it survives; each time another one does what is left of it.
SWEEP = """
import contextlib, importlib, itertools, json, os, shutil, signal, sys
from pathlib import Path

ROOT, EVERY = Path(sys.argv[1]), int(sys.argv[2])
TOUCHES = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}

def forked(work):
    if (pid := os.fork()) == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def rehearsed(work):
    "Do it in a child, and import here what it imported there, which each child to come would take seconds for."
    def work_and_tell():
        work()
        (ROOT / "modules.json").write_text(json.dumps(list(sys.modules)))
    assert forked(work_and_tell) == 0
    for name in json.loads((ROOT / "modules.json").read_text()):
        with contextlib.suppress(ImportError):  # of a module that another one has put there by itself
            importlib.import_module(name)

def killed_at(number, root, work):
    touched = itertools.count(1)
    def audit(event, arguments):
        below = any(str(root) in str(argument) for argument in arguments[:2])
        if event in TOUCHES and below and next(touched) == number:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(audit)
    work(root)

def sweep(work, tree, interrupted=lambda root, before, calm: [], prepare=lambda root: None, recover=None):
    "Kill `work`; then `recover` (or the same) must leave what it leaves after a calm `work`."
    recover = recover or work
    assert forked(lambda: prepare(ROOT / "calm")) == 0
    for calmly in (work, recover):
        rehearsed(lambda: calmly(ROOT / "calm"))
    assert forked(lambda: prepare(ROOT / "before")) == 0
    calm, wrong, root = tree(ROOT / "calm"), [], ROOT / "hit"
    for kills, number in enumerate(itertools.count(1, EVERY)):
        shutil.rmtree(root, ignore_errors=True)
        if (ROOT / "before").exists():
            shutil.copytree(ROOT / "before", root)
        code = forked(lambda: killed_at(number, root, work))
        if code == 0:
            return {"kills": kills, "wrong": wrong}
        assert code == -signal.SIGKILL, code
        wrong += [f"touch {number}: {what}" for what in interrupted(root, tree(root), calm)]
        if forked(lambda: recover(root)) != 0 or tree(root) != calm:
            wrong.append(f"after a kill at touch {number}: {sorted(set(tree(root)) ^ set(calm))}")
"""

# What is never claimed wrongly: of a finished artifact, a shard, a training, a checkpoint, that its files are there.
CLAIMED = """
from datasets.files import storage

def missing(root):
    "Files that something below a root says are there, with their sizes."
    from pipeline.store.artifacts import read_manifest
    from pipeline.store.artifacts import Artifact
    def files_of(folder):
        artifact = Artifact("", str(folder), read_manifest(str(folder)))
        return {name: vars(entry) for name, entry in artifact.files.items()}
    found = []
    def look(mark, folder, files):
        for name, entry in files.items():
            file = folder / name
            if not file.exists() or file.stat().st_size != entry["bytes"]:
                found.append(f"{mark.relative_to(root)} names {name}")
    for mark in (root / "artifacts").rglob("*.json"):
        if mark.name == "manifest.json":
            look(mark, mark.parent, files_of(mark.parent))
        elif mark.parent.name == "receipts":
            look(mark, mark.parents[1], json.loads(mark.read_bytes())["files"])
        elif mark.name == "result.json":
            look(mark, mark.parents[1], json.loads(mark.read_bytes())["files"])
        elif mark.parent.name == "checkpoints":
            name = mark.with_suffix(".safetensors").name
            look(mark, mark.parent, {name: json.loads(mark.read_bytes())["file"]})
    return found

def tree(root):
    "All files of artifacts; of what tells of times, what does not."
    found = {}
    for file in sorted((root / "artifacts").rglob("*")):
        if file.is_file():
            content = file.read_bytes()
            if file.parent.name == "receipts":
                receipt = json.loads(content)
                content = [receipt[key] for key in ("shard", "rows_in", "rows_out", "files")]
            if file.name == "manifest.json":
                content = {**json.loads(content), "build": None}  # has a name of its own each time
            found[str(file.relative_to(root))] = content
    return found
"""


def swept(root: Path, work: str, every: int = 1) -> int:
    """Run a program that prints what its `sweep` returns, with a kill at each `every`-th touch; returns how many."""
    done = subprocess.run(
        [sys.executable, "-c", SWEEP + CLAIMED + work, str(root), str(every)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    assert not outcome["wrong"], "\n".join(outcome["wrong"])
    kills: int = outcome["kills"]
    return kills
