"""A training on several ranks whose processes and nodes are taken away ends with the weights of the calm one."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.artifacts import Artifact, Store

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("micro")]
CHECKOUT = Path(__file__).parent.parent
PATIENCE_S = 300
STEPS, EVERY = 60, 5
TRAINING = (
    "workers=2",
    "targets=[stage_c]",
    f"stage_c.train.phases=[{{steps: {STEPS}, batch_size: 8, size: 128}}]",
    f"stage_c.train.checkpoint_every={EVERY}",
)


@pytest.fixture(scope="module")
def inputs(micro_root: Path) -> list[Artifact]:
    """All that Stage C's training reads."""
    late = ("stage_c", "samples", "scores", "release")
    return [artifact for artifact in Store(str(micro_root)).finished() if artifact.name not in late]


def new_root(root: Path, inputs: list[Artifact]) -> Path:
    """A root in which everything but Stage C is there."""
    for artifact in inputs:
        folder = root / "artifacts" / artifact.name
        folder.mkdir(parents=True)
        os.symlink(artifact.path, folder / Path(artifact.path).name)
    return root


def start(root: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline", "run", "conf=stage_c", "scale=micro", f"root={root}"]
    return subprocess.Popen([*command, *TRAINING, *words], cwd=CHECKOUT, stderr=subprocess.PIPE, text=True)


def finish(driver: subprocess.Popen[str]) -> str:
    """Wait for the end, which must be a good one; what was said."""
    said = driver.communicate(timeout=PATIENCE_S)[1]
    assert driver.returncode == 0, said
    return said


def wait_for(event: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not event():
        assert driver.poll() is None, f"the driver ended before the event: {driver.communicate()[1]}"
        assert time.monotonic() < deadline, "the event never came"
        time.sleep(0.005)


def saved(root: Path, step: int) -> Callable[[], bool]:
    """Whether a checkpoint of that step or a later one is there."""
    return lambda: any(
        int(path.name[:9]) >= step for path in root.glob("artifacts/stage_c/*/building/checkpoints/stage_c/*.json")
    )


def ranks(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """The driver's training workers."""
    below = psutil.Process(driver.pid).children(recursive=True)
    return [process for process in below if "RayTrainWorker" in " ".join(process.cmdline())]


def stage_c(root: Path) -> dict[str, Any]:
    """The manifest of what was trained."""
    (artifact,) = (artifact for artifact in Store(str(root)).finished() if artifact.name == "stage_c")
    return artifact.manifest


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, inputs: list[Artifact]) -> dict[str, Any]:
    """The manifest of the training that nothing befell."""
    root = new_root(tmp_path_factory.mktemp("calm"), inputs)
    assert "interrupted" not in finish(start(root))
    return stage_c(root)


def test_a_killed_rank_costs_steps_and_nothing_else(tmp_path, inputs, calm):
    root = new_root(tmp_path, inputs)
    driver = start(root)
    try:
        wait_for(saved(root, 20), driver)
        victim = ranks(driver)[1]
        victim.kill()
        said = finish(driver)
    finally:
        driver.kill()
    manifest = stage_c(root)
    assert manifest["content"] == calm["content"]
    figures = manifest["metrics"]
    assert (figures["interruptions"], figures["preemptions"]) == (1, 0)
    assert 0 <= figures["steps_again"] <= EVERY + 1
    assert "steps done again after 1 interruption" in said
