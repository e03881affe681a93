"""A training on several ranks whose processes and nodes are taken away ends with the weights of the calm one."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.cluster.interruptions import Interruptions
from pipeline.cluster.ranks.checkpoints import Checkpoints
from pipeline.hours.table import table
from pipeline.store.artifacts import Artifact, Store
from stages.training import checkpoint
from tests.raylets import Raylets

pytestmark = [pytest.mark.ray, pytest.mark.cluster]
CHECKOUT = Path(__file__).parents[2]
PATIENCE_S = 600
STEPS, EVERY = 200, 10
LOST = 2 * EVERY  # at most: a state is saved behind the steps, and the next one waits for it
SHRINKING = ("cluster.min_workers=1", "cluster.replacement_s=5", "cluster.retries=2")
TRAINING = (
    "workers=2",
    "targets=[stage_c]",
    f"stage_c.train.phases=[{{steps: {STEPS}, batch_size: 8, size: 128}}]",
    f"stage_c.train.checkpoint_every={EVERY}",
)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The training that nothing befell, and before it in the same run all that it reads."""
    root = tmp_path_factory.mktemp("calm")
    assert "interrupted" not in finish(start(root))
    assert figures(stage_c(root)) == (0, 0, 0)
    return stage_c(root)


@pytest.fixture(scope="module")
def inputs(calm: Artifact) -> list[Artifact]:
    """All that Stage C's training reads."""
    root = Path(calm.path).parents[2]
    return [artifact for artifact in Store(str(root)).finished() if artifact.name != "stage_c"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, inputs: list[Artifact]) -> Path:
    """A root in which the training was asked to end, and has saved its state."""
    root = new_root(tmp_path_factory.mktemp("stopped"), inputs)
    driver = start(root)
    try:
        wait_for(saved(root, EVERY), driver)
        driver.send_signal(signal.SIGTERM)
        finish(driver, 143)
    finally:
        driver.kill()
    return root


def copied(stopped: Path, root: Path) -> Path:
    """A root of one's own that is as that one, which names none of its own paths but in its records."""
    shutil.copytree(stopped, root, symlinks=True)
    return root


def new_root(root: Path, inputs: list[Artifact]) -> Path:
    """A root in which everything but Stage C is there."""
    for artifact in inputs:
        folder = root / "artifacts" / artifact.name
        folder.mkdir(parents=True)
        os.symlink(artifact.path, folder / Path(artifact.path).name)
    return root


def start(root: Path, *words: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "run",
        "conf=stage_c",
        "scale=micro",
        f"root={root}",
        *TRAINING,
        *words,
    ]
    ours = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_TRAIN_")
    }  # a test's own run's
    return subprocess.Popen(command, cwd=CHECKOUT, env=ours | (environment or {}), stderr=subprocess.PIPE, text=True)


def finish(driver: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for the end; what was said."""
    said = driver.communicate(timeout=PATIENCE_S)[1]
    assert driver.returncode == code, said
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


def begun(root: Path, attempts: int) -> Callable[[], bool]:
    """Whether the training's so-many-th attempt has begun."""
    return lambda: so_far(root).begun >= attempts


def so_far(root: Path) -> Interruptions:
    """What the unfinished training tells of its interruptions."""
    return next(map(Interruptions.read, map(str, root.glob("artifacts/stage_c/*/building"))), Interruptions())


def actors(above: subprocess.Popen[str], kind: str) -> list[psutil.Process]:
    """Ray's actors of a kind below a process."""
    found = []
    for process in psutil.Process(above.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if kind in " ".join(process.cmdline()):
                found.append(process)
    return found


def ranks(above: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training workers below a process."""
    return actors(above, "RayTrainWorker")


def has_torch(process: psutil.Process) -> bool:
    return any("libtorch" in mapped.path for mapped in process.memory_maps())


def stage_c(root: Path) -> Artifact:
    """What was trained."""
    (artifact,) = (artifact for artifact in Store(str(root)).finished() if artifact.name == "stage_c")
    return artifact


def figures(artifact: Artifact) -> tuple[float, float, float]:
    """Interruptions, those of them with notice, and steps that were done again."""
    metrics = artifact.manifest["metrics"]
    return metrics["interruptions"], metrics["preemptions"], metrics["steps_again"]


def logged_steps(root: Path) -> set[int]:
    """Steps whose loss the MLflow runs of the training have, none of them twice in a run."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root}/mlflow/mlflow.db")
    experiments = [found.experiment_id for found in client.search_experiments()]
    steps = set()
    for run in client.search_runs(experiments, "tags.`wst.output` = 'stage_c'"):
        points = [point.step for point in client.get_metric_history(run.info.run_id, "stage_c/loss")]
        assert len(points) == len(set(points))
        steps |= set(points)
    return steps


def require_equal_hours(root: Path) -> None:
    """The hours of MLflow's steps add up to the ledger's, and so do those of its commands."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root}/mlflow/mlflow.db")
    experiments = [found.experiment_id for found in client.search_experiments()]
    held = table(str(root)).total.total / 3600
    assert held > 0
    for kind in ("step", "pipeline"):
        runs = client.search_runs(experiments, f"tags.`wst.kind` = '{kind}'")
        told = sum(run.data.metrics.get("hours/total", 0.0) for run in runs)
        assert told == pytest.approx(held, rel=1e-9), f"of each {kind}"


def learned(artifact: Artifact) -> dict[str, torch.Tensor]:
    """Stage C's weights without the biases of attention's keys.

    These change nothing: they add the same to all of a query's scores. So their gradient is rounding alone, which Adam
    brings to the size of any other, and which differs from one number of ranks to the next.
    """
    weights = load_file(Path(artifact.path) / "stage_c.safetensors")
    for name in [name for name in weights if name.endswith("attn.in_proj_bias")]:
        query, _, value = weights.pop(name).chunk(3)
        weights |= {f"{name}/query": query, f"{name}/value": value}
    return weights


def test_a_killed_rank_costs_steps_and_nothing_else(tmp_path, inputs, calm):
    root = new_root(tmp_path, inputs)
    driver = start(root)
    try:
        wait_for(saved(root, 2 * EVERY), driver)
        killed, (controller,) = ranks(driver)[1], actors(driver, "TrainController")
        assert (has_torch(killed), has_torch(controller)) == (True, False)  # seconds of a core, each time
        killed.kill()
        said = finish(driver)
    finally:
        driver.kill()
    survived = stage_c(root)
    assert survived.manifest["content"] == calm.manifest["content"]
    interrupted, noticed, again = figures(survived)
    assert (interrupted, noticed) == (1, 0)
    assert 0 <= again <= LOST
    assert f"train_c: {again} step" in said
    assert "done again after 1 interruption\n" in said
    require_equal_hours(root)


def test_a_driver_of_two_ranks_saves_on_a_signal_and_may_be_killed(tmp_path, stopped, calm):
    root = copied(stopped, tmp_path / "root")
    before = max(int(path.name[:9]) for path in root.rglob("checkpoints/stage_c/*.json"))
    driver = start(root)
    try:
        wait_for(saved(root, before + EVERY), driver)
        driver.kill()
        finish(driver, -signal.SIGKILL)
    finally:
        driver.kill()
    said = finish(start(root))
    survived = stage_c(root)
    assert survived.manifest["content"] == calm.manifest["content"]
    interrupted, noticed, again = figures(survived)
    assert (interrupted, noticed) == (2, 0)
    assert 0 <= again <= LOST  # all of the kill: after a signal nothing is done again
    assert logged_steps(root) == set(range(1, STEPS + 1))
    assert "done again after 2 interruptions\n" in said
    require_equal_hours(root)


def test_a_checkpoint_of_another_training_is_refused_once_and_in_a_sentence(tmp_path, stopped):
    root = copied(stopped, tmp_path / "root")
    (folder,) = root.glob("artifacts/stage_c/*/building/checkpoints/stage_c")
    newest = Checkpoints(str(folder), warn=print).newest()
    assert newest
    for part, read in enumerate(newest.parts):
        state = checkpoint.load(read())
        other = replace(state, recipe={**state.recipe, "learning_rate": 7.0})
        states = Checkpoints(str(folder), print, part, len(newest.parts))
        states.save(state.step + 1, checkpoint.dump(other), other.recipe)
    said = finish(start(root), 2)
    assert "train_c: the checkpoint was trained with learning_rate = 7.0, this training has 0.002; remove " in said
    assert "trying again" not in said


def test_a_drained_node_costs_no_step_and_no_retry(tmp_path, inputs, calm):
    root = new_root(tmp_path, inputs)
    with Raylets(1, 1, 1) as nodes:
        driver = start(root, *nodes.words, "cluster.retries=0", environment=nodes.environment)
        try:
            wait_for(saved(root, EVERY), driver)
            nodes.tell("drain 120")
            wait_for(begun(root, 2), driver)
            nodes.tell("remove")
            said = finish(driver)
        finally:
            driver.kill()
    survived = stage_c(root)
    assert survived.manifest["content"] == calm.manifest["content"]
    assert figures(survived) == (1, 1, 0)
    assert "0 steps done again after 1 interruption, 1 of them because a node was taken away" in said
    require_equal_hours(root)


def test_with_a_node_lost_it_goes_on_with_fewer_workers_and_grows_again(tmp_path, inputs, calm):
    root = new_root(tmp_path, inputs)
    with Raylets(1, 1) as nodes:
        driver = start(root, *nodes.words, *SHRINKING, environment=nodes.environment)
        try:
            wait_for(saved(root, EVERY), driver)
            nodes.tell("remove")
            wait_for(begun(root, 2), driver)
            nodes.tell("add 1")  # and it saves by itself, to go on with both
            wait_for(begun(root, 3), driver)
            lost = so_far(root).steps_again
            said = finish(driver)
        finally:
            driver.kill()
    survived = stage_c(root)
    lines = [json.loads(line) for file in (root / "ledger").iterdir() for line in file.read_text().splitlines()]
    held = [line["devices"] for line in lines if line["event"] == "lease_open" and line["step"] == "train_c"]
    assert held == [2, 1, 2]
    assert "train_c goes on with 1 of 2 workers" in said
    assert "train_c: there is room for 2 workers again; it is saved, and goes on with them" in said
    interrupted, noticed, again = figures(survived)
    assert (interrupted, noticed) == (2, 0)
    assert 0 <= again <= LOST
    assert again == lost  # to grow costs none
    torch.testing.assert_close(learned(survived), learned(calm), rtol=1e-4, atol=1e-4)
    require_equal_hours(root)


def test_a_rank_that_hangs_is_named_and_costs_steps_only(tmp_path, inputs, calm):
    root = new_root(tmp_path, inputs)
    driver = start(root, "cluster.stall_s=10")
    try:
        wait_for(saved(root, 2 * EVERY), driver)
        ranks(driver)[1].suspend()  # it neither goes on nor answers
        said = finish(driver)
    finally:
        driver.kill()
    survived = stage_c(root)
    assert survived.manifest["content"] == calm.manifest["content"]
    assert "nothing went on for 10 s (cluster.stall_s): rank " in said
    assert said.count(" after step ") >= 2  # what either of them did last
    assert figures(survived)[0] == 1
