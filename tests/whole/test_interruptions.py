"""Whoever dies, wherever: the same command goes on, finished manifests stay, the content is the calm run's."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.store.artifacts import Artifact, Store

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("micro")]
CHECKOUT = Path(__file__).parents[2]
PATIENCE_S = 300
# artifact -> a file that proves that its step is in the middle of its work
INSIDE = {
    "metadata": "",  # its claim
    "images": "receipts/*.json",
    "text_tiny": "tower.safetensors",
    "stage_a": "building/checkpoints/stage_a/*.json",
    "latents_a": "128/receipts/*.json",
    "stage_b": "building/checkpoints/stage_b/*.json",
    "latents_c": "128/receipts/*.json",
    "stage_c": "building/checkpoints/stage_c/*.json",
    "samples": "generated/*.png",
    "scores": "",
    "release": "*/*.safetensors",
}


def start(root: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline", "run", "conf=stage_c", "scale=micro", f"root={root}", *flags]
    return subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def wait_for(event: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not event():
        assert driver.poll() is None, "the driver ended before the event"
        assert time.monotonic() < deadline, "the event never came"
        time.sleep(0.005)


def interrupt_inside(output: str, root: Path, number: signal.Signals, *flags: str) -> int:
    """Start the run, send the driver a signal once it is inside the step that makes `output`; its exit code."""
    folder = root / "artifacts" / output
    driver = start(root, *flags)
    try:
        inside = f"artifacts/{output}/*/{INSIDE[output]}" if INSIDE[output] else f"claims/artifacts/{output}/*/*.json"
        wait_for(lambda: any(root.glob(inside)), driver)
        driver.send_signal(number)
        if number != signal.SIGKILL:  # as from timeout(1): Ray's processes are in the group too
            os.killpg(driver.pid, number)
        code = driver.wait(PATIENCE_S)
    finally:
        driver.kill()
        driver.wait()
    assert not list(folder.glob("*/manifest.json")), f"{output} was finished before the signal came"
    return code


def contents(root: Path) -> dict[str, Artifact]:
    return {artifact.name: artifact for artifact in Store(str(root)).finished()}


def check_survival(calm_root: Path, root: Path, outputs: list[str], *flags: str) -> None:
    seen: dict[Path, bytes] = {}
    for output in outputs:
        assert interrupt_inside(output, root, signal.SIGKILL, *flags) == -signal.SIGKILL
        for path, data in seen.items():
            assert path.read_bytes() == data, f"{path} changed after it was finished"
        seen |= {path: path.read_bytes() for path in root.glob("artifacts/*/*/manifest.json")}
    assert start(root, *flags).wait(PATIENCE_S) == 0
    for path, data in seen.items():
        assert path.read_bytes() == data, f"{path} changed after it was finished"
    calm, survived = contents(calm_root), contents(root)
    assert set(outputs) <= set(survived)
    for name, artifact in survived.items():
        assert artifact.manifest["content"] == calm[name].manifest["content"], name
    for output in outputs:
        assert not list(Path(survived[output].path).glob("building/*")), "the building folder is left behind"


def test_killed_drivers_leave_the_same_bytes(micro_root, tmp_path, pipeline):
    check_survival(micro_root, tmp_path, ["images", "stage_b"], "--until", "train_b")
    runs = json.loads(pipeline("status", f"root={tmp_path}", "--json").stdout)["runs"]
    assert [run["outcome"] for run in runs] == ["killed", "killed", "done"]
    assert runs[0]["steps"]["images"]["state"] == "killed"


@pytest.mark.chaos
def test_a_driver_killed_once_inside_each_step_leaves_the_same_bytes(micro_root, tmp_path):
    check_survival(micro_root, tmp_path, list(INSIDE))
    assert set(contents(tmp_path)) == set(INSIDE)


@pytest.mark.chaos
def test_aspect_ratio_buckets_on_two_ranks_leave_the_same_bytes(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(24):
        height, width = ((384, 384), (384, 768), (768, 384))[number % 3]
        small = Image.fromarray(generator.integers(0, 256, (6, 6, 3), np.uint8))
        small.resize((width, height)).save(tmp_path / f"pictures/{number}.png")
        (tmp_path / f"pictures/{number}.txt").write_text(f"picture {number}")
    phases = "[{steps: 12, batch_size: 4, size: 384, max_aspect: 2}]"
    flags = [f"stage_{name}.train.phases={phases}" for name in "abc"]
    flags += [f"stage_{name}.train.checkpoint_every=4" for name in "abc"]
    flags += [f"stage_{name}.train.lanes=2" for name in "abc"]
    flags += ["data=folder", f"data.folder.path={tmp_path}/pictures", "data.limit=null", "data.image.size=384"]
    flags += ["data.image.max_aspect=2", "compressor.warmup=null", "targets=[stage_c]", "workers=2"]
    assert start(tmp_path / "calm", *flags).wait(2 * PATIENCE_S) == 0
    assert len(contents(tmp_path / "calm")["metadata"].manifest["notes"]["buckets"]) == 3
    check_survival(tmp_path / "calm", tmp_path / "hit", ["stage_a", "stage_b", "stage_c"], *flags)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.chaos)]
)
def test_a_signal_in_a_training_saves_and_ends_with_its_exit_code(micro_root, tmp_path, number, code):
    for artifact in contents(micro_root).values():  # all but Stage C and what follows
        if artifact.name not in ("stage_c", "samples", "scores", "release"):
            target = tmp_path / Path(artifact.path).relative_to(micro_root)
            target.parent.mkdir(parents=True)
            os.symlink(artifact.path, target)
    assert interrupt_inside("stage_c", tmp_path, number) == code
    (folder,) = (tmp_path / "artifacts" / "stage_c").iterdir()
    assert list(folder.glob("building/checkpoints/stage_c/*.safetensors"))
    (claim,) = tmp_path.glob("claims/artifacts/stage_c/*/*.json")
    assert json.loads(claim.read_bytes())["released"]
    assert not list(tmp_path.glob("claims/runs/*"))
