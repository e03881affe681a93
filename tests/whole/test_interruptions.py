"""Whoever dies, wherever: the same command goes on, finished manifests stay, the content is the calm run's."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
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
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
FINE = (
    "data.views={fine: {min_aesthetic: 5.0}}",
    "stage_c.train.phases=[{steps: 2, batch_size: 8, size: 128}, {steps: 2, batch_size: 4, size: 128, view: fine}]",
    "stage_c.train.precision=auto",  # of which a state says what it came to
    "interpolate={first: 1, second: 2}",
    "targets=[stage_c]",
)


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
    folder, proof = root / "artifacts" / output, INSIDE[output.removesuffix("_phases")]
    driver = start(root, *flags)
    try:
        inside = f"artifacts/{output}/*/{proof}" if proof else f"claims/artifacts/{output}/*/*.json"
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


def linked(calm_root: Path, root: Path, names: Collection[str]) -> None:
    """Give a root some artifacts of the calm run."""
    for artifact in contents(calm_root).values():
        if artifact.name in names:
            target = root / Path(artifact.path).relative_to(calm_root)
            target.parent.mkdir(parents=True)
            os.symlink(artifact.path, target)


def survive(root: Path, ends: dict[str, signal.Signals], *flags: str) -> None:
    """End a run inside the step of each of these outputs, and let the last one go on to its end."""
    seen: dict[Path, bytes] = {}

    def require_unchanged() -> None:
        for path, data in seen.items():
            assert path.read_bytes() == data, f"{path} changed after it was finished"

    for output, number in ends.items():
        assert interrupt_inside(output, root, number, *flags) == CODES[number]
        require_unchanged()
        seen |= {path: path.read_bytes() for path in root.glob("artifacts/*/*/manifest.json")}
        if number != signal.SIGKILL:
            require_saved(root, output)
    assert start(root, *flags).wait(PATIENCE_S) == 0
    require_unchanged()
    assert not list(root.glob("artifacts/*/*/building/*")), "the building folder is left behind"


def require_saved(root: Path, output: str) -> None:
    """A training that was asked to end has saved its state, and nothing of its run, the newest, goes on."""
    (folder,) = (root / "artifacts" / output).iterdir()
    assert list(folder.glob("building/checkpoints/*/*.safetensors"))
    (claim,) = root.glob(f"claims/artifacts/{output}/*/*.json")
    assert json.loads(claim.read_bytes())["released"]
    newest = max(path.name for path in root.glob("invocations/*.json"))
    assert not (root / "claims" / "runs" / newest).exists()


def require_equal(root: Path, calm_root: Path, outputs: Collection[str]) -> None:
    calm, survived = contents(calm_root), contents(root)
    for name in outputs:
        assert survived[name].manifest["content"] == calm[name].manifest["content"], name


@pytest.fixture(scope="module")
def survived(micro_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose runs were killed in the middle of the download and of Stage B's training, and asked to end in the
    middle of Stage C's. What lies between is the calm run's, so that it is found to have come out the same."""
    root = tmp_path_factory.mktemp("survived")
    linked(micro_root, root, ("metadata", "text_tiny", "stage_a", "latents_a"))
    ends = {"images": signal.SIGKILL, "stage_b": signal.SIGKILL, "stage_c_phases": signal.SIGTERM}
    survive(root, ends, *FINE)
    return root


def test_killed_drivers_leave_the_same_bytes(micro_root, survived):
    require_equal(survived, micro_root, ["images", "stage_b", "latents_c"])


def test_how_each_run_ended_is_told(survived, answer):
    runs = json.loads(answer("status", f"root={survived}", "--json").stdout)["runs"]
    assert [run["outcome"].split(":")[0] for run in runs] == ["killed", "killed", "Interrupted", "done"]
    assert runs[0]["steps"]["images"]["state"] == "killed"
    assert runs[2]["steps"]["stage_c_phases"]["state"] == "interrupted"


def test_one_command_gives_the_weights_between_two_phases(survived):
    made = contents(survived)
    trained, between = made["stage_c_phases"], made["stage_c"]
    assert trained.files.keys() == {"stage_c.safetensors", "phases/1/stage_c.safetensors"}
    ends = [
        safetensors.torch.load(trained.read(name)) for name in ("phases/1/stage_c.safetensors", "stage_c.safetensors")
    ]
    state = safetensors.torch.load(between.read("stage_c.safetensors"))
    assert state.keys() == ends[0].keys() == ends[1].keys()
    assert all(torch.equal(state[key], torch.lerp(ends[0][key], ends[1][key], 0.5)) for key in state)
    assert not torch.equal(ends[0]["projection.weight"], ends[1]["projection.weight"])
    assert between.manifest["notes"]["compressor"] == trained.manifest["notes"]["compressor"]


@pytest.mark.chaos
def test_a_driver_killed_once_inside_each_step_leaves_the_same_bytes(micro_root, tmp_path):
    survive(tmp_path, dict.fromkeys(INSIDE, signal.SIGKILL))
    assert set(contents(tmp_path)) == set(INSIDE)
    require_equal(tmp_path, micro_root, INSIDE)


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
    survive(tmp_path / "hit", dict.fromkeys(("stage_a", "stage_b", "stage_c"), signal.SIGKILL), *flags)
    require_equal(tmp_path / "hit", tmp_path / "calm", contents(tmp_path / "calm"))


@pytest.mark.chaos
def test_ctrl_c_in_a_training_saves_and_ends_with_its_exit_code(micro_root, tmp_path):
    linked(micro_root, tmp_path, set(INSIDE) - {"stage_c", "samples", "scores", "release"})
    survive(tmp_path, {"stage_c": signal.SIGINT}, "targets=[stage_c]")
    require_equal(tmp_path, micro_root, ["stage_c"])
