"""Previewer and baseline at micro scale, on the artifacts of the whole run: only their own steps are built."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from datasets.formats import shards
from pipeline.__main__ import main
from pipeline.settings import compose
from pipeline.store.artifacts import Artifact, Store
from stages.models.baseline import Baseline
from stages.models.previewer import Previewer
from stages.sampling.sample import preview

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("micro")]


@pytest.fixture(scope="module")
def roots(micro_root, pipeline, tmp_path_factory) -> tuple[Path, Path]:
    """The root of the whole run, and another with its artifacts in which the pair has been built on top."""
    root = tmp_path_factory.mktemp("rivals")
    shutil.copytree(micro_root / "artifacts", root / "artifacts")
    targets = "targets=[previewer,baseline_samples,scores]"
    pipeline("run", "conf=evaluate", "scale=micro", "eval=baseline", targets, f"root={root}")
    return micro_root, root


@pytest.fixture(scope="module")
def built(roots) -> dict[str, Artifact]:
    """What the second root has beyond the first."""
    before, after = ({item.manifest["fingerprint"]: item for item in Store(str(root)).finished()} for root in roots)
    return {item.name: item for digest, item in after.items() if digest not in before}


def opened(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.mode == "RGB"
        return np.asarray(picture)


def test_only_the_new_steps_are_built(built):
    assert {name: item.manifest["call"] for name, item in built.items()} == {
        "previewer": "ray.train.torch.TorchTrainer.fit",
        "baseline": "ray.train.torch.TorchTrainer.fit",
        "baseline_samples": "ray.data.Dataset.map_batches",
        "null_samples": "ray.data.Dataset.map_batches",
        "scores": "ray.data.Dataset.map_batches",
    }
    assert built["baseline"].manifest["notes"] == {"first_stage": "Stage A of this run"}
    for name in ("previewer", "baseline"):
        assert opened(built[name].read("panel.png")).std() > 0


def test_the_weights_fill_the_models_and_the_previewer_takes_stored_codes(roots, built):
    loaded = compose.load("previewer", ["scale=micro"])
    Baseline(loaded.baseline.model).load_state_dict(
        safetensors.torch.load(built["baseline"].read("baseline.safetensors"))
    )
    previewer = Previewer(loaded.previewer.model)
    previewer.load_state_dict(safetensors.torch.load(built["previewer"].read("previewer.safetensors")))
    codes = next(item for item in Store(str(roots[1])).finished("latents_c"))
    _, values = shards.read_tensors(codes.read(f"128/{shards.tensor_name(0)}"), "latents_c")
    pictures = preview(previewer.eval(), torch.from_numpy(np.stack(list(values))).float())
    assert pictures.shape == (4, 24, 24, 3)


def test_sample_shows_the_previewers_pictures(roots, tmp_path):
    words = ["conf=previewer", "scale=micro", f"root={roots[1]}", "prompt=red heart", "seed=7", "n=2", "preview=true"]
    assert main(["sample", *words, f"out={tmp_path}"]) == 0
    first, second = sorted(tmp_path.iterdir())
    assert re.fullmatch(r"red-heart-7-[0-9a-f]{6}-preview.png", first.name)
    assert re.fullmatch(r"red-heart-8-[0-9a-f]{6}-preview.png", second.name)
    assert opened(first.read_bytes()).shape == (24, 24, 3)


def test_the_rival_is_scored_on_the_same_captions(roots, built):
    rival = built["baseline_samples"]
    samples = next(item for item in Store(str(roots[0])).finished("samples"))
    rows = json.loads(samples.read("captions.json"))
    assert json.loads(rival.read("captions.json")) == rows
    drawn = np.stack([opened(rival.read(f"generated/{row['key']}.png")) for row in rows]) / 255.0
    originals = np.stack([opened(samples.read(f"original/{row['key']}.png")) for row in rows]) / 255.0
    assert drawn.shape == originals.shape == (4, 128, 128, 3)

    small, targets = (each.reshape(4, 32, 4, 32, 4, 3).mean(axis=(2, 4)).reshape(4, -1) for each in (drawn, originals))
    distances = ((small[:, None] - targets[None]) ** 2).sum(axis=2)
    metrics = built["scores"].manifest["metrics"]
    assert metrics["retrieval_top1_baseline"] == np.mean(distances.argmin(axis=1) == np.arange(4))
    noise = ((drawn - originals) ** 2).mean(axis=(1, 2, 3))
    assert metrics["psnr_baseline"] == pytest.approx((-10 * np.log10(noise)).mean(), rel=1e-6)
    assert metrics["psnr/training/baseline/n"] == metrics["psnr/training/null/n"] == 4  # what chance does, beside it
    before = next(item for item in Store(str(roots[0])).finished("scores")).manifest["metrics"]
    assert {name: metrics[name] for name in before} == before
